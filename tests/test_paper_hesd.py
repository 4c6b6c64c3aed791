"""The reproduction of arXiv:2504.17618: it runs as a whole, and its parts do what the report says."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imsave
from torch import nn

from examples.paper_hesd.adahessian import AdaHessian, hessian_diagonals, spatial_average
from examples.paper_hesd.data import Colored, ImageFolder, load
from examples.paper_hesd.outcomes import read
from examples.paper_hesd.rules import RULES, paired, picks
from examples.paper_hesd.settings import Experiment, Setup
from examples.paper_hesd.training import run
from examples.paper_hesd.verdicts import always_mp, by_interval, more_often, sometimes_mn
from lightning_hesd import Spectrum
from lightning_hesd.training.history import SpectrumRecord
from lightning_hesd.training.preconditioner import read_preconditioner
from tests.programs import run_python
from tests.spectra import nodes

TINY = [
    *("--epochs", "2", "--points", "2", "--seeds", "2", "--steps", "4", "--samples", "16", "--train-size", "100"),
    *("--resnet-width", "2", "--vit-width", "4", "--vit-depth", "1", "--vit-patch", "4"),
]
TITLES = [*(f"Table {number}" for number in range(1, 5)), *(f"Figure {number}" for number in range(1, 11))]


def reproduce(out: Path, *options: str) -> str:
    return run_python("-m", "examples.paper_hesd", "--quick", "--out", str(out), *TINY, *options)


def report_text(out: Path) -> str:
    return (out / "report.md").read_text(encoding="utf-8")


def sections(out: Path) -> dict[str, str]:
    parts = re.split(r"^## ", report_text(out), flags=re.MULTILINE)[1:]
    return {re.split(r"[.\n]", part)[0]: part for part in parts}


@pytest.mark.slow
def test_everything_once(tmp_path: Path) -> None:
    stdout = reproduce(tmp_path)
    assert "0 finished earlier" in stdout
    parts = sections(tmp_path)
    for title in TITLES:
        assert re.search(r"^- \*\*(agrees|differs|cannot be seen at this scale)\*\*: ", parts[title], re.MULTILINE)
        assert title in parts["Summary"]
        assert "not run" not in parts[title]
    for title in TITLES[4:]:
        images = re.findall(r"!\[.*\]\((.*)\)", parts[title])
        assert len(images) == (title != "Figure 2")  # for which no network is trained enough
        assert all((tmp_path / image).read_bytes().startswith(b"\x89PNG") for image in images)
    assert "| VIT small | cinic | cifar | SGD | MP | 99 | 43 |" in parts["Table 1"]
    assert len(re.findall(r"^\| (ResNet|ViT) \| digits", parts["Table 1"], re.MULTILINE)) == 5
    assert all(line.rstrip(" |")[-1].isdigit() for line in parts["Runs"].splitlines()[4:] if line), "an analysis failed"
    for name in RULES:
        assert len(re.findall(rf"^\| {re.escape(name)} \|", report_text(tmp_path), re.MULTILINE)) >= 2

    assert set(re.findall(r"(\d+) runs to do", reproduce(tmp_path))) == {"0"}


def test_one_experiment_on_image_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "shifted", 3)
    folders = ["--train-folder", str(tmp_path / "train"), "--gen-folder", str(tmp_path / "shifted")]
    stdout = reproduce(tmp_path, "--only", "vit-sgd", "--jobs", "1", *folders)
    assert "1 runs to do, 0 finished earlier" in stdout
    [folder] = tmp_path.glob("vit-sgd-*")
    values = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    assert values["experiment"]["setup"]["steps"] == 4
    assert [row["epoch"] for row in values["rows"]] == [0, 1]
    assert f"| ViT | {tmp_path / 'train'} | {tmp_path / 'shifted'} | SGD |" in sections(tmp_path)["Table 1"]
    assert "**not run**" in sections(tmp_path)["Table 2"]
    left_out = report_text(tmp_path).split("not run, or without a spectrum: ")[1].splitlines()[0]
    assert "vit-sgd-momentum" in left_out
    assert "vit-sgd," not in left_out


def test_finished_experiments_are_not_run_again(tmp_path: Path) -> None:
    setup = Setup(train_size=64, resnet_width=2, epochs=1, points=1, steps=3, samples=8)
    experiment = Experiment("small", "resnet", "sgd", setup)
    outcome = tmp_path / experiment.folder / "outcome.json"
    assert run(experiment, tmp_path) > 0
    written = outcome.read_text(encoding="utf-8")

    assert run(experiment, tmp_path) == 0
    assert outcome.read_text(encoding="utf-8") == written  # which has how long it took

    outcome.unlink()  # as after an interruption
    assert run(experiment, tmp_path) > 0
    other = replace(experiment, setup=replace(setup, steps=4))
    assert run(other, tmp_path) > 0
    assert read([experiment, other], tmp_path)[other.name].last.spectrum.steps == 4
    assert read([experiment], tmp_path)[experiment.name].last.spectrum.steps == 3


# AdaHessian

graphs_are_let_go = pytest.mark.filterwarnings("ignore:Using backward")


def test_spatial_average_over_kernels_and_rows() -> None:
    kernels = torch.tensor([[[[1.0, -3.0], [2.0, 2.0]]], [[[0.0, 4.0], [-4.0, 0.0]]]])
    assert spatial_average(kernels).tolist() == [[[[2.0, 2.0], [2.0, 2.0]]], [[[2.0, 2.0], [2.0, 2.0]]]]
    matrix = torch.tensor([[1.0, -2.0, 3.0], [0.0, 6.0, 0.0]])
    assert spatial_average(matrix).tolist() == [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    assert spatial_average(matrix[:, :2]).tolist() == [[1.5, 1.5], [3.0, 3.0]]
    assert spatial_average(torch.tensor([-1.0, 2.0])).tolist() == [1.0, 2.0]


@graphs_are_let_go
def test_diagonal_of_a_diagonal_hessian_is_exact_and_of_others_in_the_mean() -> None:
    p, q = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))
    loss = (torch.tensor([1.0, -2.0]) * p.square()).sum() + q.pow(3).sum()
    loss.backward(create_graph=True)
    assert [d.tolist() for d in hessian_diagonals([p, q])] == [[2.0, -4.0], [[18.0]]]
    p.grad = q.grad = None

    torch.manual_seed(0)
    draws = []
    for _ in range(1000):
        w = nn.Parameter(torch.zeros(2))
        (w @ torch.tensor([[1.0, 3.0], [0.0, 5.0]]) @ w).backward(create_graph=True)  # Hessian [[2, 3], [3, 10]]
        draws += hessian_diagonals([w])
        w.grad = None
    mean = torch.stack(draws).mean(0)
    assert mean.tolist() == pytest.approx([2.0, 10.0], abs=0.4)


@graphs_are_let_go
def test_steps_follow_the_formula() -> None:
    w = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    curvature = torch.tensor([[1.0, 3.0], [-2.0, 6.0]])  # the diagonal is exact, whatever the signs
    options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.01, "weight_decay": 0.5, "hessian_power": 0.5}
    optimizer = AdaHessian([w], **options)
    expected, mean, square = w.detach().clone(), torch.zeros(2, 2), torch.zeros(2, 2)
    for step in (1, 2):
        optimizer.zero_grad()
        (0.5 * curvature * w.square()).sum().backward(create_graph=True)
        gradient = curvature * expected
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * torch.tensor([[2.0, 2.0], [4.0, 4.0]]) ** 2
        denominator = (square / (1 - 0.99**step)).sqrt() ** 0.5 + 0.01
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * mean / (1 - 0.9**step) / denominator
        assert torch.allclose(w, expected)
    assert w.grad is not None
    assert not w.grad.requires_grad  # no graph is left
    assert torch.allclose(read_preconditioner([optimizer]).diagonal[w], denominator)


# Rules and verdicts


def spectrum(low: float, high: float, residual: float = 0.0) -> Spectrum:
    residuals = [[residual, 0.0, residual]]
    return nodes.spectrum(low, 0.1, high, weights=[[0.2, 0.5, 0.3]], residuals=residuals, dimension=3, rounding=1e-7)


def history(generator: np.random.Generator) -> list[Any]:
    points = []
    for epoch in range(12):
        training, other, seen = (spectrum(-generator.uniform(0.1, 2), generator.uniform(1, 3)) for _ in range(3))
        record = SpectrumRecord(epoch, 10 * epoch, training, generalization=other, preconditioned=seen)
        accuracies = {name: round(generator.uniform(0.97, 1.0), 3) for name in ("train_acc", "val_acc", "gen_acc")}
        norm = generator.uniform(1, 2)
        points.append(SimpleNamespace(epoch=epoch, record=record, spectrum=training, squared_norm=norm, **accuracies))
    return points


@pytest.mark.parametrize("seed", range(4))
def test_picks_against_brute_force(seed: int) -> None:
    points = history(np.random.default_rng(seed))
    values = {
        "highest C_t": [p.spectrum.lambda_min / p.spectrum.lambda_max for p in points],
        "lowest λ_max": [-p.spectrum.lambda_max for p in points],
        "best validation accuracy": [p.val_acc for p in points],
        "last epoch": list(range(12)),
        "lowest trace": [-3 * (p.spectrum.weights * p.spectrum.nodes).sum() for p in points],
        "lowest λ_max·‖w‖²": [-p.spectrum.lambda_max * p.squared_norm for p in points],
        "lowest K_H05": [
            -np.sqrt(-p.spectrum.lambda_min * 0.2) / (np.sqrt(0.1 * 0.5) + np.sqrt(p.spectrum.lambda_max * 0.3))
            for p in points
        ],
        "lowest preconditioned λ_max": [-p.record.preconditioned.lambda_max for p in points],
        "lowest Δr_e": [p.record.generalization.c_t / -p.spectrum.c_t for p in points],
        "best possible": [p.gen_acc for p in points],
    }
    best = max(p.train_acc for p in points)
    allowed = [i for i, p in enumerate(points) if best - p.train_acc <= 0.01 and p.spectrum.c_t > -0.6]
    if not allowed:  # then the best training accuracy decides
        allowed = [max(range(12), key=lambda i: points[i].train_acc)]
    assert {name: point.epoch for name, point in picks(points).items()} == {
        name: max(allowed, key=lambda i: numbers[i]) for name, numbers in values.items()
    }
    assert set(values) == set(RULES)


def test_paired_differences() -> None:
    difference = paired([0.5, 0.7, 0.9], [0.4, 0.5, 0.6])  # 0.1, 0.2, 0.3: t = 4.302653 for two degrees of freedom
    assert difference == pytest.approx((0.2, 0.2 - 4.302653 * 0.1 / 3**0.5, 0.2 + 4.302653 * 0.1 / 3**0.5), rel=1e-6)
    assert difference.sign == 0
    assert by_interval(difference) == "cannot be seen at this scale"
    certain = paired([0.51, 0.52, 0.53, 0.52], [0.4, 0.4, 0.4, 0.4])
    assert (by_interval(certain), by_interval(certain, sign=-1)) == ("agrees", "differs")
    assert paired([0.5], [0.4]).sign == 0
    assert paired([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]).sign == 0  # no width, hence no evidence


def test_verdicts_on_types() -> None:
    mp, mn, unsure = spectrum(-0.1, 1.0), spectrum(-0.9, 1.0), spectrum(-0.59, 1.0, residual=0.2)
    cannot = "cannot be seen at this scale"
    assert more_often([mn] * 6 + [mp] * 4, [mp] * 10) == "agrees"
    assert more_often([mp] * 10, [mn] * 6 + [mp] * 4) == "differs"
    assert more_often([mn] + [mp] * 17, [mp] * 15) == cannot  # one of them may be chance
    for spectra, always, sometimes in (
        ([], "not run", "not run"),
        ([mp, mp], "agrees", "differs"),
        ([mp, unsure], cannot, cannot),
        ([mp, unsure, mn], "differs", "agrees"),
        ([None, mp], cannot, cannot),
    ):
        assert (always_mp(spectra), sometimes_mn(spectra)) == (always, sometimes)


# Data


def write_images(folder: Path, channels: int) -> None:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 256, (6, 8, channels), dtype=np.uint8)
            imsave(folder / name / f"{index}.png", pixels)


def test_image_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "gen", 4)
    folder = ImageFolder(tmp_path / "train")
    assert (len(folder), folder.classes) == (20, ["cat", "dog"])
    image, label = folder[10]
    assert (image.shape, label) == ((3, 6, 8), 1)
    generator = np.random.default_rng(0)
    expected = [generator.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(11)][-1]
    assert np.allclose(image.permute(1, 2, 0).numpy() * 255, expected, atol=0.01)

    setup = Setup(train_folder=str(tmp_path / "train"), gen_folder=str(tmp_path / "gen"), train_size=15)
    data = load(setup, "digits")
    assert [len(part) for part in data[:3]] == [15, 2, 20]  # type: ignore[arg-type]
    assert (data.classes, data.distinct, data.generalization[0][0].shape) == (2, 20, (3, 6, 8))
    seen = {tuple(part[i][0].flatten().tolist()) for part in data[:2] for i in range(len(part))}  # type: ignore[arg-type]
    assert len(seen) == 17  # training and validation have nothing in common

    (tmp_path / "gen" / "horse").mkdir()
    with pytest.raises(ValueError, match="different classes"):
        load(setup, "digits")
    with pytest.raises(ValueError, match="no class folders"):
        ImageFolder(tmp_path / "gen" / "horse")


def test_digits_of_training_validation_and_generalization_differ() -> None:
    data = load(Setup(), "digits")
    assert [len(part) for part in data[:3]] == [900, 300, 3 * 597]  # type: ignore[arg-type]
    train, validation = ({tuple(part[i][0].flatten().tolist()) for i in range(len(part))} for part in data[:2])  # type: ignore[arg-type]
    assert not train & validation


def test_colored_images() -> None:
    images = [(torch.arange(4.0).view(1, 2, 2), 5)] * 4
    for index, (image, label) in enumerate(Colored(images)[i] for i in range(4)):  # type: ignore[arg-type]
        color = index % 3
        assert label == 15 + color
        assert image[color].tolist() == [[1.0, 3.0], [0.0, 2.0]]
        assert image.sum() == 6
