"""What a run will take, said before it: downloads, disk, memory of host and GPU, time of a step."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from tli_engine.config import RunConfig
from tli_engine.data.examples import ExampleTokenizer
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import read_run_pairs, tokenize_splits, tokens_of
from tli_engine.data.texts import has_articles
from tli_engine.errors import UserError
from tli_engine.models.survey import Survey
from tli_engine.train.checks import uncut
from tli_engine.train.pack_graphs import launched_one_by_one
from tli_engine.train.plan_devices import GIB, Target
from tli_engine.train.plan_outline import Outline, outline
from tli_engine.train.plan_peak import (
    CONTEXT,
    Moment,
    Step,
    fits,
    moments_of_pairs,
    optimizer_bytes,
    room_on,
    step_of_words,
)
from tli_engine.train.step_times import measured_seconds

# resident bytes of Python with torch and transformers imported, and with CUDA; measured roughly
_PROCESS, _PROCESS_CUDA = 700 * 2**20, 2 * GIB
# tokens of a word and what the tokenizer puts before it, where the tokenizer is not here
_TOKENS_OF_A_WORD = 5
_MOST_NEEDED = 0.8
# of notes that one GPU's plan has, and that of several has otherwise
RUN_AGAIN, REPLAYED = "blocks are run again on the way back", "steps are replayed from CUDA graphs"


@dataclass(frozen=True)
class Plan:
    """What a run takes, in bytes by component; see ``tli-engine plan --json``.

    Attributes:
        download_bytes: Of the model's files that are not here.
        disk_bytes: Of these, what is made of them, and the run folder.
        host_bytes: The host's memory at its fullest.
        gpu_bytes: The GPU's at the fullest moment of a step; empty on a CPU.
        step_seconds: Of a step; None where nothing was measured.
        notes: What the figures rest on, and whether they fit.
        recomputed: Blocks that are run again on the way back.
        gpus: That share the run; ``gpu_bytes`` are those of each.
    """

    download_bytes: int
    disk_bytes: int
    host_bytes: dict[str, int]
    gpu_bytes: dict[str, int]
    step_seconds: float | None
    notes: list[str]
    recomputed: int = 0
    gpus: int = 1

    def to_json(self) -> dict[str, Any]:
        """With the totals."""
        totals = {"host": sum(self.host_bytes.values()), "gpu": sum(self.gpu_bytes.values())}
        return asdict(self) | {"total_bytes": totals}


@dataclass(frozen=True)
class _Words:
    """Of the pairs of a run: tokens of a batch, rows of embeddings, pairs of a batch."""

    tokens: int
    rows: int
    pairs: int


def make_plan(run: RunConfig, model: Survey, target: Target, gpus: int = 1) -> Plan:
    """Plan a run; nothing is downloaded but what ``model`` has, and no GPU is needed.

    Args:
        run: The run, as one GPU sees it.
        model: What it starts from.
        target: Where it is planned to be.
        gpus: That share it.

    Raises:
        UserError: What training refuses before it reads articles and weights, or the pairs cannot be
            read.
    """
    notes: list[str] = []
    made = outline(run, model, target, gpus)
    tokenizer = model.tokenizer()
    if run.objective != "align" and tokenizer is not None:
        # what it cannot do it refuses
        ExampleTokenizer(tokenizer, run.prompt, run.sft.context)
    words = None if run.objective == "sft" else _words(run, model, tokenizer, notes)
    held = _held(made, words)
    states, paged = optimizer_bytes(made)
    held["optimizer"] = states
    persistent = sum(held.values())
    moments: list[Moment] = []
    if run.objective == "align" and words is not None:
        step = step_of_words(made, words.tokens, persistent, states)
    else:
        notes.append("every row is taken to be full, and every token of it a label: an upper bound")
        step = Step(made, run.train.batch_size * run.sft.context, persistent, states)
        if words is not None:
            # each GPU compares all pairs, of words that are shared out
            moments += moments_of_pairs(made, -(-words.tokens // gpus), words.pairs)
    moment = max([step.peak(), *moments], key=lambda moment: moment.total)
    parts = held | asdict(moment)
    host = _host(made, model, states, paged)
    gpu: dict[str, int] = {}
    if made.on_gpu:
        gpu = {name: size for name, size in parts.items() if size} | {"cuda_context": CONTEXT}
    else:
        host = host | {name: size for name, size in parts.items() if size}
    download, exact = model.missing(made.tensor_names())
    if not exact:
        notes.append("sizes of files that the Hub did not tell are taken from the configuration")
    disk = download + model.converted + _run_folder(made)
    seconds = measured_seconds(made, step.tokens, step.recomputed)
    _add_notes(notes, made, step, sum(gpu.values()), seconds)
    return Plan(download, disk, host, gpu, seconds, notes, step.recomputed)


def _held(made: Outline, words: _Words | None) -> dict[str, int]:
    """Bytes that are held all the time, the optimizer's left out."""
    run = made.run
    # the whole model has all rows
    rows = None if words is None or made.causal is not None else words.rows
    resident = 0
    if made.nf4 and run.weight_residency == "bf16":
        resident = made.element * sum(n * k for n, k in made.linear.values())
    # the fused step has a table of its own of what blocks take
    copies = made.embedding_bytes(rows) if made.causal is None and made.fused else 0
    found = {
        "weights_nf4" if made.nf4 else "weights": made.linear_bytes(),
        "transposed_copies": made.transposed_bytes(),
        "resident_copies": resident,
        "norms_and_biases": made.other_bytes(),
        "embeddings": made.embedding_bytes(rows) + copies,
    }
    if run.method == "lora":
        found["adapters"] = sum(t.nbytes for t in made.trained.values())
    if words is not None and run.align.space == "whitened":
        # a matrix for either language, fp32
        found["loss_space"] = 8 * made.config.hidden_size**2
    return {name: size for name, size in found.items() if size}


