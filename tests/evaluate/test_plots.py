"""Pictures are written, and what they are to show can be seen on them."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from torch import Tensor

from tli_engine.align.retrieval import Alignment, measure_alignment
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import Split
from tli_engine.evaluate import plots
from tli_engine.evaluate.alignment import Vectors
from tli_engine.evaluate.plots import (
    plot_histograms,
    plot_layer_curve,
    plot_losses,
    plot_scan,
    plot_training,
)

BLUE, RED, GREEN = plots._TRUE, plots._RANDOM, plots._OTHER


def pixels(path: Path) -> Any:
    """The picture, ``[height, width, RGB]``; neither blank nor cut short."""
    picture = (image.imread(path)[..., :3] * 255).astype(int)
    assert picture.shape[0] > 300
    assert picture.shape[1] > 800
    # paper, ink and more than the two
    assert len(np.unique(picture @ [65536, 256, 1])) > 20
    return picture


def count(picture: Any, colour: str) -> int:
    """Pixels of one of the three colours, paler ones too, as where a line is thin."""
    r, g, b = np.moveaxis(picture, -1, 0)
    seen = {
        BLUE: (b - r > 50) & (b - g > 20),
        RED: (r - b > 50) & (r - g > 20),
        GREEN: (g - r > 50) & (g - b > 20),
    }
    return int(seen[colour].sum())


def aligned(count: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(count, 8, generator=generator)
    return source, source + noise * torch.randn(count, 8, generator=generator)


def alignment(noise: float, seed: int = 0) -> Alignment:
    source, target = aligned(20, noise, seed)
    return measure_alignment(source, target, list(range(20)), list(range(20)))


def vectors_of(
    name: str, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], words: int | None = None
) -> Vectors:
    column = tuple(f"neno{i % (words or len(before[0]))}" for i in range(len(before[0])))
    split = Split(name, PairList(("swahili", "english"), column, column), [], [])
    return Vectors(split, torch.cat(before), torch.cat(after))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _all_figures_are_closed() -> Iterator[None]:
    yield
    left = plots.plt.get_fignums()
    plots.plt.close("all")
    assert left == []


def scan_of(layer: int | None) -> Any:
    return SimpleNamespace(
        layers=[alignment(noise) for noise in (3.0, 1.0, 0.3)],
        proposal=SimpleNamespace(layer=layer),
        pooling="content",
        pairs=20,
        model="tiny",
    )


def test_scan(tmp_path: Path) -> None:
    plot_scan(scan_of(None), tmp_path / "none.png")
    plot_scan(scan_of(2), tmp_path / "two.png")
    none, two = (pixels(tmp_path / f"{name}.png") for name in ("none", "two"))
    for picture in (none, two):
        assert min(count(picture, colour) for colour in (BLUE, RED, GREEN)) > 100
    # the proposed layer is marked
    assert (none.shape != two.shape) or (none != two).any()


def test_training(tmp_path: Path) -> None:
    steps = [
        {"step": i, "loss": 1 / i, "cosine_true": 0.5 + 0.01 * i, "cosine_random": 0.1}
        for i in range(1, 30)
    ]
    plot_training(steps, tmp_path / "training.png")
    picture = pixels(tmp_path / "training.png")
    assert count(picture, BLUE) > 100
    assert count(picture, RED) > 100


@pytest.mark.parametrize("steps", [0, 1])
def test_training_of_hardly_any_step(steps: int, tmp_path: Path) -> None:
    step = {"step": 1, "loss": 2.0, "cosine_true": 0.5, "cosine_random": 0.1}
    plot_training([step] * steps, tmp_path / "training.png")
    pixels(tmp_path / "training.png")


def test_histograms(tmp_path: Path) -> None:
    split = vectors_of("train", aligned(40, 2.0), aligned(40, 0.3))
    plot_histograms([split], tmp_path / "one.png")
    plot_histograms([split, vectors_of("control", *[aligned(9, 1.0)] * 2)], tmp_path / "two.png")
    one, two = pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png")
    # a row a split
    assert two.shape[0] == 2 * one.shape[0]
    # bars of both, before on the left and after on the right
    for half in np.split(one[:, : one.shape[1] // 2 * 2], 2, axis=1):
        assert count(half, BLUE) > 1000
        assert count(half, RED) > 1000


DEGENERATE = {
    "one-pair": lambda: vectors_of("control", aligned(1, 0.5), aligned(1, 0.1)),
    "two-pairs": lambda: vectors_of("control", aligned(2, 0.5), aligned(2, 0.1)),
    "one-word": lambda: vectors_of("train", aligned(6, 0.5), aligned(6, 0.1), words=1),
    # a collapsed model: every cosine is one
    "all-equal": lambda: vectors_of("train", *[(torch.ones(6, 8), torch.ones(6, 8))] * 2),
    "opposite": lambda: vectors_of("train", *[(torch.ones(6, 8), -torch.ones(6, 8))] * 2),
    "zero": lambda: vectors_of("train", *[(torch.zeros(6, 8), torch.zeros(6, 8))] * 2),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DEGENERATE)
def test_histograms_of_hardly_anything(name: str, tmp_path: Path) -> None:
    """No error, and no warning of numpy's amid the user's results."""
    plot_histograms([DEGENERATE[name]()], tmp_path / "alignment.png")
    pixels(tmp_path / "alignment.png")


def test_layer_curve(tmp_path: Path) -> None:
    curve = {k: (alignment(2.0), alignment(2.0 / (k + 1))) for k in range(4)}
    plot_layer_curve(curve, 2, "control", tmp_path / "layers.png")
    picture = pixels(tmp_path / "layers.png")
    assert count(picture, BLUE) > 300
    assert count(picture, RED) > 50
    flat = {k: (before, before) for k, (before, _) in curve.items()}
    plot_layer_curve(flat, 2, "control", tmp_path / "flat.png")
    assert (pixels(tmp_path / "flat.png") != picture).any()


def test_layer_curve_of_one_pair(tmp_path: Path) -> None:
    """Without mismatched pairs there is no separation; there is a picture."""
    source, target = aligned(1, 0.5)
    single = measure_alignment(source, target, [0], [0])
    plot_layer_curve({0: (single, single), 1: (single, single)}, 1, "control", tmp_path / "a.png")
    pixels(tmp_path / "a.png")


def test_losses_show_unseen_articles_where_they_were_measured(tmp_path: Path) -> None:
    steps: list[dict[str, float]] = [{"step": i, "loss": 3.0 - 0.1 * i} for i in range(1, 9)]
    path = tmp_path / "training.png"
    plot_losses(steps, math.nan, path)
    bare = pixels(path)
    assert count(bare, BLUE) > 300
    assert count(bare, RED) == 0
    for step in steps[3::4]:
        step["validation_loss"] = step["loss"] + 0.5
    plot_losses(steps, 3.5, path)
    assert count(pixels(path), RED) > 300
    # a run that was stopped before its first step
    plot_losses([], math.nan, path)
    assert path.read_bytes().startswith(b"\x89PNG")
