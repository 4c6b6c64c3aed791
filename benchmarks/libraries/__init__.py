"""Models of other libraries, trained without and with the callback's one line: is training the same, the result right?

A library is a module here with a `LIBRARY`. `case.py` says what that consists of, `trial.py` what is done with it,
`independent.py` what the result is compared with.
"""
