"""What the words of figures, tables and reports mean, in a sentence each: their one home."""

from __future__ import annotations

from lightning_hesd.spectra.criteria import MP_THRESHOLD
from lightning_hesd.spectra.digits import number

GLOSSARY: dict[str, str] = {
    "HESD": "Hessian eigenvalue spectral density: how the eigenvalues of the Hessian of the mean loss are distributed.",
    "eigenvalue": (
        "The curvature of the mean loss along one direction of the parameters, in units of the loss per squared "
        "parameter."
    ),
    "λ_max, λ_min": "The largest and the smallest eigenvalue that were found.",
    "C_t": "λ_min over λ_max if λ_min is negative, else 0. Close to 0, negative curvature hardly matters.",
    "interval": (
        "The range that contains the true value with the stated confidence. It allows for the random start vectors, "
        "and holds for the analyzed samples only."
    ),
    "MP, MN": (
        f"The type of a spectrum: mainly positive if C_t > {number(MP_THRESHOLD, 3)}, else mainly negative. Meant for "
        "trained networks; untrained ones are often MN."
    ),
    "QS": (
        "Quasi-singular: all eigenvalues have shrunk at unchanged accuracy. Then λ_max and the trace no longer mean "
        "flatness."
    ),
    "r_e, Δr_e": "r_e is −C_t. Δr_e is r_e on generalization data over r_e on training data.",
    "K_H05, ΔK_H05": (
        "Sum of the square roots of weighted negative nodes over that of positive ones. ΔK_H05 is its value on "
        "generalization data over that on training data."
    ),
    "trace": "The sum of all eigenvalues, estimated.",
    "node": "A point of the quadrature rule that estimates the density: an approximate eigenvalue, with a weight.",
    "verified": (
        "The gradient and the Hessian-vector products agree with differences of the loss. Without that, the interval "
        "may be wrong."
    ),
    "checkpoint rule": (
        "What ranks the analyzed epochs, such as the highest C_t. It picks among the candidates: epochs whose metric "
        "is within a tolerance of the best."
    ),
    "finding": "An observation in the records that deserves attention, with evidence, confidence and a next step.",
    "start": "The analysis before the first optimizer step.",
}
"""Sentences by term, in the order in which a report explains them."""
