"""Scripts of the published kind, unmodified: with plain Python and with ``tli-engine run``.

``bench/scripts`` has three: a layer scan that calls the model one word at a time for every layer, a
training whose loss is at ``hidden_states[2]``, and an evaluation pair by pair with a base and a merged
model. The model is a folder of random weights, in NF4, that both load; words are random letters. A
script times itself, from the first call of the model on: ``ms`` is that, ``notes`` have the whole
process's wall time and by how much the two ways' CSVs differ. Libraries set themselves up and graphs are
captured inside the time. Kernels of the engine are compiled before, in an untimed run on a few pairs and
a model of the same shape with three blocks; its seconds are in ``notes`` too. Results are written after
each run, so that none is lost to a time limit.

python -m bench drop_in [--model NAME] [--layers N] [--scripts scan train evaluate] [--keep]
    [--pairs N] [--train-pairs N] [--evaluate-pairs N] [--rounds N]
"""

import argparse
import csv
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.harness import RESULTS, Row, earlier_rows, print_rows, quantiles_ms, write_results
from bench.models import RANDOM, Subject, config_of, random_subject
from tli_engine.models.device import choose_device
from tli_engine.testing import byte_tokenizer, tiny_config

PEERS = ["transformers", "peft", "bitsandbytes"]
SCRIPTS = RESULTS.parent / "scripts"
WAYS = {
    "transformers+bitsandbytes": [],
    "tli-engine": ["-m", "tli_engine", "run"],
}
# pairs of the engine's first, untimed run of each script, of training four steps; and the model's blocks
_FEW_LAYERS = 3
FEW = {"scan": 1, "train": 32, "evaluate": 2}
# a cosine or a loss may differ by as much where only rounding differs
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """A script, the arguments before its output file and after it, and how many pairs it takes."""

    script: str
    before: Sequence[str]
    after: Sequence[str]
    pairs: int


@dataclass(frozen=True)
class Timing:
    """Seconds that a script gives for its work, and those of the process; numbers of its CSV."""

    seconds: float
    wall_s: float
    numbers: list[float]


def tiny_subject(layers: int, dtype: torch.dtype, nf4: bool) -> Subject:
    """A model small enough for a test, on a CPU."""
    config = tiny_config("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=layers)
    return random_subject("tiny", config, dtype, torch.device("cpu"), nf4)


def write_model(subject: Subject, folder: Path) -> None:
    """Write a model as transformers and bitsandbytes read it, and a tokenizer of bytes."""
    from transformers import BitsAndBytesConfig

    model = subject.causal_lm()
    if subject.nf4:
        model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=subject.dtype
        )
    model.config.dtype = subject.dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    # copies: layers share the table of NF4's values
    state = model.state_dict()
    tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in state.items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(folder)


def write_pairs(path: Path, pairs: int) -> None:
    """Write pairs of words of random letters, 2 to 7 each, the same at every call."""
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.choice("abcdefghijklmnoprstuvwyz") for _ in range(draw.randint(2, 7)))

    with path.open("w", newline="") as file:
        csv.writer(file).writerows((word(), word()) for _ in range(pairs))


