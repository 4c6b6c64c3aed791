"""What must hold on a GPU: exact spectra, undisturbed training, memory as planned, no waiting; with figures."""
