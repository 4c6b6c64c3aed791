"""Spectra as records, and all that follows from them: criteria, types, assessment, selection. NumPy, no torch."""
