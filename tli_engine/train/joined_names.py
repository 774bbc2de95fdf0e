"""Names of layers that share an input: one tensor on a GPU's fused blocks, several in modules."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def parts_of(name: str) -> list[str]:
    """Names of the tensors whose rows a joined one holds, in order; itself if it is not joined.

    ``layers.0.mlp.gate_proj+up_proj.weight`` holds ``layers.0.mlp.gate_proj.weight``, then that of
    ``up_proj``.
    """
    words = name.split(".")
    at = next((i for i, word in enumerate(words) if "+" in word), None)
    if at is None:
        return [name]
    return [".".join([*words[:at], layer, *words[at + 1 :]]) for layer in words[at].split("+")]


def joined_keys(keys: Iterable[str]) -> dict[str, list[str]]:
    """Joined tensors, and statistics of such, among ``keys``, with the keys of their parts."""
    found = {}
    for key in keys:
        name, slash, statistic = key.partition("/")
        if len(parts := parts_of(name)) > 1:
            found[key] = [part + slash + statistic for part in parts]
    return found


def join_parts(found: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by the names that are wanted.

    Args:
        found: Tensors, or statistics as ``<tensor>/<statistic>``, by modules' names or joined ones.
        wanted: Names of tensors. A joined one that is not there is made of its parts.
    """
    result = dict(found)
    statistics = {key.partition("/")[2] for key in found}
    for name in wanted:
        parts = parts_of(name)
        for statistic in statistics if len(parts) > 1 else ():
            ending = f"/{statistic}" if statistic else ""
            keys = [part + ending for part in parts]
            if name + ending in found or not all(key in found for key in keys):
                continue
            tensors = [result.pop(key) for key in keys]
            # a count of steps is the same for all
            result[name + ending] = torch.cat(tensors) if tensors[0].ndim else tensors[0]
    return result
