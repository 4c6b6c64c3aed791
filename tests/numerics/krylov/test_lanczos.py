from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_hesd.numerics.krylov.lanczos import STEPS_BETWEEN_CHECKS, Lanczos, NonFiniteProductError
from lightning_hesd.numerics.krylov.ritz import gauss_quadrature, tridiagonal_eigh
from lightning_hesd.spectra.criteria import rounding_threshold

DTYPES = [torch.float64, torch.float32]

# Name: (spectrum, number of distinct eigenvalues).
SPECTRA: dict[str, tuple[list[float], int]] = {
    "indefinite": (np.linspace(-3.0, 5.0, 30).tolist(), 30),
    "clustered": ([-2.0] * 4 + [0.5] * 20 + [3.0] * 5 + [7.0], 4),
    "rank_deficient": ([0.0] * 40 + [-1.0, 2.0, 10.0], 4),
    "all_positive": (np.geomspace(0.1, 8.0, 25).tolist(), 25),
    "all_negative": ((-np.geomspace(0.1, 8.0, 25)).tolist(), 25),
    "zero": ([0.0] * 12, 1),
    "multiple_of_identity": ([-2.5] * 12, 1),
    "one_by_one": ([3.0], 1),
    "pair": ([-1.0, 1.0], 2),
}


