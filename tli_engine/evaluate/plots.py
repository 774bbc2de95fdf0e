"""Pictures: the layer curve of a scan, the losses of a run, cosines before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from tli_engine.align.retrieval import Alignment, chance_mrr
from tli_engine.align.scan import Scan
from tli_engine.evaluate.alignment import Vectors, mismatched_cosines

# colour-blind safe (Okabe and Ito)
_TRUE, _RANDOM, _OTHER = "#0072B2", "#D55E00", "#009E73"
# weight of a new value in the running mean of losses
_SMOOTHING = 0.1


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def plot_scan(scan: Scan, path: Path) -> None:
    """Draw cosine and retrieval against the layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    layers = range(len(scan.layers))
    left.plot(layers, [a.cosine_true for a in scan.layers], color=_TRUE, label="translations")
    left.plot(
        layers, [a.cosine_random for a in scan.layers], "--", color=_RANDOM, label="random pairs"
    )
    left.set(ylabel="mean cosine", title=f"cosine ({scan.pooling} pooling)")
    forward = scan.layers[0].forward
    right.plot(layers, [a.forward.mrr for a in scan.layers], color=_TRUE, label="first → second")
    right.plot(layers, [a.reverse.mrr for a in scan.layers], color=_OTHER, label="second → first")
    right.axhline(chance_mrr(forward.candidates), color=_RANDOM, ls="--", label="chance")
    if scan.proposal.layer is not None:
        right.axvline(scan.proposal.layer, color="0.5", lw=1, label="proposed")
    right.set(ylabel="mean reciprocal rank", title=f"retrieval of {scan.pairs} pairs", ylim=0)
    for axes in (left, right):
        axes.set_xlabel("hidden_states index (0 = embeddings)")
        axes.legend(frameon=False)
        _finish(axes)
    figure.suptitle(scan.model, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_training(steps: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the loss, and the raw cosine of true and random pairs, against the step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    numbers = [s["step"] for s in steps]
    left.plot(numbers, [s["loss"] for s in steps], color=_TRUE, lw=1)
    left.set(xlabel="step", ylabel="loss", title="training loss")
    right.plot(numbers, [s["cosine_true"] for s in steps], color=_TRUE, lw=1, label="translations")
    right.plot(
        numbers,
        [s["cosine_random"] for s in steps],
        color=_RANDOM,
        lw=1,
        label="in-batch negatives",
    )
    right.set(xlabel="step", ylabel="raw cosine", title="is it collapsing?")
    right.legend(frameon=False)
    for axes in (left, right):
        _finish(axes)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_losses(steps: Sequence[Mapping[str, float]], before: float, path: Path) -> None:
    """Draw the loss of each step, smoothed too, and that on unseen articles; NaN: none ``before``."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    numbers, losses = [s["step"] for s in steps], [s["loss"] for s in steps]
    axes.plot(numbers, losses, color=_TRUE, lw=1, alpha=0.3)
    smooth, total, weight = [], 0.0, 0.0
    for loss in losses:
        total += _SMOOTHING * (loss - total)
        weight += _SMOOTHING * (1 - weight)
        smooth.append(total / weight)
    axes.plot(numbers, smooth, color=_TRUE, label="training, smoothed")
    measured = [(s["step"], s["validation_loss"]) for s in steps if "validation_loss" in s]
    if measured:
        measured = [(0, before), *measured]
        axes.plot(*zip(*measured, strict=True), "o-", color=_RANDOM, label="unseen articles")
    axes.set(xlabel="step", ylabel="nats a token", title="loss")
    axes.legend(frameon=False)
    _finish(axes)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_histograms(vectors: Sequence[Vectors], path: Path) -> None:
    """Draw the cosines of true and of mismatched pairs, before and after, for each split."""
    figure, grid = plt.subplots(
        len(vectors),
        2,
        figsize=(10, 3 * len(vectors)),
        layout="constrained",
        squeeze=False,
        sharex="row",
    )
    for row, v in zip(grid, vectors, strict=True):
        for axes, stage, name in zip(row, (v.before, v.after), ("before", "after"), strict=True):
            source, target = stage.double().chunk(2)
            true = torch.nn.functional.cosine_similarity(source, target)
            groups = (
                (mismatched_cosines(stage, v.split), _RANDOM, "random pairs"),
                (true, _TRUE, "translations"),
            )
            # a collapsed space has all its cosines at 1, some of them rounded to a bit above it
            low = min(0.99, *(c.min().item() for c, _, _ in groups if len(c)))
            bins = [low + (1 - low) * i / 40 for i in range(41)]
            for cosines, color, label in groups:
                if len(cosines):
                    values = cosines.clamp(max=1).cpu().numpy()
                    axes.hist(values, bins, density=True, color=color, alpha=0.55, label=label)
            axes.set(title=f"{v.split.name}, {name}", xlabel="cosine", yticks=[])
            axes.legend(frameon=False)
            _finish(axes)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_layer_curve(
    curve: Mapping[int, tuple[Alignment, Alignment]], trained: int, split: str, path: Path
) -> None:
    """Draw separation and retrieval against the layer, before and after training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    layers = list(curve)
    for stage, name, style in ((0, "before", "--"), (1, "after", "-")):
        measured = [pair[stage] for pair in curve.values()]
        left.plot(layers, [a.separation for a in measured], style, color=_TRUE, label=name)
        mrr = [float(a.two_way_reciprocal_ranks.mean()) for a in measured]
        right.plot(layers, mrr, style, color=_TRUE, label=name)
    candidates = next(iter(curve.values()))[0].forward.candidates
    right.axhline(chance_mrr(candidates), color=_RANDOM, ls=":", label="chance")
    left.set(ylabel="true less random cosine", title=f"separation, {split} pairs")
    right.set(ylabel="two-way MRR", title=f"retrieval, {split} pairs", ylim=0)
    for axes in (left, right):
        axes.axvline(trained, color="0.6", lw=1)
        axes.set_xlabel("hidden_states index (line: where the loss was)")
        axes.legend(frameon=False)
        _finish(axes)
    figure.savefig(path, dpi=120)
    plt.close(figure)
