"""Lanczos tridiagonalization on flat vectors, for any symmetric matrix."""
