"""Replacements for operations of PyTorch whose second derivatives are wrong, slow or missing."""
