"""From a loss to its spectrum: products with second derivatives, Lanczos processes, memory. Torch, no Lightning."""
