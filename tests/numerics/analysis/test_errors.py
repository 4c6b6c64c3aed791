import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hesd import hessian_spectrum, layer_spectra
from lightning_hesd.numerics.analysis import api
from lightning_hesd.numerics.inputs.options import OPTION_NAMES, AnalysisOptions, analysis_options
from tests import cases

STRATEGIES = ("graph", "recompute")
EXACT = (*STRATEGIES, "auto")


def make(**options: Any) -> Any:
    """Analyze a small problem with these options."""
    problem = cases.regression((3, 2), inputs=3, outputs=2, dtype=torch.float64)
    return hessian_spectrum(*problem, **{"steps": 2, **options})


OUT_OF_RANGE = [
    ("steps", 0, r"`steps` must be a positive integer, got 0"),
    ("steps", True, r"`steps` must be a positive integer, got True"),
    ("probes", 0, r"`probes` must be a positive integer, got 0"),
    ("seed", -1, r"`seed` must be a non-negative integer, got -1"),
    ("confidence", 0.0, r"`confidence` must lie between 0 and 1, got 0\.0"),
    ("confidence", 1, r"`confidence` must lie between 0 and 1, got 1"),
    ("confidence", "high", r"`confidence` must lie between 0 and 1, got 'high'"),
    ("confidence", math.nan, r"`confidence` must lie between 0 and 1"),
    ("dtype", torch.float16, r"`dtype` must be torch\.float32, torch\.float64 or None, got torch\.float16"),
    ("mode", "test", r"`mode` must be 'eval' or 'train' or 'keep', got 'test'"),
    ("probe", "normal", r"`probe` must be 'gaussian' or 'rademacher', got 'normal'"),
    ("strategy", "fast", r"`strategy` must be 'auto' or 'graph' or 'recompute' or 'finite_difference', got 'fast'"),
    ("matrix", "fisher", r"`matrix` must be 'hessian' or 'ggn' or 'residual', got 'fisher'"),
    ("basis", "disk", r"`basis` must be 'auto' or 'device' or 'cpu' or 'none', got 'disk'"),
    *[
        ("tolerance", value, rf"`tolerance` must be a number between 0 and 1, 'type', 'auto' or None, got {value!r}")
        for value in (0.0, 1.0, True, "fine")
    ],
    *[
        ("memory_budget", value, f"`memory_budget` must be a positive integer, a number of bytes, or None, got {value}")
        for value in (0, 1e9, True)
    ],
    ("batch_size", 2.5, r"`batch_size` must be a positive integer or 'auto'"),
    ("batch_size", "most", r"`batch_size` must be a positive integer or 'auto'"),
    ("batch_weight", "words", 'must be a function of the batch, "tokens" or None'),
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
    def test_are_checked(self, name, value, message):
        with pytest.raises(ValueError, match=message):
            analysis_options(**{name: value})

    def test_unknown_ones_are_refused_with_a_list_of_the_known(self):
        refusal = r"unexpected keyword argument 'step': did you mean 'steps' or 'stop'\? The options .*, sampling_error"
        for function in (analysis_options, functools.partial(layer_spectra, nn.Linear(1, 1), [], cases.squared_error)):
            with pytest.raises(TypeError, match=refusal):
                function(step=3)
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'color'\. The options .*, probes"):
            analysis_options(color="red")
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'step'"):
            make(step=3)

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


def with_weight(weight: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight))
    return module


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            nn.Linear(2, 1).requires_grad_(False),
            {},
            r"no parameter that requires grad \(`include_frozen=True` includes",
        ),
        (nn.Tanh(), {}, r"`module` \(Tanh\) has no parameter that requires grad"),
        (nn.Linear(2, 1), {"parameters": lambda *_: False}, "leaves none of the 2 parameters: weight, bias"),
        (nn.Linear(2, 1, dtype=torch.complex64), {}, r"parameter 'weight' is complex \(torch\.complex64\)"),
        (with_weight(torch.eye(2).to_sparse()), {}, r"parameter 'weight' is sparse \(torch\.sparse_coo\)"),
        (with_weight(torch.ones(1, 1).expand(1, 2)), {}, r"elements of parameter 'weight' share memory"),
        (
            cases.tied_by_data(),
            {},
            r"'0\.weight' and '2\.weight' are different ones in the same memory, .* by one `nn\.Parameter`",
        ),
        (
            nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1, device="meta")),
            {},
            r"must be on one device, got cpu, meta: .*`parameters=lambda name, p: str\(p\.device\) == 'meta'`",
        ),
    ],
    ids=["frozen", "none", "filtered", "complex", "sparse", "expanded", "memory", "devices"],
)
def test_parameters_that_cannot_be_analyzed(module, options, message):
    with pytest.raises(ValueError, match=message):
        hessian_spectrum(module, [], cases.squared_error, **options)