def _words(run: RunConfig, model: Survey, tokenizer: Any, notes: list[str]) -> _Words:
    pairs: dict[str, PairList] = read_run_pairs(run.data)
    count = len(pairs["train"])
    wanted = run.train.batch_size if run.objective == "align" else run.sft.align_pairs
    size = min(wanted, count)
    if tokenizer is None:
        notes.append(f"no tokenizer is here: words are taken to be {_TOKENS_OF_A_WORD} tokens long")
        distinct = sum(len(p) for p in pairs.values()) * 2 * (_TOKENS_OF_A_WORD - 1)
        rows = min(model.config.vocab_size, int(_MOST_NEEDED * distinct))
        return _Words(2 * size * _TOKENS_OF_A_WORD, rows, size)
    splits = tokenize_splits(pairs, tokenizer, run.words)
    lengths = sorted(
        (len(s) + len(t) for s, t in zip(splits[0].source, splits[0].target, strict=True)),
        reverse=True,
    )
    mean = round(size * sum(lengths) / count)
    return _Words(mean, len(tokens_of(splits)), size)


def _host(made: Outline, model: Survey, states: int, paged: int) -> dict[str, int]:
    """Bytes of the host's memory, but for what a run on a CPU trains and keeps."""
    stored = model.stored_bytes
    matrices = [n * k for n, k in made.linear.values()]
    if made.causal is not None:
        matrices.append(made.config.vocab_size * made.config.hidden_size)
    # as it is stored, then in the dtype it is held in
    reading = max(matrices) * (stored + (0 if made.on_gpu else made.element))
    # adapters and statistics, copied before they are written
    checkpoint = states + sum(t.nbytes for t in made.trained.values())
    found = {
        "process": _PROCESS_CUDA if made.on_gpu else _PROCESS,
        # never at the same time
        "reading_or_checkpoint": max(reading, checkpoint + paged),
        "paged_optimizer": paged,
    }
    return {name: size for name, size in found.items() if size}


