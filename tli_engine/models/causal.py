"""A whole causal language model: all blocks and the output layer, its loss on packed documents."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tli_engine.config import Numerics, Quantize, Residency
from tli_engine.data.words import Pack
from tli_engine.errors import UserError
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles
from tli_engine.models.linear_cross_entropy import linear_cross_entropy
from tli_engine.models.tensor_reader import TensorReader
from tli_engine.nn import NF4Linear

_HEAD = "lm_head.weight"


class Texts(Protocol):
    """Packed documents, and which of their tokens are to be predicted."""

    @property
    def words(self) -> Pack:
        """The documents, each a word of the pack."""

    @property
    def predicting(self) -> Tensor:
        """Positions whose next token is predicted, ``[L]``, int64."""

    @property
    def targets(self) -> Tensor:
        """Those tokens, ``[L]``, int64."""


class CausalModel(nn.Module):
    """An :class:`EarlyModel` of all blocks, and the output embeddings.

    Attributes:
        early: The decoder.
        lm_head: Output embeddings, ``[V, D]``; None where they are the input's.
    """

    lm_head: nn.Parameter | None

    def __init__(self, early: EarlyModel, lm_head: nn.Parameter | None) -> None:
        super().__init__()
        self.early = early
        self.register_parameter("lm_head", lm_head)
        self.train(False)

    @property
    def head(self) -> nn.Parameter:
        """Output embeddings, ``[V, D]``."""
        tied: nn.Parameter = self.early.decoder.embed_tokens.weight
        return tied if self.lm_head is None else self.lm_head

    def loss(self, texts: Texts) -> Tensor:
        """Sum of the cross-entropies of the targets, a scalar in fp32; 0 without targets.

        Documents see nothing of one another. Dropout masks come from torch's generator of the device.

        Args:
            texts: Packed documents, on the model's device.
        """
        hidden = self.hidden_states(texts.words, texts.predicting)
        softcap = getattr(self.early.config, "final_logit_softcapping", None)
        return linear_cross_entropy(hidden, self.head, texts.targets, softcap=softcap)

    def hidden_states(self, pack: Pack, rows: Tensor | None = None) -> Tensor:
        """What the output layer reads, ``[T, D]``, or of some ``rows`` alone, ``[L, D]``."""
        early = self.early
        hidden = early.embed(pack, documents=True)
        rotary = early.rotary(pack)
        for block in range(early.depth):
            hidden = early.run_block(block, hidden, pack, rotary)
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        return early.read_out(early.depth, hidden)

    def train_all(self) -> None:
        """Let gradients reach every weight: full fine-tuning.

        Raises:
            UserError: Some weights are held in NF4.
        """
        if any(isinstance(module, NF4Linear) for module in self.modules()):
            raise UserError(
                "method: full trains every weight, but this model's are held in NF4; "
                "use quantize: none with a model that is not quantised, or method: lora"
            )
        for parameter in self.parameters():
            if parameter.device.type == "cpu":
                # what is read from a file may be its mapped memory, which others read too
                parameter.data = parameter.data.clone()
        self.requires_grad_(True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The tensors that gradients reach, by name: adapters, or after :meth:`train_all` all."""
        return {n: p for n, p in self._named() if p.requires_grad}

    def weights(self) -> dict[str, nn.Parameter]:
        """Every weight by transformers' name within the decoder, and ``lm_head.weight`` if untied."""
        return dict(self._named())

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        named = list(self.early.decoder.named_parameters())
        return named if self.lm_head is None else [*named, (_HEAD, self.lm_head)]


def load_causal(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = "auto",
    double_quant: bool = False,
    numerics: Numerics = "exact",
    weight_residency: Residency = "nf4",
) -> CausalModel:
    """Read a whole model, one tensor at a time; options as :func:`tli_engine.models.early.load_early`.

    Raises:
        UserError: A tensor is missing, has another shape, or holds values that are not finite.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "quantize": quantize,
        "double_quant": double_quant,
        "numerics": numerics,
        "weight_residency": weight_residency,
    }
    early = load_early(files, files.config.num_hidden_layers, **options)
    head = None
    if not files.config.tie_word_embeddings:
        embeddings: Tensor = early.decoder.embed_tokens.weight
        head = TensorReader(files, **options).parameter(_HEAD, embeddings)
    return CausalModel(early, head)
