"""A study after Kiselev & Grabovoy (2024, arXiv:2409.11995), on the digits and with ten seeds: see `__main__`."""
