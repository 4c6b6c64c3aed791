import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_hesd import hessian_spectrum, layer_spectra
from lightning_hesd.numerics.analysis import api
from lightning_hesd.numerics.inputs.options import OPTION_NAMES, AnalysisOptions, analysis_options
from lightning_hesd.numerics.inputs.sample_counts import batch_size
from tests import cases

STRATEGIES = ("graph", "recompute")
EXACT = (*STRATEGIES, "auto")


def make(**options: Any) -> Any:
    """Analyze a small problem with these options."""
    problem = cases.regression((3, 2), inputs=3, outputs=2, dtype=torch.float64)
    return hessian_spectrum(*problem, **{"steps": 2, **options})


OUT_OF_RANGE = [
    ("steps", 0, r"`steps` must be a positive integer, got 0"),
    ("steps", -3, r"`steps` must be a positive integer, got -3"),
    ("steps", 2.0, r"`steps` must be a positive integer, got 2\.0"),
    ("steps", True, r"`steps` must be a positive integer, got True"),
    ("steps", "10", r"`steps` must be a positive integer, got '10'"),
    ("probes", 0, r"`probes` must be a positive integer, got 0"),
    ("probes", 1.5, r"`probes` must be a positive integer"),
    ("seed", -1, r"`seed` must be a non-negative integer, got -1"),
    ("seed", 0.5, r"`seed` must be a non-negative integer"),
    ("seed", False, r"`seed` must be a non-negative integer"),
    ("confidence", 0.0, r"`confidence` must lie between 0 and 1, got 0\.0"),
    ("confidence", 1, r"`confidence` must lie between 0 and 1, got 1"),
    ("confidence", "high", r"`confidence` must lie between 0 and 1, got 'high'"),
    ("confidence", math.nan, r"`confidence` must lie between 0 and 1"),
    ("dtype", torch.float16, r"`dtype` must be torch\.float32, torch\.float64 or None, got torch\.float16"),
    ("dtype", "float32", r"`dtype` must be torch\.float32, .*got 'float32'"),
    ("mode", "test", r"`mode` must be 'eval' or 'train' or 'keep', got 'test'"),
    ("probe", "normal", r"`probe` must be 'gaussian' or 'rademacher', got 'normal'"),
    ("strategy", "fast", r"`strategy` must be 'auto' or 'graph' or 'recompute' or 'finite_difference', got 'fast'"),
    ("matrix", "fisher", r"`matrix` must be 'hessian' or 'ggn' or 'residual', got 'fisher'"),
    ("basis", "disk", r"`basis` must be 'auto' or 'device' or 'cpu' or 'none', got 'disk'"),
    *[
        ("tolerance", value, rf"`tolerance` must be a number between 0 and 1, 'type', 'auto' or None, got {said}")
        for value, said in [
            (0.0, "0\\.0"),
            (1.0, "1\\.0"),
            (-0.1, "-0\\.1"),
            (math.nan, "nan"),
            (True, "True"),
            ("fine", "'fine'"),
        ]
    ],
    ("memory_budget", 0, r"`memory_budget` must be a positive integer, a number of bytes, or None, got 0"),
    ("memory_budget", 1e9, r"`memory_budget` must be a positive integer, .*got 1000000000\.0"),
    ("memory_budget", True, r"`memory_budget` must be a positive integer, .*got True"),
]

NOT_AVAILABLE = [
    ("matrix", "ggn", r"`matrix='ggn'` needs `output_fn\(module, batch\)` and .*`output_fn` is None"),
    ("matrix", "residual", r"`matrix='residual'` needs .*`output_fn` is None"),
    ("output_fn", lambda module, batch: None, r"`output_fn` is for `matrix='ggn'` and .*leave it None for the Hessian"),
    ("output_loss", lambda outputs, batch: None, r"`output_loss` is for `matrix='ggn'` and "),
    ("preconditioner", "adam", r"`preconditioner` must map names of parameters to tensors, .*got 'adam'"),
]


