"""Benchmarks: ``python -m bench``. Each case is checked against float64 before it is timed."""
