"""Measurements. Times are quoted as ratios within one run, because seconds differ between machines."""
