"""TensorBoard's HESD tab: `plugin` serves the data, `static` draws them. The HTML report draws with the same files."""
