"""Test of the Hessians of all layers, losses and functions of PyTorch."""
