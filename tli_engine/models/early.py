"""The early blocks of a decoder: embeddings and blocks ``0 … k-1``, enough for ``hidden_states[k]``."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from tli_engine.data.words import Pack
from tli_engine.errors import UserError
from tli_engine.models import packed_attention
from tli_engine.models.files import ModelFiles


class EarlyModel(nn.Module):
    """Embeddings and the first ``depth`` blocks of a decoder, run on packs of words.

    Attributes:
        config: The whole model's configuration.
        depth: Number of blocks built; ``hidden_states[0 … depth]`` can be had.
    """

    def __init__(self, config: Any, depth: int) -> None:
        super().__init__()
        self.config = config
        self.depth = depth
        truncated = copy.deepcopy(config)
        truncated.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            truncated.layer_types = config.layer_types[:depth]
        truncated._attn_implementation = packed_attention.NAME
        with _parameters_on_meta():
            self.decoder = AutoModel.from_config(truncated)
        if depth < config.num_hidden_layers:
            # the model's final norm belongs to the last block alone
            del self.decoder.norm
        self.requires_grad_(False)
        self.train(False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks that were built."""
        blocks: nn.ModuleList = self.decoder.layers
        return blocks

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.decoder.embed_tokens.weight.device
        return device

    def hidden_states(self, pack: Pack) -> Iterator[tuple[int, Tensor]]:
        """Run a pack upwards, one block a step.

        Args:
            pack: Words on the model's device.

        Yields:
            ``(k, hidden_states[k])`` for k = 0 … depth; hidden states are ``[T, D]``. As in
            transformers, 0 is the embeddings, k the output of block k-1, and the last of the
            whole model is taken after its final norm.
        """
        self._check_window(pack)
        hidden = self.decoder.embed_tokens(pack.input_ids[None])
        positions = pack.position_ids[None]
        yield 0, hidden[0]
        for k, block in enumerate(self.blocks, 1):
            hidden = block(
                hidden,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=self._rotary(k - 1, hidden, positions),
                pack=pack,
            )
            last = k == self.config.num_hidden_layers
            yield k, (self.decoder.norm(hidden) if last else hidden)[0]

    def forward(self, pack: Pack, layer: int) -> Tensor:
        """Return ``hidden_states[layer]``, ``[T, D]``; blocks above it do not run."""
        return next(hidden for k, hidden in self.hidden_states(pack) if k == layer)

    def _rotary(self, block: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        by_type = (
            (self.config.layer_types[block],) if self.config.model_type == "gemma3_text" else ()
        )
        cos_sin: tuple[Tensor, Tensor] = self.decoder.rotary_emb(hidden, positions, *by_type)
        return cos_sin

    def _check_window(self, pack: Pack) -> None:
        window = getattr(self.config, "sliding_window", None)
        if window is not None and pack.longest > window:
            raise UserError(
                f"a word of {pack.longest} tokens is longer than this model's attention window of "
                f"{window}; remove it"
            )

    def base_digest(self) -> str:
        """SHA-256 over the frozen weights, adapters left out."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if ".lora_" not in name:
                digest.update(name.replace(".base_layer.", ".").encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules without memory for their parameters; buffers stay real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_early(
    files: ModelFiles, depth: int, *, dtype: torch.dtype, device: torch.device
) -> EarlyModel:
    """Read the embeddings and the first ``depth`` blocks, one tensor at a time, and nothing else.

    Raises:
        UserError: The model has fewer blocks, a tensor is missing, has another shape, or holds
            values that are not finite.
    """
    total = files.config.num_hidden_layers
    if not 0 <= depth <= total:
        raise UserError(f"{files.name}: hidden_states[{depth}] does not exist; it has 0 … {total}")
    model = EarlyModel(files.config, depth)
    for name, parameter in list(model.decoder.named_parameters()):
        if name not in files.source:
            raise UserError(f"{files.name}: has no tensor {name}; is the download complete?")
        tensor = files.source.read(name)
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{files.name}: {name} is {list(tensor.shape)}, its config says "
                f"{list(parameter.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{files.name}: {name} holds NaN or inf; the weights are damaged")
        module, _, leaf = name.rpartition(".")
        loaded = nn.Parameter(tensor.to(device=device, dtype=dtype), requires_grad=False)
        setattr(model.decoder.get_submodule(module), leaf, loaded)
    return model.to(device)
