"""Reproduction of Gabdullin (2025, arXiv:2504.17618) at a scale for two CPU cores: see `__main__`."""