class TestOptions:
    @pytest.mark.parametrize(("name", "value", "message"), [*OUT_OF_RANGE, *NOT_AVAILABLE])
    def test_are_checked_alike_for_functions_and_callbacks(self, name, value, message):
        with pytest.raises(ValueError, match=message):
            make(**{name: value})
        with pytest.raises(ValueError, match=message):
            analysis_options(**{name: value})

    def test_unknown_ones_are_refused_with_a_list_of_the_known(self):
        refusal = (
            r"unexpected keyword argument 'step': did you mean 'steps'\? The options .*, probes, .*, sampling_error"
        )
        for function in (analysis_options, functools.partial(layer_spectra, nn.Linear(1, 1), [], cases.squared_error)):
            with pytest.raises(TypeError, match=refusal):
                function(step=3)
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'color'\. The options .*, probes"):
            analysis_options(color="red")
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'step'"):
            make(step=3)

    def test_defaults_are_those_of_the_function(self):
        options = analysis_options()
        assert (options.steps, options.probes, options.seed, options.confidence) == (100, 1, 0, 0.95)
        assert (options.strategy, options.mode, options.probe, options.basis) == ("auto", "eval", "gaussian", "auto")
        assert analysis_options(steps=7).steps == 7

    def test_every_option_is_an_argument_of_the_function(self):
        given = {name: getattr(analysis_options(), name) for name in OPTION_NAMES}
        shown = [p for p in inspect.signature(hessian_spectrum).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert {p.name: p.default for p in shown} == given
        assert make(**{**given, "steps": 2}).steps == 2

    def test_every_option_arrives(self, monkeypatch):
        made = {}
        monkeypatch.setattr(api, "AnalysisOptions", lambda **options: made.update(options) or AnalysisOptions())
        marks = {name: f"mark of {name}" for name in OPTION_NAMES}
        make(**marks)
        assert made == marks

    def test_options_are_checked_before_the_batches_are_read(self):
        def batches() -> Iterator[Any]:
            pytest.fail("read the batches")
            yield

        with pytest.raises(ValueError, match="steps"):
            hessian_spectrum(nn.Linear(1, 1), batches(), cases.squared_error, steps=0)


class TestParameters:
    def test_none_that_requires_grad(self):
        module = nn.Linear(2, 1).requires_grad_(False)
        with pytest.raises(ValueError, match=r"`module` \(Linear\) has no parameter that requires grad"):
            hessian_spectrum(module, [], cases.squared_error)

    def test_a_module_without_parameters(self):
        with pytest.raises(ValueError, match=r"`module` \(Tanh\) has no parameter that requires grad"):
            hessian_spectrum(nn.Tanh(), [], cases.squared_error)

    def test_a_filter_that_leaves_none(self):
        with pytest.raises(ValueError, match=r"`parameters` leaves none of the 2 parameters: weight, bias"):
            hessian_spectrum(nn.Linear(2, 1), [], cases.squared_error, parameters=lambda name, p: False)

    def test_complex_ones(self):
        module = nn.Linear(2, 1, dtype=torch.complex64)
        with pytest.raises(ValueError, match=r"parameter 'weight' is complex \(torch\.complex64\)"):
            hessian_spectrum(module, [], cases.squared_error)


class TestBatches:
    def test_there_must_be_one(self):
        with pytest.raises(ValueError, match=r"no batches to analyze: `batches` is empty"):
            hessian_spectrum(nn.Linear(2, 1), [], cases.squared_error)

    @pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
    @pytest.mark.parametrize("strategy", ["auto", "recompute"])
    def test_weights_must_be_positive(self, weight, strategy):
        # The documentation of `batch_weight` says so. A negative weight would turn the spectrum round.
        with pytest.raises(ValueError, match="batch_weight"):
            make(batch_weight=lambda batch: weight, strategy=strategy)

    def test_a_batch_without_tensor_needs_a_weight(self):
        module = nn.Linear(1, 1)

        def loss(module: nn.Module, batch: dict[str, Any]) -> Tensor:
            return module(torch.tensor([[batch["x"]]])).square().sum()

        with pytest.raises(ValueError, match=r"samples of a batch of type dict: pass `batch_weight`"):
            hessian_spectrum(module, [{"x": 2.0}], loss)
        spectrum = hessian_spectrum(module, [{"x": 2.0}], loss, batch_weight=lambda batch: 3.0)
        assert spectrum.num_samples == 3
        assert spectrum.lambda_max == pytest.approx(10.0, rel=1e-6)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Record:
    name: str
    x: Any


class TestBatchSize:
    @pytest.mark.parametrize(
        ("batch", "expected"),
        [
            (torch.zeros(4, 2), 4),
            ((torch.zeros(4, 2), torch.zeros(9)), 4),
            ([torch.zeros(3)], 3),
            ({"x": torch.zeros(5, 1), "y": torch.zeros(2)}, 5),
            ({"id": "abc", "n": 7, "x": torch.zeros(5, 1)}, 5),
            (Pair(torch.zeros(6), torch.zeros(1)), 6),
            (Record("a name", torch.zeros(2, 2)), 2),
            (({"meta": ["ab", b"cd", None]}, [Record("", (1, torch.zeros(8, 3)))]), 8),
            (torch.tensor(1.0), 1),
            ({"temperature": torch.tensor(1.0), "x": torch.zeros(5)}, 5),
            ({"position": np.array(3), "x": torch.zeros(5)}, 5),
            ({"ids": np.arange(3), "x": torch.zeros(5)}, 5),
        ],
        ids=[
            *("tensor", "tuple", "list", "dict", "dict with other things", "named tuple", "dataclass", "nested"),
            *("0-d", "0-d first", "0-d array first", "array first"),
        ],
    )
    def test_is_the_length_of_the_first_tensor_that_is_no_scalar(self, batch, expected):
        assert batch_size(batch) == expected
        assert isinstance(batch_size(batch), float)

    @pytest.mark.parametrize("batch", ["text", b"bytes", 3, None, [], {"x": [1, "a"]}, Record, np.zeros(3)])
    def test_cannot_be_told_without_a_tensor(self, batch):
        with pytest.raises(ValueError, match=rf"type {type(batch).__name__}: pass `batch_weight`"):
            batch_size(batch)


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestLoss:
    @staticmethod
    def analyze(loss: Any, strategy: str, batches: int = 3, **options: Any) -> Any:
        data = [(torch.full((2, 2), float(index)), torch.zeros(2, 1)) for index in range(batches)]
        return hessian_spectrum(nn.Linear(2, 1), data, loss, strategy=strategy, **options)

    @pytest.mark.parametrize(
        ("value", "kind"), [(None, "NoneType"), (1.0, "float"), ({"loss": torch.zeros(())}, "dict")]
    )
    def test_must_be_a_tensor(self, value, kind, strategy):
        with pytest.raises(TypeError, match=rf"`loss_fn` must return a scalar tensor, got {kind}"):
            self.analyze(lambda module, batch: value, strategy)

    @pytest.mark.parametrize(("shape", "said"), [((2, 1), r"\(2, 1\)"), ((0,), r"\(0,\)")])
    def test_must_be_a_scalar(self, shape, said, strategy):
        with pytest.raises(TypeError, match=rf"must return a scalar tensor, the mean over the batch; got shape {said}"):
            self.analyze(lambda module, batch: module.weight.sum() + torch.zeros(shape), strategy)

    @pytest.mark.parametrize("shape", [(1,), (1, 1)])
    def test_one_element_will_do(self, shape, strategy):
        spectrum = self.analyze(lambda module, batch: module(batch[0]).square().mean().reshape(shape), strategy)
        assert spectrum.lambda_max > 0

    @pytest.mark.parametrize(("value", "said"), [(math.nan, "nan"), (math.inf, "inf")])
    @pytest.mark.parametrize("bad", [0, 2])
    def test_must_be_finite(self, value, said, bad, strategy):
        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            usual = cases.squared_error(module, batch)
            return usual * value if batch[0][0, 0] == bad else usual

        with pytest.raises(ArithmeticError, match=rf"the loss of batch {bad} is -?{said}"):
            self.analyze(loss, strategy)

    @pytest.mark.parametrize("bad", [0, 1])
    def test_products_must_be_finite(self, bad, strategy):
        # The root of a sum of squares has no second derivative at zero; its value there is a finite zero.
        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            x = batch[0] - bad
            return (x @ module.weight.T).square().sum().sqrt()

        with pytest.raises(
            ArithmeticError, match=rf"the Hessian-vector product of batch {bad} is NaN or infinite, though its loss is"
        ):
            self.analyze(loss, strategy)

    @pytest.mark.parametrize("scale", [1e20, 1e30])
    def test_products_whose_squared_length_is_not_finite_are_scaled(self, scale, strategy):
        module, batches, _ = cases.make("mlp", torch.float32)
        found, usual = (
            hessian_spectrum(module, batches, lambda m, b, c=c: c * cases.cross_entropy(m, b), strategy=strategy)
            for c in (scale, 1.0)
        )
        assert found.c_t == pytest.approx(usual.c_t, rel=1e-4)
        assert found.lambda_max == pytest.approx(scale * usual.lambda_max, rel=1e-4)

    def test_errors_of_the_loss_function_come_through(self, strategy):
        def loss(module: nn.Module, batch: Any) -> Tensor:
            raise KeyError("label")

        with pytest.raises(KeyError, match="label"):
            self.analyze(loss, strategy)


class TwiceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class OnceDifferentiable(TwiceDifferentiable):
    backward = staticmethod(once_differentiable(TwiceDifferentiable.backward))


class Apply(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class TestTwiceDifferentiable:
    # "auto" goes on with central differences: see test_strategies.
    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("place", [1, 2, 3])
    def test_a_function_differentiable_once_is_refused_wherever_it_is(self, place, strategy):
        module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
        module.insert(place, Apply(OnceDifferentiable))
        batch = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1))
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice: .*`once_differentiable`"):
            hessian_spectrum(module, [batch], cases.squared_error, strategy=strategy)

    @pytest.mark.parametrize("strategy", EXACT)
    def test_before_the_first_parameter_it_does_not_matter(self, strategy):
        module = nn.Sequential(Apply(OnceDifferentiable), nn.Linear(3, 1))
        batch = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1))
        spectrum = hessian_spectrum(module, [batch], cases.squared_error, strategy=strategy)
        assert spectrum.lambda_max > 0
        assert spectrum.strategy != "finite_difference"

    @pytest.mark.parametrize("strategy", EXACT)
    def test_a_custom_function_with_a_second_derivative_is_exact(self, strategy):
        batch = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1))
        spectra = []
        for square in (Apply(TwiceDifferentiable), _Square()):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                module = nn.Sequential(nn.Linear(3, 3), square, nn.Linear(3, 1))
            spectra.append(hessian_spectrum(module, [batch], cases.squared_error, steps=6, strategy=strategy))
        np.testing.assert_allclose(spectra[0].nodes, spectra[1].nodes, rtol=0, atol=1e-5 * spectra[1].lambda_max)


class _Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()
