"""From a loss to its spectrum: products with second derivatives, Lanczos runs, memory. Torch, no Lightning."""
