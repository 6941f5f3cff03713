"""Ratios, measured in one interleaved run. `python -m benchmarks.engine`."""
