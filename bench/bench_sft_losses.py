"""Losses of fine-tuning beside transformers and PEFT's, on the same batches.

Every step has one row of at most 128 tokens: translations after a short prompt, the loss on the
translation alone. The engine packs them; the peer has them padded. ``transformers:fp32`` computes in
fp32, and how far losses are from its own is what rounding makes of a curve: the engine's distance is
given beside that of ``transformers``, and of ``transformers:eager``, the same peer with another
attention kernel. (From ``transformers`` itself the engine is farther: it does not round small updates
of adapters off.) Adapters of rank 16 on all projections of all blocks, in fp32, or every weight, with
fp32 master copies; SmolLM2-135M, in bf16 on a GPU, in fp32 on a CPU.

python -m bench sft_losses [--steps N] [--methods lora full] [--jobs N]
"""

import argparse
import gc
import random
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import write_results
from bench.models import Subject, find
from bench.train_cases import CASES, LEARNING_RATE
from bench.train_peers import add_lora
from tli_engine.models.device import choose_device

PEERS = ["transformers", "peft"]
ROW_TOKENS = 128
RATES = {"lora": LEARNING_RATE, "full": 1e-5}
_WEIGHT_DECAY = 0.01
_PROMPT = "Kiswahili: {}\nEnglish:"
TRUTH = "transformers:fp32"
_COLOURS = {
    TRUTH: "#000000",
    "transformers": "#0072B2",
    "transformers:eager": "#009E73",
    "tli-engine": "#D55E00",
}
PROVIDERS = tuple(_COLOURS)

# tokens, and how many of them come before the answer
Text = tuple[tuple[int, ...], int]


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        texts: Prompts and answers as tokens.
        rows: Numbers of the texts of each step, in turns.
    """

    texts: list[Text]
    rows: list[list[int]]


def translations(subject: Subject, limit: int = ROW_TOKENS) -> Task:
    """The model's training pairs in an order of their own, as many to a row as fit."""
    tokenizer, pairs = subject.files.tokenizer, subject.splits[0].pairs
    texts: list[Text] = []
    for source, target in zip(pairs.source, pairs.target, strict=True):
        prompt = tokenizer(_PROMPT.format(source))["input_ids"]
        answer = tokenizer(f" {target}", add_special_tokens=False)["input_ids"]
        texts.append(((*prompt, *answer, tokenizer.eos_token_id), len(prompt)))
    return Task(texts, packed_rows(texts, limit))


def packed_rows(texts: Sequence[Text], limit: int) -> list[list[int]]:
    """Texts in a random order, the next ones as long as they fit."""
    order = [i for i, (ids, _) in enumerate(texts) if len(ids) <= limit]
    random.Random(0).shuffle(order)
    rows: list[list[int]] = [[]]
    room = limit
    for i in order:
        if len(texts[i][0]) > room:
            rows.append([])
            room = limit
        rows[-1].append(i)
        room -= len(texts[i][0])
    return rows


def padded(texts: Sequence[Text], device: torch.device) -> dict[str, Tensor]:
    """A padded batch with the labels of the answers."""
    longest = max(len(ids) for ids, _ in texts)
    short = [longest - len(ids) for ids, _ in texts]
    rows = [
        ([*ids, *[0] * n], [1] * len(ids) + [0] * n, [-100] * before + [*ids[before:]] + [-100] * n)
        for (ids, before), n in zip(texts, short, strict=True)
    ]
    names = ("input_ids", "attention_mask", "labels")
    columns = zip(*rows, strict=True)
    return {
        name: torch.tensor(values, device=device)
        for name, values in zip(names, columns, strict=True)
    }


