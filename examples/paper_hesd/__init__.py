"""Reproduction of Gabdullin (2025, arXiv:2504.17618) at a scale that two CPU cores can bear: see `__main__`."""