def run_case(case: Case, way: Sequence[str], out: Path) -> Timing:
    """Run a script one way.

    Raises:
        SystemExit: It failed; what it printed is shown.
    """
    arguments = [*case.before, str(out), *case.after]
    command = [sys.executable, *way, str(SCRIPTS / case.script), *arguments]
    path = [str(SCRIPTS.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    wall_s = time.perf_counter() - start
    found = re.search(r"in ([\d.]+) s$", result.stdout, re.MULTILINE)
    if result.returncode or found is None:
        raise SystemExit(f"{case.script}: {result.stdout}{result.stderr}")
    return Timing(float(found[1]), wall_s, numbers(out))


def numbers(path: Path) -> list[float]:
    """Every number in a CSV below its first line."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [float(cell) for row in rows for cell in row if re.fullmatch(r"-?\d[\d.e-]*", cell)]


def bench_script(
    case: Case, few: Case, subject: Subject, layers: int, folder: Path, rounds: int
) -> Iterator[list[Row]]:
    """Time a script both ways, in turns; the rows so far after each run.

    Raises:
        SystemExit: Their results differ by more than rounding.
    """
    timings: dict[str, list[Timing]] = {way: [] for way in WAYS}
    out = folder / f"{Path(case.script).stem}.csv"
    first = run_case(few, WAYS["tli-engine"], out)
    notes = {"first_run_s": first.seconds, "first_run_pairs": few.pairs}
    for _ in range(rounds):
        for way, command in WAYS.items():
            timings[way].append(run_case(case, command, out))
            yield rows_of(case, timings, notes, subject, layers)


def rows_of(
    case: Case,
    timings: Mapping[str, Sequence[Timing]],
    first: Mapping[str, float],
    subject: Subject,
    layers: int,
) -> list[Row]:
    """A row for each way that was timed.

    Raises:
        SystemExit: Results differ by more than rounding.
    """
    timed = {way: runs for way, runs in timings.items() if runs}
    base, difference = timed["transformers+bitsandbytes"], 0.0
    for runs in timed.values():
        pairs = zip(base[0].numbers, runs[0].numbers, strict=True)
        difference = max(difference, *(abs(a - b) for a, b in pairs))
    if difference > _TOLERANCE[subject.dtype]:
        raise SystemExit(f"{case.script}: results differ by {difference:.2g}; not timed")
    base_ms = quantiles_ms([t.seconds for t in base])[0]
    rows = []
    for way, runs in timed.items():
        ms = quantiles_ms([t.seconds for t in runs])
        notes: dict[str, Any] = {
            "script": case.script,
            "wall_s": round(min(t.wall_s for t in runs), 2),
            "max_difference": difference,
            **({} if way == "transformers+bitsandbytes" else first),
        }
        shape = {"layers": layers, "pairs": case.pairs}
        provider = way if subject.nf4 else way.removesuffix("+bitsandbytes")
        label = label_of(subject, case)
        rows.append(Row("script", shape, label, provider, *ms, base_ms / ms[0], notes=notes))
    return rows


def label_of(subject: Subject, case: Case) -> str:
    """What the rows of a script on a model are called."""
    return f"{subject.label}: {Path(case.script).stem}"


def cases(folder: Path, pairs: Mapping[str, int]) -> dict[str, Case]:
    """The three scripts on the model in ``folder``, each on so many pairs.

    The second writes what the third reads.
    """
    model, adapter = str(folder / "model"), str(folder / "adapter")
    files = {}
    for name, count in pairs.items():
        path = folder / f"{name}-{count}-pairs.csv"
        write_pairs(path, count)
        files[name] = str(path)
    scan, train, evaluate = (files[name] for name in FEW)
    return {
        "scan": Case("scan_layers.py", [model, scan], [], pairs["scan"]),
        "train": Case("train_early.py", [model, train], [adapter, "1"], pairs["train"]),
        "evaluate": Case("evaluate_pairs.py", [model, adapter, evaluate], [], pairs["evaluate"]),
    }


def bench_scripts(args: argparse.Namespace, subject: Subject, folder: Path) -> None:
    """Time the chosen scripts, and write the results as they come."""
    few = cases(folder / "few", FEW)
    counts = {"scan": args.pairs, "train": args.train_pairs, "evaluate": args.evaluate_pairs}
    chosen = {name: case for name, case in cases(folder, counts).items() if name in args.scripts}
    labels = {label_of(subject, case) for case in chosen.values()}
    done = [r for r in earlier_rows("drop_in") if r.model not in labels] if args.keep else []
    if "evaluate" in chosen and "train" not in chosen:
        # the adapters that it reads
        for where, model in ((folder, cases(folder, FEW)), (folder / "few", few)):
            run_case(model["train"], WAYS["tli-engine"], where / "train.csv")
    for name, case in chosen.items():
        rows: list[Row] = []
        for rows in bench_script(case, few[name], subject, args.layers, folder, args.rounds):
            print_rows(rows[-1:])
            print(f"written: {write_results('drop_in', [*done, *rows], PEERS)}", flush=True)
        done += rows


def arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [*RANDOM, "tiny"]
    parser.add_argument("--model", choices=names, default="llama-3-8b" if on_gpu else "tiny")
    parser.add_argument("--layers", type=int, default=32, help="blocks of the model")
    parser.add_argument("--scripts", nargs="+", choices=FEW, default=list(FEW))
    parser.add_argument("--keep", action="store_true", help="keep earlier rows of other scripts")
    parser.add_argument("--pairs", type=int, default=4, help="of the scan")
    parser.add_argument("--train-pairs", type=int, default=320, help="8 a step, one epoch")
    parser.add_argument("--evaluate-pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each script, each way")
    return parser.parse_args()


def subject_of(model: str, layers: int) -> Subject:
    """A model of random weights with so many blocks."""
    if model == "tiny":
        # bitsandbytes infers in bf16 on some CPUs, whatever dtype it is told
        return tiny_subject(layers, torch.float32, nf4=False)
    config = config_of(model)
    config.num_hidden_layers = layers
    return random_subject(model, config, torch.bfloat16, choose_device("auto"))


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = subject_of(args.model, min(args.layers, _FEW_LAYERS))
        write_model(few, folder / "few" / "model")
        subject = subject_of(args.model, args.layers)
        write_model(subject, folder / "model")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        bench_scripts(args, subject, folder)


if __name__ == "__main__":
    main()
