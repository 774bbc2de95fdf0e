"""Texts continued by a causal model, many at a time: greedily, by beams, or by sampling."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tli_engine.models.beams import beam_search
from tli_engine.models.causal import CausalModel, without_dropout
from tli_engine.models.decoder import Decoder, waits_for_lengths

# fp32 has no lower number of full precision
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class GenerateOptions:
    """How texts are continued.

    Attributes:
        max_new_tokens: Of each text, the end included.
        eos_token_ids: Tokens that end a text, and are no part of it; the first fills up those that have
            ended.
        batch_size: Texts at a time; longest prompts come first. A model whose rotary embeddings follow
            the longest text (``dynamic``, ``longrope``) continues one at a time.
        beams: Above 1, the continuation of the highest mean log-probability is searched among so many
            open ones a text, each a row of the batch; as transformers' ``num_beams``.
        temperature: 0 takes the likeliest token; else tokens are drawn, 1 from the model's own
            distribution.
        top_p: Draw among the likeliest tokens that together have this probability.
        seed: Of what is drawn; a text's draws depend on no other text of its batch.
        cuda_graph: On a GPU, replay a step as a CUDA graph.

    Raises:
        ValueError: A value is out of range.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    batch_size: int = 8
    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        if not self.eos_token_ids:
            raise ValueError("eos_token_ids must name a token at least")
        for name in ("max_new_tokens", "batch_size", "beams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        # NaN is neither
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0, 1 at most, got {self.top_p}")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beams and temperature exclude each other: beams draw nothing")


@dataclass(frozen=True)
class Generated:
    """What continues a prompt.

    Attributes:
        tokens: Token ids, without the end.
        score: Sum of the tokens' log-probabilities in the model's own distribution, the end's included.
        ended: Whether the end came within the tokens that were allowed.
    """

    tokens: tuple[int, ...]
    score: float
    ended: bool


def generate(
    model: CausalModel,
    prompts: Sequence[tuple[int, ...]],
    options: GenerateOptions,
    advance: Callable[[int, str], None] = lambda texts, note: None,
    decoder: Decoder | None = None,
) -> list[Generated]:
    """Continue each prompt up to its end, seeing nothing of the others.

    Args:
        model: Whole, its blocks fused or not; adapters that are on take part. Dropout does not.
        prompts: Token ids as the model is to see them, a first token such as ``<s>`` included.
        options: How.
        advance: Called after each batch with the number of its texts, and the speed so far, a note.
        decoder: Of an earlier call with this model, whose memory and graphs are used again; by
            default a new one.

    Returns:
        One continuation a prompt, in the order of the prompts.

    Raises:
        ValueError: A prompt has no tokens.
    """
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} has no tokens")
    # the first batch takes the memory, which is enough for all others
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    decoder = decoder or Decoder(model, cuda_graph=options.cuda_graph)
    found: dict[int, Generated] = {}
    generator = torch.Generator().manual_seed(options.seed)
    size = (len(prompts), options.max_new_tokens)
    draws = torch.rand(size, generator=generator, dtype=torch.float64)
    tokens, start = 0, time.perf_counter()
    at_once = 1 if waits_for_lengths(model) else options.batch_size
    with without_dropout(model):
        for first in range(0, len(order), at_once):
            numbers = order[first : first + at_once]
            batch = _continue(decoder, [prompts[i] for i in numbers], draws[numbers], options)
            found |= dict(zip(numbers, batch, strict=True))
            tokens += sum(len(text.tokens) + text.ended for text in batch)
            advance(len(batch), f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")
    return [found[i] for i in range(len(prompts))]


def _continue(
    decoder: Decoder,
    prompts: Sequence[tuple[int, ...]],
    draws: Tensor,
    options: GenerateOptions,
) -> list[Generated]:
    """Continue a batch of prompts; each has its own ``draws``, ``[prompts, max_new_tokens]``."""
    if options.beams > 1:
        tokens, scores = beam_search(
            decoder,
            prompts,
            beams=options.beams,
            new_tokens=options.max_new_tokens,
            eos_token_ids=options.eos_token_ids,
            look_every=decoder.look_every,
        )
    else:
        tokens, scores = _continue_one_each(decoder, prompts, draws, options)
    return [
        _generated(row, score, options.eos_token_ids)
        for row, score in zip(tokens.tolist(), scores.tolist(), strict=True)
    ]


def _continue_one_each(
    decoder: Decoder,
    prompts: Sequence[tuple[int, ...]],
    draws: Tensor,
    options: GenerateOptions,
) -> tuple[Tensor, Tensor]:
    """Choose a token of each text at a time; return them, the end repeated, and their scores."""
    logits = decoder.begin(prompts, options.max_new_tokens)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=logits.device)
    scores = torch.zeros(len(prompts), device=logits.device)
    draws = draws.to(logits.device)
    eos_token_ids = torch.tensor(options.eos_token_ids, device=logits.device)
    steps: list[Tensor] = []
    for step in range(options.max_new_tokens):
        tokens = choose(logits, options.temperature, options.top_p, draws[:, step])
        chosen = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        scores += chosen.masked_fill(ended, 0)
        tokens = tokens.masked_fill(ended, options.eos_token_ids[0])
        ended |= torch.isin(tokens, eos_token_ids)
        steps.append(tokens)
        last = step + 1 == options.max_new_tokens
        if last or ((step + 1) % decoder.look_every == 0 and ended.all()):
            break
        logits = decoder.step(tokens)
    return torch.stack(steps, 1), scores


def choose(logits: Tensor, temperature: float, top_p: float, draws: Tensor) -> Tensor:
    """Choose the next token of each row.

    Args:
        logits: ``[rows, V]``, fp32.
        temperature: 0 takes the likeliest.
        top_p: Choose among the likeliest that together have this probability.
        draws: Where in the distribution to choose, ``[rows]``, in [0, 1).

    Returns:
        Tokens, ``[rows]``, int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # however low it is, the likeliest is at 0
    apart = (logits - logits.amax(-1, keepdim=True)) / max(temperature, _TINY)
    likeliest, tokens = apart.softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = likeliest.double().cumsum(-1)
    # the first of all is kept always
    kept = (total - likeliest < top_p).sum(-1, keepdim=True)
    mass = total.gather(-1, kept - 1)
    place = torch.searchsorted(total, draws[:, None] * mass, right=True).minimum(kept - 1)
    chosen: Tensor = tokens.gather(-1, place)[:, 0]
    return chosen


def _generated(tokens: list[int], score: float, eos_token_ids: tuple[int, ...]) -> Generated:
    until = next((i for i, token in enumerate(tokens) if token in eos_token_ids), None)
    return Generated(tuple(tokens[:until]), score, until is not None)
