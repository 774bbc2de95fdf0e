"""What the bench of generation runs: providers, prompts, the floor of a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bench.models import Subject, random_subject
from bench.train_cases import train_config
from tli_engine.models.causal import load_causal
from tli_engine.models.decoder import Decoder
from tli_engine.models.generate import GenerateOptions, generate

Prompts = Sequence[tuple[int, ...]]
# packed codes and a doubly quantised absmax for each 64
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Provider:
    """Who continues texts, and how.

    Attributes:
        name: In the results; what follows the colon is how, where it is not the usual.
        kind: Whose code it is; ``static`` is transformers' static cache and compiled step.
        nf4: Whether the blocks' linear layers are NF4, else bf16.
        numerics: Of the engine's NF4 products.
    """

    name: str
    kind: Literal["engine", "dynamic", "static"]
    nf4: bool
    numerics: Literal["exact", "fast"] = "exact"


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("transformers+bitsandbytes", "dynamic", True),
        Provider("tli-engine", "engine", True),
        Provider("tli-engine:fast", "engine", True, "fast"),
        Provider("transformers", "dynamic", False),
        Provider("transformers:static", "static", False),
        Provider("tli-engine:bf16", "engine", False),
    )
}
BASELINE = "transformers+bitsandbytes"


def jobs(providers: Sequence[str], batches: Sequence[int]) -> list[tuple[Provider, int]]:
    """Who is measured on how many texts, in order; what takes longest to compile comes last."""
    chosen = [PROVIDERS[name] for name in PROVIDERS if name in providers]
    found = [(p, batch) for p in chosen for batch in batches]
    return sorted(found, key=lambda job: job[0].kind == "static" and job[1] != batches[0])


@dataclass(frozen=True)
class Writer:
    """A provider's model, ready.

    Attributes:
        write: Continues prompts greedily by so many tokens each, all of them; returns them,
            ``[prompts, tokens]``, when the work is done.
        logits: What follows the first prompt, ``[V]``, fp32.
    """

    write: Callable[[Prompts, int], Any]
    logits: Callable[[Prompts], Tensor]


def generation_subject(
    name: str, layers: int | None, device: torch.device, provider: Provider
) -> Subject:
    """A model of random weights, cut to its first ``layers`` blocks; in fp32 on a CPU."""
    config = train_config(name)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    subject = random_subject(name, config, dtype, device, provider.nf4, provider.nf4)
    run = subject.config.model_copy(update={"numerics": provider.numerics})
    return replace(subject, config=run)


def random_prompts(config: Any, batch: int, length: int) -> list[tuple[int, ...]]:
    """Prompts of random tokens; the first ones are the same for every ``batch``."""
    generator = torch.Generator().manual_seed(0)
    most = min(config.vocab_size, config.eos_token_id or config.vocab_size)
    return [
        tuple(torch.randint(most, (length,), generator=generator).tolist()) for _ in range(batch)
    ]


def writer_of(subject: Subject, provider: Provider, most_tokens: int) -> Writer:
    """Build a provider's model; ``most_tokens`` is what a text grows to, its prompt included."""
    if provider.kind == "engine":
        return _engine_writer(subject)
    return _peer_writer(subject, most_tokens if provider.kind == "static" else None)


def _engine_writer(subject: Subject) -> Writer:
    config = subject.config
    model = load_causal(
        subject.files,
        dtype=subject.dtype,
        device=subject.device,
        quantize=config.quantize,
        numerics=config.numerics,
    )
    model.fuse()
    # of one batch size at a time: another's cache would count as its memory
    decoders: dict[int, Decoder] = {}
    # no token is the end: every text takes all of its tokens
    never = subject.files.config.vocab_size

    def write(prompts: Prompts, tokens: int) -> list[tuple[int, ...]]:
        options = GenerateOptions(tokens, (never,), batch_size=len(prompts))
        if len(prompts) not in decoders:
            decoders.clear()
            decoders[len(prompts)] = Decoder(model)
        found = generate(model, prompts, options, decoder=decoders[len(prompts)])
        return [text.tokens for text in found]

    def logits(prompts: Prompts) -> Tensor:
        return Decoder(model, cuda_graph=False).begin(prompts[:1], 1)[0]

    return Writer(write, logits)


def _peer_writer(subject: Subject, static: int | None) -> Writer:
    """What calls transformers' ``generate``; with ``static`` a cache of so many tokens, its step compiled."""
    from transformers import CompileConfig

    model = subject.causal_lm()
    if static is not None and subject.device.type == "cuda":
        # a second batch size is compiled anew, not for sizes of any kind
        model.generation_config.compile_config = CompileConfig(dynamic=False)
    # nothing ends a text, and nothing looks whether it has ended
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    caches: dict[int, Any] = {}

    @torch.no_grad()
    def write(prompts: Prompts, tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=subject.device)
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens}
        if static is not None:
            options["past_key_values"] = _cache(model, caches, len(prompts), static)
        mask = torch.ones_like(ids)
        found = model.generate(input_ids=ids, attention_mask=mask, **options)
        new: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return new

    @torch.no_grad()
    def logits(prompts: Prompts) -> Tensor:
        ids = torch.tensor(prompts[:1], device=subject.device)
        found: Tensor = model(input_ids=ids, logits_to_keep=1).logits
        return found[0, -1].float()

    return Writer(write, logits)


def _cache(model: Any, caches: dict[int, Any], batch: int, tokens: int) -> Any:
    """A static cache of transformers for a batch, empty; ``generate`` compiles the step on a GPU then."""
    from transformers import StaticCache

    if batch not in caches:
        caches.clear()
        caches[batch] = StaticCache(config=model.config, max_cache_len=tokens)
    else:
        caches[batch].reset()
    return caches[batch]


def step_bytes(config: Any, batch: int, seen: float, *, nf4: bool, element: int) -> int:
    """Bytes that a step cannot do without: each weight read once, and the keys and values.

    Args:
        config: Of the model.
        batch: Texts.
        seen: Tokens of each that the new one attends to, in the mean.
        nf4: Whether the blocks' linear layers are NF4.
        element: Bytes of a weight that is not.
    """
    hidden, ffn, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    weights = depth * hidden * (2 * q + 2 * kv + 3 * ffn)
    of_weight = NF4_BYTES if nf4 else element
    output = config.vocab_size * hidden * element
    return round(weights * of_weight + output + batch * seen * depth * 2 * kv * element)
