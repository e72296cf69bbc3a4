"""Speed and memory, as ratios measured in turns; what tools/benchmark.py runs. Not in the wheel."""
