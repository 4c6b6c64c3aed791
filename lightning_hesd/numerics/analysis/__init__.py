"""The engine of an analysis: options in, a Spectrum out."""