def _run_folder(made: Outline) -> int:
    """Bytes of checkpoints, one of them being written, and of the result."""
    trained = sum(t.nbytes for t in made.trained.values())
    states, paged = optimizer_bytes(made)
    checkpoints = (made.run.train.keep_checkpoints + 1) * (trained + states + paged)
    best = trained * (made.causal is not None and has_articles(made.run.data))
    return checkpoints + 2 * best + trained


def _add_notes(
    notes: list[str], made: Outline, step: Step, total: int, seconds: float | None
) -> None:
    run, target = made.run, made.target
    owner = "the engine's" if made.fused else "transformers'"
    notes.insert(
        0,
        f"{run.objective}, {run.method}: {made.early.depth} of {made.config.num_hidden_layers} "
        f"blocks, {made.trained_parameters:,} trained parameters, {step.tokens:,} tokens a batch, "
        f"{owner} blocks in "
        f"{str(made.dtype).removeprefix('torch.')}, on {target.name}",
    )
    if run.objective != "align":
        notes.append("the articles' own download and their tokens on disk are not counted")
    if step.uses_graphs:
        notes.append(
            f"{REPLAYED}, which keep the memory of a step's activations for themselves: what the "
            f"allocator holds is that much more than what is counted here"
        )
    if step.why_launched is not None:
        notes.append(launched_one_by_one(step.why_launched))
    notes += recomputation(made, step) + uncut(run, made.fused)
    if target.memory is not None:
        room = f"{room_on(target, total)} on {target.name}"
        if fits(target, total):
            notes.append(f"fits: {room}")
        else:
            notes.append(
                f"does not fit: {room}, of which a twentieth is left free{_remedies(made, step)}"
            )
        if made.nf4 and run.weight_residency == "auto":
            copies = made.element * sum(n * k for n, k in made.linear.values()) / GIB
            notes.append(
                f"weight_residency: auto takes up to {copies:.1f} GiB more for dense weights, while a "
                f"quarter of the memory stays free: not counted"
            )
        if target.hopper and made.nf4:
            notes.append("the CUDA extension is taken to be there (make cuda)")
        notes.append(
            "the CUDA context is an estimate; what the allocator keeps besides is not counted"
        )
    if seconds is None:
        notes.append("no step like this was measured: no time is given")


def _remedies(made: Outline, step: Step) -> str:
    """What would take less, of what a run has not chosen yet."""
    run, again = made.run, step.recomputed == made.early.depth - made.first_trained
    texts = run.objective != "align"
    found = ["a smaller train.batch_size"] * (run.train.batch_size > 1)
    found += ["a smaller sft.context"] * texts
    found += ["sft.activations: recompute"] * (texts and not again)
    found += ["method: lora"] * (run.method == "full")
    found += ["quantize: nf4"] * (run.method == "lora" and not made.nf4)
    listed = " or ".join(filter(None, (", ".join(found[:-1]), *found[-1:])))
    return f"; {listed}" if listed else ""


def recomputation(made: Outline, step: Step) -> list[str]:
    """A line on what is run again on the way back, if anything is."""
    if not step.recomputed:
        return []
    number = made.early.depth - made.first_trained
    line = f"{step.recomputed} of {number} {RUN_AGAIN}"
    some = step.recomputed_in_part
    return [f"{line}, {some} of them in part" if some else line]


def limited(target: Target, gib: float | None) -> Target:
    """A target of which the process takes so much.

    Raises:
        UserError: It is a CPU, or has less.
    """
    if gib is None:
        return target
    if target.memory is None:
        raise UserError("--memory goes with a GPU; name one with --device")
    # NaN is not less
    if not gib * GIB <= target.memory:
        whole = target.memory / GIB
        raise UserError(f"--memory {gib:g}: {target.name} has {whole:.1f} GiB")
    return replace(target, memory=int(gib * GIB), limited=True)
