"""The published TLI procedure, rewritten from its description with transformers and PEFT.

Works on any causal LM of transformers. A batch goes through every block and the LM head, padded,
once for each language, to read one of the hidden states; adapters are on every block, and the
optimizer is given all parameters. The scan and the evaluation run one word at a time: the scan
anew for every layer, pooling with the first token; the evaluation with the base model and the
adapted one, without special tokens.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tli_engine.data.words import Word

# what a tokenizer gives: input ids and attention mask, each of shape [B, T]
Tokens = Mapping[str, Tensor]


def padded(words: Sequence[Word]) -> Tokens:
    """A batch as a tokenizer gives it, padded on the right."""
    longest = max(len(word) for word in words)
    short = [longest - len(word) for word in words]
    ids = [[*word.input_ids, *[0] * n] for word, n in zip(words, short, strict=True)]
    mask = [[1] * len(word) + [0] * n for word, n in zip(words, short, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def add_adapters(model: Any, dropout: float = 0.05) -> Any:
    """LoRA on ``q_proj`` and ``v_proj`` of every block, in fp32, as PEFT makes it."""
    from peft import LoraConfig, TaskType, get_peft_model

    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj"],
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(model, lora)


def exit_early(model: Any, layer: int) -> None:
    """Cut a causal LM down to what ``hidden_states[layer]`` needs; the procedure stays the same."""
    decoder = model.model
    decoder.layers = decoder.layers[:layer]
    decoder.norm = model.lm_head = nn.Identity()
    model.config.num_hidden_layers = layer
    # there is nothing to generate
    model.config.use_cache = False


def embed(model: Any, tokens: Tokens, layer: int, without: Collection[int] = ()) -> Tensor:
    """Mean over the attended tokens of ``hidden_states[layer]``, ``[B, D]``.

    Args:
        model: A causal LM.
        tokens: A batch, on any device.
        layer: Index into ``hidden_states``.
        without: Token ids that do not count.
    """
    tokens = {name: tensor.to(model.device) for name, tensor in tokens.items()}
    hidden: Tensor = model(**tokens, output_hidden_states=True).hidden_states[layer]
    mask = tokens["attention_mask"]
    for token in without:
        mask = mask * (tokens["input_ids"] != token)
    weight = mask.unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def triplet_loss(anchor: Tensor, positive: Tensor, margin: float = 0.4) -> Tensor:
    """Mean loss of unit vectors, ``[N, D]``, against the hardest negative of the batch."""
    similarity = anchor @ positive.T
    hardest = similarity.clone().fill_diagonal_(-torch.inf).amax(1)
    return torch.relu(margin + hardest - similarity.diagonal()).mean()


class Training:
    """Steps of the published training.

    Args:
        model: A causal LM with adapters.
        total_steps: Length of the schedule.
        layer: Index into ``hidden_states``.
        learning_rate: Reached after the warm-up.
        warmup_steps: Steps from zero to it.
    """

    def __init__(
        self,
        model: Any,
        total_steps: int,
        layer: int = 2,
        learning_rate: float = 2e-4,
        warmup_steps: int = 50,
    ) -> None:
        from transformers import get_linear_schedule_with_warmup

        self.model, self.layer = model, layer
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, warmup_steps, total_steps)

    def step(self, anchor: Tokens, positive: Tokens) -> float:
        """Two forwards, backward and update; the batch's loss."""
        self.optimizer.zero_grad()
        anchors, positives = (
            nn.functional.normalize(embed(self.model, tokens, self.layer))
            for tokens in (anchor, positive)
        )
        loss = triplet_loss(anchors, positives)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


@torch.no_grad()
def scan_pair(model: Any, source: Tokens, target: Tokens, layers: Iterable[int]) -> list[float]:
    """Cosine of one pair at each layer; two forwards of the whole model for each."""
    return [_cosine(*(embed(model, side, k) for side in (source, target))) for k in layers]


@torch.no_grad()
def evaluate_pair(
    base: Any, adapted: Any, source: Tokens, target: Tokens, layer: int, special: Collection[int]
) -> tuple[float, float]:
    """Cosine of one pair before and after training; four forwards of the whole model."""
    before, after = (
        _cosine(*(embed(model, side, layer, special) for side in (source, target)))
        for model in (base, adapted)
    )
    return before, after


def _cosine(a: Tensor, b: Tensor) -> float:
    return nn.functional.cosine_similarity(a, b).item()
