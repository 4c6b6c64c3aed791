"""Benchmarks. Times are ratios within one run, because seconds differ between machines."""
