"""The work of ``tli-engine info``."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import torch

from tli_engine import backends, extension, ops
from tli_engine.models.builtin import cache_folder, names
from tli_engine.models.device import choose_device
from tli_engine.models.document_attention import attentions
from tli_engine.models.files import FAMILIES
from tli_engine.train.provenance import versions

# the joined form of word_attention runs its kernel; three ops are no part of what ops exports
_OPS = sorted(
    {op for op in ops.__all__ if hasattr(torch.ops.tli_engine, op)} - {"joined_word_attention"}
    | {"cached_attention", "cross_entropy_rows", "flat_adamw"}
)
_BLOCKS = (
    "on a CPU transformers' modules, on a GPU the engine's ops (train.engine): RMSNorm, RoPE, SwiGLU and "
    "cross-entropy by kernels of its own, none of Liger's"
)


def collect() -> dict[str, Any]:
    """Everything that ``info`` prints."""
    backends.choice()
    with _unwarned():
        devices, resolved = _devices(), {op: _backends(op) for op in _OPS}
    return {
        "versions": versions(),
        "devices": devices,
        "extension": extension.status(),
        "blocks": _BLOCKS,
        "attention": attentions(choose_device("auto")),
        "ops": resolved,
        "families": list(FAMILIES),
        "builtin_models": names(),
        "builtin_data": _builtin_data(),
        "cache": str(cache_folder()),
    }


@contextmanager
def _unwarned() -> Iterator[None]:
    """Keep a missing backend from being warned of op by op: it is among the facts."""
    log = logging.getLogger(backends.__name__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _builtin_data() -> list[str]:
    """Word pairs, then articles."""
    kinds = {"lexicons": ".csv", "summaries": ".jsonl"}
    folder = files("tli_engine") / "data"
    return [
        f"builtin:{file.name.removesuffix(suffix)}"
        for kind, suffix in kinds.items()
        for file in sorted((folder / kind).iterdir(), key=lambda file: file.name)
        if file.name.endswith(suffix)
    ]


def _devices() -> list[dict[str, Any]]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cpu = {"name": "cpu", "threads": torch.get_num_threads()}
    return [
        cpu,
        *(
            {
                "name": gpu.name,
                "memory_mib": gpu.total_memory // 2**20,
                "architecture": f"sm_{gpu.major}{gpu.minor}",
                "nf4_layers": _nf4_layers(torch.device("cuda", i)),
            }
            for i, gpu in enumerate(gpus)
        ),
    ]


def _nf4_layers(device: torch.device) -> str:
    """What multiplies by the NF4 layers of a model on that GPU."""
    try:
        if backends.has_extension(device):
            return "cuda"
        return backends.explain("nf4_linear")[0]
    except backends.BackendUnavailableError as e:
        return str(e)


def _backends(op: str) -> dict[str, Any]:
    try:
        gpu, reasons = backends.explain(op)
    except backends.BackendUnavailableError as e:
        return {"cpu": "reference", "gpu": None, "not": [str(e)]}
    return {"cpu": "reference", "gpu": gpu, "not": list(reasons)}


def print_info(facts: dict[str, Any]) -> None:
    """Print the facts for a person."""
    print("versions   " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    for device in facts["devices"]:
        print(
            "device     "
            + ", ".join(f"{v}" if k == "name" else f"{k} {v}" for k, v in device.items())
        )
    print(f"blocks     {facts['blocks']}")
    for name, status in facts["attention"].items():
        print(f"attention  {name}: {status}")
    print(f"extension  CUDA C++ for Hopper GPUs: {facts['extension']}")
    for line in _op_lines(facts):
        print(f"ops        {line}")
    print(f"families   {', '.join(facts['families'])}")
    print(f"built in   {facts['builtin_models']}; cached in {facts['cache']}")
    print(f"data       {', '.join(facts['builtin_data'])}")


def _op_lines(facts: dict[str, Any]) -> list[str]:
    """What runs the ops, those together that one sentence is true of."""
    if len(facts["devices"]) == 1:
        return [f"there is no GPU here, so the reference runs all: {', '.join(facts['ops'])}"]
    alike: dict[str, list[str]] = {}
    for op, backend in facts["ops"].items():
        why = f" ({'; '.join(backend['not'])})" if backend["not"] else ""
        gpu = backend["gpu"] or "nothing"
        alike.setdefault(f"{backend['cpu']} on a CPU, {gpu} on a GPU{why}", []).append(op)
    return [f"{how}: {', '.join(names)}" for how, names in alike.items()]
