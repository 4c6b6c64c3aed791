"""The dependence of the loss and its curvature on the sample size (Kiselev & Grabovoy 2024), and a recommendation."""