def test_a_program_that_has_no_modes_is_analyzed_as_it_is():
    class Program(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            raise NotImplementedError("Calling train() is not supported yet.")

    module, batch = Program(2, 1), (torch.ones(2, 2), torch.zeros(2, 1))
    with pytest.raises(NotImplementedError, match=r"into mode 'eval' \(Calling train.*: analyze it with mode='keep'"):
        hessian_spectrum(module, [batch], cases.squared_error)
    assert hessian_spectrum(module, [batch], cases.squared_error, mode="keep").verified == "yes"


class TestBatches:
    def test_there_must_be_one_and_weights_must_be_positive(self):
        with pytest.raises(ValueError, match=r"no batches to analyze: `batches` is empty"):
            hessian_spectrum(nn.Linear(2, 1), [], cases.squared_error)
        for weight in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="batch_weight"):
                make(batch_weight=lambda _, weight=weight: weight)

    def test_an_empty_one_is_refused_by_its_number(self):
        batches = [(torch.zeros(n, 2), torch.zeros(n, 1)) for n in (2, 0)]
        with pytest.raises(ValueError, match="batch 1 holds no samples: leave it out"):
            hessian_spectrum(nn.Linear(2, 1), batches, cases.squared_error)

    def test_parameters_in_a_batch_are_those_of_the_module(self):
        module = nn.Linear(2, 1)
        x = torch.tensor([[1.0, 2.0], [3.0, 1.0]])

        def loss(module: Any, batch: Any) -> Tensor:
            return (batch[0] @ getattr(batch[1], "weight", batch[1]).T + module.bias).square().mean()

        for part in (module.weight, module):
            spectrum = hessian_spectrum(module, [(x, part)], loss, batch_weight=lambda batch: 2.0)
            assert (spectrum.verified, round(spectrum.nodes.sum(), 3)) == ("yes", 17.0)  # the trace

    def test_a_batch_that_was_computed_from_parameters_is_refused(self):
        module, x = nn.Linear(2, 2), torch.ones(3, 2)
        with pytest.raises(ValueError, match="batch 0 holds a tensor that was computed from parameters of the module"):
            hessian_spectrum(module, [(module(x), torch.zeros(3, 2))], cases.squared_error)
        points = x.clone().requires_grad_().view(3, 2)  # a graph of its own is none of our business
        assert hessian_spectrum(module, [(points, torch.zeros(3, 2))], cases.squared_error).verified == "yes"

    def test_a_batch_without_tensor_needs_a_weight(self):
        module = nn.Linear(1, 1)

        def loss(module: nn.Module, batch: dict[str, Any]) -> Tensor:
            return module(torch.tensor([[batch["x"]]])).square().sum()

        with pytest.raises(ValueError, match=r"a batch of type dict, which holds no tensor: pass `batch_weight`"):
            hessian_spectrum(module, [{"x": 2.0}], loss)
        spectrum = hessian_spectrum(module, [{"x": 2.0}], loss, batch_weight=lambda batch: 3.0)
        assert spectrum.num_samples == 3
        assert spectrum.lambda_max == pytest.approx(10.0, rel=1e-6)