class MasterAdamW:
    """AdamW on fp32 copies of 16-bit weights; norms and biases do not decay."""

    def __init__(self, tensors: Sequence[nn.Parameter], rate: float) -> None:
        self._pairs = [
            (t, t if t.dtype == torch.float32 else nn.Parameter(t.detach().float()))
            for t in tensors
        ]
        held = [h for _, h in self._pairs]
        groups = [
            {"params": [h for h in held if h.ndim > 1], "weight_decay": _WEIGHT_DECAY},
            {"params": [h for h in held if h.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=rate)

    @torch.no_grad()
    def step(self) -> None:
        """Update, and drop the gradients."""
        for tensor, held in self._pairs:
            if held is not tensor and tensor.grad is not None:
                held.grad, tensor.grad = tensor.grad.float(), None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for tensor, held in self._pairs:
            if held is not tensor:
                tensor.copy_(held)


def peer_losses(
    subject: Subject, task: Task, method: str, steps: int, attention: str
) -> list[float]:
    """Losses of transformers' model, with PEFT's adapters or all of it trained."""
    model = subject.causal_lm()
    model.set_attn_implementation(attention)
    if method == "full":
        model.requires_grad_(True)
    else:
        model = add_lora(model, CASES["lora_all"], torch.float32)
    model.train()
    optimizer = MasterAdamW([p for p in model.parameters() if p.requires_grad], RATES[method])
    losses = []
    for step in range(steps):
        batch = padded([task.texts[i] for i in task.rows[step % len(task.rows)]], subject.device)
        loss = model(**batch, use_cache=False).loss
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def engine_losses(subject: Subject, task: Task, method: str, steps: int) -> list[float]:
    """Losses of the engine's own step."""
    from bench.train_engine import InTurns, load_for_training, sft_config
    from tli_engine.data.examples import Example
    from tli_engine.train.sft_step import SftStep

    train = {"learning_rate": RATES[method], "weight_decay": _WEIGHT_DECAY, "batch_size": 1}
    config = sft_config(subject, method, "all", sft={"context": ROW_TOKENS}, train=train)
    model, tensors = load_for_training(subject, config)
    examples = [Example(ids, prompt) for ids, prompt in task.texts]
    order = InTurns([[row] for row in task.rows])
    engine = SftStep(model, tensors, examples, order, config, None)
    model.train()
    return [engine.run(step).loss for step in range(steps)]


def curves(subject: Subject, task: Task, method: str, steps: int) -> dict[str, list[float]]:
    """Losses by provider, each with the memory of the one before it free again."""
    found = {}
    for name in PROVIDERS:
        found[name] = curve(subject, task, method, steps, name)
        gc.collect()
        print(f"{method:5} {name:20} {found[name][0]:.4f} to {found[name][-1]:.4f}", flush=True)
    return found


def curve(subject: Subject, task: Task, method: str, steps: int, provider: str) -> list[float]:
    """Losses of one of :data:`PROVIDERS`."""
    if provider == "tli-engine":
        return engine_losses(subject, task, method, steps)
    attention = "eager" if provider.endswith(":eager") else "sdpa"
    if provider == TRUTH:
        subject = replace(subject, dtype=torch.float32)
    return peer_losses(subject, task, method, steps, attention)


def curves_side_by_side(
    methods: Sequence[str], steps: int, jobs: int
) -> dict[str, dict[str, list[float]]]:
    """Losses by method and provider, each in a process of its own: launching takes most of their time."""
    wanted = [(method, name) for method in methods for name in PROVIDERS]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        runs = {key: pool.submit(own_curve, *key, steps) for key in wanted}
        return {method: {n: runs[method, n].result() for n in PROVIDERS} for method in methods}


def own_curve(method: str, provider: str, steps: int) -> list[float]:
    """One curve, its model loaded for it."""
    subject = the_subject()
    return curve(subject, translations(subject), method, steps, provider)


def distances(found: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """How far each curve is from that in fp32, nats: of the first step, in the mean, at most."""
    base = found[TRUTH]
    result = {}
    for name, losses in found.items():
        if name != TRUTH:
            apart = [abs(a - b) for a, b in zip(losses, base, strict=True)]
            result[name] = {
                "first": apart[0],
                "mean": statistics.mean(apart),
                "most": max(apart),
                # of the two halves: whether curves drift apart
                "mean_of_second_half": statistics.mean(apart[len(apart) // 2 :]),
            }
    return result


def plot(by_method: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw the losses, and below them the distances to those in fp32."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        2, len(by_method), figsize=(5.5 * len(by_method), 6), layout="constrained",
        squeeze=False, sharex=True, height_ratios=(2, 1),
    )  # fmt: skip
    for (above, below), (method, found) in zip(grid.T, by_method.items(), strict=True):
        base = found[TRUTH]
        for name, losses in found.items():
            above.plot(losses, color=_COLOURS[name], lw=1, label=name)
            if name != TRUTH:
                apart = [max(abs(a - b), 1e-7) for a, b in zip(losses, base, strict=True)]
                below.plot(apart, color=_COLOURS[name], lw=0.8)
        above.set(title=method, ylabel="loss, nats a label", ylim=0)
        below.set(xlabel="step", ylabel="apart from fp32", yscale="log")
        above.legend(frameon=False)
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def the_subject() -> Subject:
    """SmolLM2 in the dtype that it is trained in here."""
    subject = find("smollm2-135m", choose_device("auto"))
    dtype = torch.bfloat16 if subject.device.type == "cuda" else torch.float32
    return replace(subject, dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--jobs", type=int, default=1, help="curves side by side")
    args = parser.parse_args()
    subject = the_subject()
    task = translations(subject)
    together = curves_side_by_side(args.methods, args.steps, args.jobs) if args.jobs > 1 else {}
    found: dict[str, Any] = {}
    for method in args.methods:
        found[method] = together.get(method) or curves(subject, task, method, args.steps)
        apart = {method: distances(of) for method, of in found.items()}
        means = {name: of["mean"] for name, of in apart[method].items()}
        print(
            f"{method:5} in the mean from fp32: "
            + ", ".join(f"{name} {mean:.1e}" for name, mean in means.items())
        )
        facts = {"steps": args.steps, "batches": len(task.rows), "apart": apart, "losses": found}
        path = write_results("sft_losses", [], PEERS, **facts)
        plot(found, path.with_suffix(".png"))
    print(f"written: {path} and its picture")


if __name__ == "__main__":
    main()
