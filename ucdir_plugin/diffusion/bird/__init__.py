"""BIR-D: a degradation and an image found together, step by step of the reverse process (paper, Algorithm 1)."""
