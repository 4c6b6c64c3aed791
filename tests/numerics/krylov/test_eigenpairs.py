import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_hesd import top_eigenpairs

SPECTRA = {
    "even": np.linspace(-1.0, 2.0, 90),
    "outliers": np.concatenate([np.linspace(-1.0, 1.0, 297), [8.0, 20.0, 50.0]]),
    "multiple at both ends": np.concatenate([[-3.0] * 3, np.linspace(-1.0, 1.0, 90), [5.0] * 4, [7.0] * 3]),
    "low rank": np.concatenate([np.zeros(200), [-4.0, 1.0, 2.0, 3.0]]),
    "multiple of identity": np.full(20, 2.5),
    "zero": np.zeros(20),
    "tiny": np.linspace(-1e-12, 3e-12, 30),
    "of order three": np.array([-1.0, 2.0, 2.0]),
}


class Symmetric:
    """A dense matrix with a prescribed spectrum and random eigenvectors, known by its products."""

    device = torch.device("cpu")

    def __init__(self, spectrum: np.ndarray, dtype: torch.dtype = torch.float64) -> None:
        n = len(spectrum)
        generator = torch.Generator().manual_seed(3)
        basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        self.matrix = (basis * torch.from_numpy(np.asarray(spectrum)) @ basis.T).to(dtype)
        self.shape, self.dtype, self.calls = (n, n), dtype, 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ vector


def expected(spectrum: np.ndarray, k: int, which: str) -> np.ndarray:
    ascending = np.sort(spectrum)
    return ascending[::-1][:k] if which == "largest" else np.concatenate([ascending[:k], ascending[-k:]])


@pytest.mark.parametrize(("which", "dtype"), [("largest", torch.float64), ("both", torch.float32)])
@pytest.mark.parametrize(
    ("name", "k"), [*((name, 1) for name in SPECTRA), *((n, 5) for n in SPECTRA if "order" not in n)]
)
def test_finds_eigenpairs_with_their_multiplicities_and_honest_residuals(name, k, which, dtype):
    operator = Symmetric(SPECTRA[name], dtype)
    values, vectors, residuals = top_eigenpairs(operator, k, which=which)
    true, norm = expected(SPECTRA[name], k, which), np.abs(SPECTRA[name]).max()
    eps = torch.finfo(dtype).eps
    assert values.dtype is vectors.dtype is residuals.dtype is dtype
    assert vectors.shape == (len(SPECTRA[name]), len(true))
    # A Ritz value is off by the residual squared over the gap: here at most ε·norm over a relative gap of 1/100.
    np.testing.assert_allclose(values.double(), true, rtol=0, atol=100 * eps * norm + 1e-300)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(len(true)), rtol=0, atol=32 * eps)
    remainders = operator.matrix.double() @ vectors.double() - vectors.double() * values.double()
    rounding = 8 * len(true) * eps * norm
    np.testing.assert_allclose(residuals, torch.linalg.vector_norm(remainders, dim=0), rtol=1e-3, atol=rounding)
    assert residuals.max() <= eps**0.5 * norm


def test_the_smallest_come_in_ascending_order_and_an_outlying_pair_takes_few_products():
    values, _, _ = top_eigenpairs(Symmetric(SPECTRA["even"]), 3, which="smallest")
    np.testing.assert_allclose(values, SPECTRA["even"][:3], rtol=1e-12)
    operator = Symmetric(SPECTRA["outliers"])
    top_eigenpairs(operator, 1)
    assert operator.calls <= 20


def test_the_same_seed_gives_the_same_and_others_the_same_to_tolerance():
    spectrum = SPECTRA["outliers"]
    first, again, other = (top_eigenpairs(Symmetric(spectrum), 3, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    np.testing.assert_allclose(other.values, first.values, rtol=1e-12)
    assert not torch.equal(other.vectors, first.vectors)


def test_says_when_the_tolerance_is_not_met():
    operator = Symmetric(np.linspace(0.0, 1.0, 200))
    said = "after 17 products, more than the tolerance allows .* raise `max_matvecs`"
    with pytest.warns(RuntimeWarning, match=said):
        values, vectors, residuals = top_eigenpairs(operator, 2, max_matvecs=15)
    assert operator.calls == 17
    remainders = operator.matrix @ vectors - vectors * values
    np.testing.assert_allclose(residuals, torch.linalg.vector_norm(remainders, dim=0), rtol=1e-10)


def test_a_noisy_product_does_not_pass_for_an_accurate_one():
    operator = Symmetric(SPECTRA["outliers"])
    noise = torch.randn(300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator.matrix = operator.matrix + 1e-3 * (noise - noise.T)  # which Ritz residuals of a symmetric T cannot show
    with pytest.warns(RuntimeWarning, match="more than the tolerance allows"):
        _, _, residuals = top_eigenpairs(operator, 1)
    assert residuals[0] > 1e-3


def test_enters_an_operator_that_is_a_context_once():
    class Context(Symmetric):
        entered = left = 0

        def __enter__(self) -> None:
            self.entered += 1

        def __exit__(self, *error: object) -> None:
            self.left += 1

    operator = Context(SPECTRA["low rank"])
    top_eigenpairs(operator, 2)
    assert (operator.entered, operator.left) == (1, 1)


def test_a_product_that_is_not_finite_is_an_error():
    with pytest.raises(ArithmeticError, match="product 1 is NaN or infinite"):
        top_eigenpairs(Symmetric(np.array([1.0, 2.0, np.nan])), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "`k` must be a whole number between 1 and 90 for a matrix of order 90, got 0"),
        ({"k": 46, "which": "both"}, "`k` must be a whole number between 1 and 45"),
        ({"k": 1, "which": "extreme"}, "`which` must be 'largest', 'smallest' or 'both', got 'extreme'"),
        ({"k": 1, "tolerance": 0.0}, "`tolerance` must be positive, got 0.0"),
        ({"k": 4, "basis_size": 5}, "`basis_size` must be at least 6 for these eigenpairs, got 5"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(Symmetric(SPECTRA["even"]), **arguments)