class TestLoss:
    @staticmethod
    def analyze(loss: Any, strategy: str = "auto") -> Any:
        data = [(torch.full((2, 2), float(index)), torch.zeros(2, 1)) for index in range(3)]
        return hessian_spectrum(nn.Linear(2, 1), data, loss, strategy=strategy)

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (None, "a scalar tensor, got NoneType"),
            ({"loss": torch.zeros(())}, "a scalar tensor, got dict"),
            (torch.zeros(2, 1), r"a scalar tensor, the mean over the batch; got shape \(2, 1\)"),
            (torch.zeros(0), r"a scalar tensor, the mean over the batch; got shape \(0,\)"),
        ],
    )
    def test_must_be_a_scalar_tensor(self, value, said):
        with pytest.raises(TypeError, match=rf"`loss_fn` must return {said}"):
            self.analyze(lambda module, batch: value)

    def test_must_be_real(self):
        with pytest.raises(TypeError, match=r"`loss_fn` must return a real number, got torch\.complex64"):
            self.analyze(lambda module, batch: module(batch[0]).square().mean().to(torch.complex64))

    def test_must_leave_the_analyzed_parameters_unfrozen(self):
        with pytest.raises(
            RuntimeError, match=r"freezes parameters that are analyzed .*: leave them out by `parameters`"
        ):
            self.analyze(lambda module, batch: module.requires_grad_(False)(batch[0]).square().mean())

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_one_element_will_do(self, strategy):
        spectrum = self.analyze(lambda module, batch: module(batch[0]).square().mean().reshape(1, 1), strategy)
        assert spectrum.lambda_max > 0

    @pytest.mark.parametrize(("value", "said", "bad"), [(math.nan, "nan", 0), (math.inf, "inf", 2)])
    def test_must_be_finite(self, value, said, bad):
        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            usual = cases.squared_error(module, batch)
            return usual * value if batch[0][0, 0] == bad else usual

        with pytest.raises(ArithmeticError, match=rf"the loss of batch {bad} is -?{said}"):
            self.analyze(loss)

    @pytest.mark.parametrize(("bad", "strategy"), [(0, "graph"), (1, "recompute")])
    def test_products_must_be_finite(self, bad, strategy):
        # The root of a sum of squares has no second derivative at zero; its value there is a finite zero.
        def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            x = batch[0] - bad
            return (x @ module.weight.T).square().sum().sqrt()

        said = rf"the Hessian-vector product of batch {bad} is NaN or infinite, though its loss is"
        with pytest.raises(ArithmeticError, match=said):
            self.analyze(loss, strategy)

    @pytest.mark.parametrize("scale", [1e20, 1e30])
    def test_products_whose_squared_length_is_not_finite_are_scaled(self, scale):
        module, batches, _ = cases.make("mlp", torch.float32)
        found, usual = (
            hessian_spectrum(module, batches, lambda m, b, c=c: c * cases.cross_entropy(m, b)) for c in (scale, 1.0)
        )
        assert found.c_t == pytest.approx(usual.c_t, rel=1e-4)
        assert found.lambda_max == pytest.approx(scale * usual.lambda_max, rel=1e-4)


class TestTwiceDifferentiable:
    # "auto" goes on with central differences: see test_strategies.
    BATCH = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 1))
    ONCE = cases.Applied(lambda x: cases.OnceDifferentiable.apply(x).square())

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("place", [1, 3])
    def test_a_function_differentiable_once_is_refused_wherever_it_is(self, place, strategy):
        module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
        module.insert(place, self.ONCE)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice: .*`once_differentiable`"):
            hessian_spectrum(module, [self.BATCH], cases.squared_error, strategy=strategy)

    @pytest.mark.parametrize("strategy", EXACT)
    def test_before_the_first_parameter_it_does_not_matter(self, strategy):
        module = nn.Sequential(self.ONCE, nn.Linear(3, 1))
        spectrum = hessian_spectrum(module, [self.BATCH], cases.squared_error, strategy=strategy)
        assert spectrum.lambda_max > 0
        assert spectrum.strategy != "finite_difference"