def make_matrix(spectrum: list[float], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with this spectrum and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def make_start(n: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Times:
    """The product with a matrix, which counts its calls."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.calls = matrix, 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ vector


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int, **options: Any) -> Lanczos:
    """A run with all its steps taken."""
    found = Lanczos(matvec, start, steps, **options)
    found.run()
    return found


def run(name: str, dtype: torch.dtype, steps: int) -> tuple[Lanczos, np.ndarray, float]:
    """The result, the true eigenvalues, and how far rounding may move an eigenvalue of this matrix."""
    spectrum = SPECTRA[name][0]
    matrix = make_matrix(spectrum, dtype)
    true = np.sort(spectrum)
    rounding = rounding_threshold(float(np.abs(true).max()), torch.finfo(dtype).eps, len(true))
    return lanczos(Times(matrix), make_start(len(spectrum), dtype), steps), true, rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
class TestPrescribedSpectra:
    def test_breaks_down_after_one_step_per_distinct_eigenvalue_and_finds_them_all(self, name, dtype):
        distinct = SPECTRA[name][1]
        result, true, rounding = run(name, dtype, steps=1000)
        assert result.breakdown
        assert len(result.alphas) == len(result.betas) == distinct
        nodes, _, residuals = gauss_quadrature(result.alphas, result.betas)
        # Repeated eigenvalues once, none left out, none invented.
        np.testing.assert_allclose(nodes, np.unique(true), rtol=0, atol=rounding)
        assert residuals.max() <= rounding

    def test_nodes_lie_inside_the_spectrum_and_eigenvalues_within_their_residuals(self, name, dtype):
        for steps in range(1, SPECTRA[name][1] + 1):
            result, true, rounding = run(name, dtype, steps)
            assert len(result.alphas) == steps
            nodes, _, residuals = gauss_quadrature(result.alphas, result.betas)
            assert nodes.min() >= true[0] - rounding
            assert nodes.max() <= true[-1] + rounding
            distances = np.abs(nodes[:, None] - true).min(axis=1)
            assert np.all(distances <= residuals + rounding)

    def test_weights_are_those_of_the_start_vector(self, name, dtype):
        spectrum, distinct = SPECTRA[name]
        matrix, start = make_matrix(spectrum, torch.float64), make_start(len(spectrum))
        result = lanczos(Times(matrix.to(dtype)), start.to(dtype), distinct)
        _, weights, _ = gauss_quadrature(result.alphas, result.betas)
        values, vectors = torch.linalg.eigh(matrix)
        shares = (vectors.T @ (start / start.norm())).square()
        expected = [float(shares[(values - value).abs() < 1e-6].sum()) for value in np.unique(spectrum)]
        # Eigenvectors of T are as well determined as the gaps are wide; the narrowest here is 0.019.
        np.testing.assert_allclose(weights, expected, rtol=0, atol=1e4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "tail"), [(torch.float64, 2e-12), (torch.float32, 2e-4)])
def test_a_small_remainder_after_the_dominant_part_is_found(dtype, tail):
    # β falls to the size of the tail after three steps: one Gram-Schmidt pass leaves a component of relative size
    # epsilon/tail along the dominant part, which would falsify every later coefficient.
    spectrum = np.concatenate([tail * np.linspace(-1.0, 1.0, 97), [2.0, 3.0, 5.0]])
    matrix = torch.diag(torch.tensor(spectrum, dtype=dtype))
    result = lanczos(Times(matrix), make_start(100, dtype), steps=60)
    assert len(result.alphas) == 60
    basis = result.ritz_vectors(np.eye(60))
    torch.testing.assert_close(basis @ basis.T, torch.eye(60, dtype=dtype), rtol=0, atol=16 * torch.finfo(dtype).eps)
    nodes, _, _ = gauss_quadrature(result.alphas, result.betas)
    rest, slack = nodes[:-3], 8 * torch.finfo(dtype).eps * 5
    np.testing.assert_allclose(nodes[-3:], [2.0, 3.0, 5.0], rtol=0, atol=slack)
    assert np.abs(rest).max() <= tail + slack
    # Ninety-seven even eigenvalues, 57 nodes: the ends are found well.
    assert rest.min() == pytest.approx(-tail, abs=0.01 * tail + slack)
    assert rest.max() == pytest.approx(tail, abs=0.01 * tail + slack)


class TestBreakdown:
    @pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_relative_to_the_norm(self, dtype, scale):
        spectrum = [0.0] * 97 + [-scale, 2 * scale, 3 * scale]
        matrix = make_matrix(spectrum, dtype)
        result = lanczos(Times(matrix), make_start(100, dtype), steps=100)
        assert result.breakdown
        # Three eigenvalues and zero, with one more step where rounding hides the end of the Krylov space.
        assert 4 <= len(result.alphas) <= 5
        nodes, _, _ = gauss_quadrature(result.alphas, result.betas)
        rounding = rounding_threshold(3 * scale, torch.finfo(dtype).eps, 100)
        assert np.abs(nodes[:, None] - np.array(spectrum)).min(axis=1).max() <= rounding
        assert (nodes > rounding).sum() == 2
        assert (nodes < -rounding).sum() == 1

    @pytest.mark.parametrize(
        ("matrix", "start", "nodes", "weights"),
        [
            (np.diag([1.0, 2.0, 3.0, 4.0]), [1.0, 0.0, 0.0, 1.0], [1.0, 4.0], [0.5, 0.5]),
            ([[0.0, 1.0], [1.0, 0.0]], [1.0, 0.0], [-1.0, 1.0], [0.5, 0.5]),
        ],
        ids=["start vector in an invariant subspace", "first coefficient of zero"],
    )
    def test_the_rule_is_of_the_krylov_space(self, matrix, start, nodes, weights):
        matrix, start = (torch.as_tensor(values, dtype=torch.float64) for values in (matrix, start))
        result = lanczos(Times(matrix), start, steps=len(start))
        assert result.breakdown
        found = gauss_quadrature(result.alphas, result.betas)
        np.testing.assert_allclose(found[:2], [nodes, weights], rtol=1e-14)

    def test_the_start_vector_is_left_alone_and_its_length_does_not_matter(self):
        matrix = make_matrix(SPECTRA["indefinite"][0], torch.float64)
        start = make_start(30)
        before = start.clone()
        first, second = (lanczos(Times(matrix), vector, steps=10) for vector in (start, 1e-3 * start))
        np.testing.assert_allclose(first.alphas, second.alphas, rtol=0, atol=1e-12)
        np.testing.assert_allclose(first.betas, second.betas, rtol=0, atol=1e-12)
        assert torch.equal(start, before)


def test_there_must_be_a_step_and_a_start_vector_with_a_direction():
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        lanczos(lambda vector: vector, torch.ones(3), 0)
    for value in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`start` must be finite and not zero"):
            lanczos(lambda vector: vector, torch.full((3,), value), 2)


class _Elsewhere(str):
    """A device name that works like "cpu" and says that it is an accelerator."""

    type = "accelerator"


class _OnAccelerator(Tensor):
    """A CPU tensor that claims to live on an accelerator, whose coefficients are read back only now and then."""

    device = property(lambda _: _Elsewhere("cpu"))


def elsewhere(start: Tensor) -> Tensor:
    return start.as_subclass(_OnAccelerator)


def assert_same_rule(first: Lanczos, second: Lanczos, rounding: float) -> None:
    """Not bit for bit: where the device is not asked, Gram-Schmidt passes twice whether or not it has to."""
    ours, theirs = (gauss_quadrature(found.alphas, found.betas) for found in (first, second))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=rounding)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=rounding)


class TestCheckInterval:
    @pytest.mark.parametrize(
        ("name", "steps"),
        [*((name, 1000) for name in SPECTRA), *(("indefinite", STEPS_BETWEEN_CHECKS + more) for more in (-7, 0, 3))],
    )
    def test_late_checks_change_nothing_but_the_number_of_products(self, name, steps):
        spectrum, distinct = SPECTRA[name]
        dtype = torch.float32
        matrix, start = make_matrix(spectrum, dtype), make_start(len(spectrum), dtype)
        at_once = lanczos(Times(matrix), start, steps)
        matvec = Times(matrix)
        late = lanczos(matvec, elsewhere(start), steps)
        assert late.breakdown == (steps == 1000)
        assert_same_rule(late, at_once, rounding_threshold(np.abs(spectrum).max(), torch.finfo(dtype).eps, len(start)))
        blocks = -(-distinct // STEPS_BETWEEN_CHECKS) * STEPS_BETWEEN_CHECKS
        assert matvec.calls == min(blocks, len(spectrum), steps)  # a last incomplete block is read, too

    @pytest.mark.parametrize(("value", "bad_step"), [(float("nan"), 1), (float("inf"), 3)])
    @pytest.mark.parametrize("on_accelerator", [False, True])
    def test_a_non_finite_product_names_the_step_and_hands_out_the_vector(self, value, bad_step, on_accelerator):
        matrix, vectors = make_matrix(SPECTRA["indefinite"][0], torch.float64), []

        def matvec(vector: Tensor) -> Tensor:
            vectors.append(vector.clone())
            product = matrix @ vector
            if len(vectors) >= bad_step:
                product[5] = value
            return product

        start = elsewhere(make_start(30)) if on_accelerator else make_start(30)
        with pytest.raises(NonFiniteProductError, match=rf"step {bad_step} ") as caught:
            lanczos(matvec, start, steps=20)
        # On the CPU the error comes at once.
        assert len(vectors) == (STEPS_BETWEEN_CHECKS if on_accelerator else bad_step)
        assert caught.value.vector.isfinite().all()
        assert torch.equal(caught.value.vector, vectors[bad_step - 1])


class TestStopping:
    """`stop` is asked every second step, with the coefficients up to date."""

    def test_stops_where_it_is_told_to(self):
        matvec = Times(make_matrix(SPECTRA["indefinite"][0], torch.float64))
        asked = []

        def stop() -> bool:
            asked.append(len(found.alphas))
            assert len(found.betas) == matvec.calls == asked[-1]
            return asked[-1] >= 9

        found = Lanczos(matvec, make_start(30), steps=20)
        found.run(stop)
        assert asked == [2, 4, 6, 8, 10]
        assert matvec.calls == len(found.alphas) == 10
        assert not found.breakdown

    def test_what_it_has_then_is_the_beginning_of_a_longer_run(self):
        matrix, start = make_matrix(SPECTRA["indefinite"][0], torch.float64), make_start(30)
        whole, short = (lanczos(Times(matrix), start, steps) for steps in (20, 6))
        stopped = Lanczos(Times(matrix), start, steps=20)
        stopped.run(lambda: len(stopped.alphas) == 6)
        for found in (short, stopped):
            np.testing.assert_array_equal(found.alphas, whole.alphas[:6])
            np.testing.assert_array_equal(found.betas, whole.betas[:6])

    def test_is_not_asked_after_the_last_step_or_a_breakdown_nor_where_no_coefficients_are_read(self):
        asked = []
        for steps in (4, 12):  # two distinct eigenvalues
            matrix = make_matrix([1.0] * 3 + [2.0] * 9, torch.float64)
            found = Lanczos(Times(matrix), make_start(12), steps)
            found.run(lambda: asked.append(1) or False)
            assert (len(found.alphas), found.breakdown) == (2, True)
        matvec = Times(make_matrix(SPECTRA["indefinite"][0], torch.float64))
        for start, steps, expected in (
            (make_start(30), 4, [2]),
            (elsewhere(make_start(30)), 20, [STEPS_BETWEEN_CHECKS, 2 * STEPS_BETWEEN_CHECKS]),
        ):
            asked.clear()
            found = Lanczos(matvec, start, steps)
            found.run(lambda found=found: asked.append(len(found.alphas)) or False)
            assert asked == expected


def test_products_of_the_caller_give_what_a_run_gives():
    spectrum = SPECTRA["clustered"][0]
    matrix, start = make_matrix(spectrum, torch.float64), make_start(len(spectrum))
    whole = lanczos(Times(matrix), start, steps=12)
    found, vectors, has_ended = Lanczos(Times(matrix), start, steps=12), [], False
    while not has_ended:
        vectors.append(found.vector)
        has_ended = found.update(matrix @ found.vector)
    np.testing.assert_array_equal(found.alphas, whole.alphas)
    np.testing.assert_array_equal(found.betas, whole.betas)
    assert torch.equal(torch.stack(vectors), found.ritz_vectors(np.eye(len(whole.alphas))))


# Outliers that converge after a few steps: without a basis, ghosts of them appear.
OUTLIERS = [*np.linspace(-1.0, 1.0, 197).tolist(), -8.0, 20.0, 50.0]


class TestBasis:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("start", [make_start, lambda n, dtype: elsewhere(make_start(n, dtype))])
    def test_a_basis_in_other_memory_gives_the_same_rule(self, start, dtype):
        matrix = make_matrix(OUTLIERS, dtype)
        near, far = (lanczos(Times(matrix), start(200, dtype), 60, basis=basis) for basis in ("device", "cpu"))
        np.testing.assert_array_equal(far.alphas, near.alphas)
        np.testing.assert_array_equal(far.betas, near.betas)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_without_a_basis_there_are_ghosts_whose_weights_add_up_and_the_right_extremes(self, dtype):
        matrix = make_matrix(OUTLIERS, dtype)
        runs = (lanczos(Times(matrix), make_start(200, dtype), 100, basis=b) for b in ("device", "none"))
        (nodes, weights, _), (ghostly, shares, residuals) = (gauss_quadrature(p.alphas, p.betas) for p in runs)
        rounding = rounding_threshold(50.0, torch.finfo(dtype).eps, 200)
        assert (nodes > 10).sum() == 2
        assert (ghostly > 10).sum() > 2  # or there would be nothing to show
        np.testing.assert_allclose(ghostly[[0, -1]], [-8.0, 50.0], rtol=0, atol=rounding)
        distances = np.abs(ghostly[:, None] - np.sort(OUTLIERS)).min(axis=1)
        # A ghost that is still on its way to an eigenvalue says so by its residual.
        assert (distances <= residuals + rounding)[ghostly > 10].all()
        for eigenvalue in (-8.0, 20.0, 50.0):
            kept, without = (w[np.abs(n - eigenvalue) < 1].sum() for n, w in ((nodes, weights), (ghostly, shares)))
            assert without == pytest.approx(kept, rel=1e4 * torch.finfo(dtype).eps)


class TestRitzVectors:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("basis", ["device", "cpu", "none"])
    def test_have_the_residuals_of_the_rule(self, basis, dtype):
        # Few steps, before any orthogonality is lost.
        matrix = make_matrix(SPECTRA["indefinite"][0], dtype)
        matvec = Times(matrix)
        found = lanczos(matvec, make_start(30, dtype), 12, basis=basis)
        nodes, vectors = tridiagonal_eigh(found.alphas, found.betas)
        ritz = found.ritz_vectors(vectors).double()
        assert matvec.calls == 12 + (11 if basis == "none" else 0)  # the run is repeated
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ritz @ ritz.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e4 * eps)
        residuals = torch.linalg.vector_norm(ritz @ matrix.double() - torch.from_numpy(nodes)[:, None] * ritz, dim=1)
        expected = gauss_quadrature(found.alphas, found.betas)[2]
        np.testing.assert_allclose(residuals, expected, rtol=0, atol=1e4 * eps)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("basis", ["device", "none"])
    def test_of_outliers_are_eigenvectors_ghosts_or_not(self, basis, dtype):
        values, vectors = torch.linalg.eigh(make_matrix(OUTLIERS, torch.float64))
        found = lanczos(Times(make_matrix(OUTLIERS, dtype)), make_start(200, dtype), 100, basis=basis)
        _, coefficients = tridiagonal_eigh(found.alphas, found.betas)
        for position in (0, -1):
            (ritz,) = found.ritz_vectors(coefficients[:, [position]]).double()
            # A ghost's share of the combination may be of any length: only the direction counts.
            alignment = float(torch.dot(ritz, vectors[:, position]).abs() / ritz.norm())
            assert alignment == pytest.approx(1.0, abs=1e-3)
        assert values[-1] == pytest.approx(50.0)

    @pytest.mark.parametrize(("name", "steps"), [("indefinite", 7), ("clustered", 4)])  # here with a breakdown
    def test_projections_are_along_the_basis(self, name, steps):
        matrix, vector = make_matrix(SPECTRA[name][0], torch.float64), make_start(30, seed=8)
        found = lanczos(Times(matrix), make_start(30), 7 if name == "indefinite" else 10, basis="cpu")
        rows = found.ritz_vectors(np.eye(steps))
        np.testing.assert_allclose(found.project(vector), rows @ vector, rtol=0, atol=1e-14)
        assert lanczos(Times(matrix), make_start(30), 7, basis="none").project(vector) is None


class TestAsymmetry:
    """⟨v_i, Hv_j⟩ for i < j is known from the symmetric matrix that H ought to be."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("basis", ["device", "none"])
    @pytest.mark.parametrize("size", [0.0, 1e-2, 1.0])
    def test_is_rounding_or_of_the_size_of_the_asymmetric_part(self, dtype, basis, size):
        matrix = make_matrix(np.linspace(-1.0, 2.0, 60), dtype)
        part = torch.randn(60, 60, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
        part -= part.T.clone()
        part *= size / torch.linalg.matrix_norm(part, 2)
        found = lanczos(Times(matrix + part), make_start(60, dtype), 15, basis=basis)
        assert found.asymmetries.shape == found.alphas.shape
        if size == 0:
            assert found.asymmetries.max() <= rounding_threshold(2.0, torch.finfo(dtype).eps, 60)
            return
        assert size / 10 < found.asymmetries.max()
        if basis == "device":  # else the basis is not orthogonal, and the components grow
            assert found.asymmetries.max() < 2 * size

    @pytest.mark.parametrize("scale", [1e-22, 1e-30, 1e25])
    @pytest.mark.parametrize("basis", ["device", "none"])
    def test_sizes_whose_squares_under_or_overflow_in_float32(self, scale, basis):
        spectrum = np.linspace(-1.0, 2.0, 60)
        usual, scaled = (
            lanczos(Times(make_matrix(s * spectrum, torch.float32)), make_start(60, torch.float32), 20, basis=basis)
            for s in (1.0, scale)
        )
        nodes, _, _ = gauss_quadrature(usual.alphas, usual.betas)
        found, _, residuals = gauss_quadrature(scaled.alphas, scaled.betas)
        np.testing.assert_allclose(found[[0, -1]] / scale, nodes[[0, -1]], rtol=1e-5)
        assert residuals.max() < scale
        assert not scaled.breakdown
