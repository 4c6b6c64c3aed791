"""Models of other libraries, trained without and with the callback, to test training and results.

A library is a module here with a `LIBRARY`, which `case.py` defines. `trial.py` trains its cases, and `independent.py`
computes the values for comparison.
"""
