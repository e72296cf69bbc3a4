"""Diffusion mathematics in plain PyTorch: no BasicSR, no MMEngine, no file access, no global state."""
