"""Documents on a GPU: fused varlen against transformers' modules, activations run again, the loss."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.data.words import Pack, Word, pack
from tli_engine.kernels import (
    keep_decoded,
    nf4_linear,
    nf4_linear_dx,
    nf4_linear_records_sm90,
    nf4_lora_linear,
    nf4_lora_linear_backward,
)
from tli_engine.models.adapters import adapter_tensors, add_lora, add_transposed_copies
from tli_engine.models.arrangement import EVERYTHING, NOTHING, Arrangement, Part, held
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.document_attention import Documents, choose_attention
from tli_engine.models.files import open_model
from tli_engine.models.linear_cross_entropy import linear_cross_entropy
from tli_engine.models.recompute import Activations
from tli_engine.testing import assert_within_error_budget, save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = LoraConfig(layers="1-2", modules=ALL, r=8)
SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
WINDOWS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 96}}
WINDOWS["gemma3_text"] = WINDOWS["mistral"]
# what decodes a weight whole, and which of its arguments is the weight as it is stored
DECODERS = [
    (nf4_linear, "dequantize_tiles", 0),
    (nf4_linear_dx, "dequantize_tiles", 0),
    (nf4_lora_linear, "dequantize_tiles", 0),
    (nf4_lora_linear, "dequantize_tiles_into", 1),
    (nf4_lora_linear_backward, "dequantize_tiles", 0),
    (nf4_lora_linear_backward, "dequantize_tiles_into", 1),
    (nf4_linear_records_sm90, "dequantize_records", 0),
    (nf4_linear_records_sm90, "dequantize_records_into", 1),
]
# past the window, below it, at it, past a tile
LENGTHS = (200, 40, 96, 2, 130)
Load = Callable[..., CausalModel]


@dataclass(frozen=True)
class Texts:
    words: Pack
    predicting: Tensor
    targets: Tensor


def texts(*lengths: int) -> Texts:
    """Random documents, the second half of each to be predicted."""
    generator = torch.Generator().manual_seed(0)
    words, predicting, first = [], [], 0
    for length in lengths:
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        words.append(Word(tuple(ids), (True,) * length))
        predicting += range(first + length // 2 - 1, first + length - 1)
        first += length
    packed, at = pack(words), torch.tensor(predicting)
    return Texts(packed.to(CUDA), at.to(CUDA), packed.input_ids[at + 1].to(CUDA))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            options = SIZES | {"max_position_embeddings": 512} | WINDOWS.get(family, {})
            made[family] = save_tiny_model(tmp_path_factory.mktemp(family), family, **options)
        return made[family]

    return find


@pytest.fixture
def load(folders: Callable[[str], Path]) -> Load:
    def whole(
        family: str,
        dtype: torch.dtype = torch.bfloat16,
        quantize: str = "none",
        lora: LoraConfig | None = LORA,
    ) -> CausalModel:
        files = open_model(str(folders(family)))
        # all models hold the weights that bf16 holds
        model = load_causal(files, dtype=torch.bfloat16, device=CUDA, quantize=quantize)  # type: ignore[arg-type]
        if quantize == "none":
            model = model.to(dtype)
        if lora is None:
            model.train_all()
            return model
        add_lora(model.early, lora, model.early.depth, seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, tensor in adapter_tensors(model.early).items():
            tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32))
            if ".lora_B." in name:
                tensor.data.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
        return model

    return whole


def step(model: CausalModel, packed: Texts) -> dict[str, Tensor]:
    """The loss, and the gradients by the modules' own names."""
    trained = model.trainable()
    loss = model.loss(packed)
    grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    for projection in [] if model.early.fused is None else model.early.fused.projections():
        for name, _, whole, rows in projection.parts():
            grads[name] = grads[whole][rows]
        owner, _, leaves = projection.name.rpartition(".")
        for whole in projection.joined_weights().keys() & grads.keys():
            parts = grads.pop(whole).split(projection.sizes)
            for leaf, grad in zip(leaves.split("+"), parts, strict=True):
                grads[f"{owner}.{leaf}.{whole.rpartition('.')[2]}"] = grad
        for name in projection.joined():
            del grads[name]
    return grads | {"loss": loss.detach()}


def assert_errs_no_more(
    actual: dict[str, Tensor], same_dtype: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Every tensor's error, as a share of its norm, at most twice that of the modules'."""
    assert actual.keys() == exact.keys() == same_dtype.keys()
    for name, truth in exact.items():
        norm = truth.double().norm()
        ours, theirs = (
            ((x[name].double() - truth.double()).norm() / norm) for x in (actual, same_dtype)
        )
        assert ours <= 2 * theirs + 2e-3, f"{name}: {ours:.2e}, the modules' {theirs:.2e}"


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_varlen_errs_no_more_than_the_modules(family: str, method: str, load: Load) -> None:
    packed, lora = texts(*LENGTHS), LORA if method == "lora" else None
    exact = step(load(family, torch.float32, lora=lora), packed)
    plain = step(load(family, lora=lora), packed)
    model = load(family, lora=lora)
    model.fuse()
    assert model.attention == "varlen"
    assert_errs_no_more(step(model, packed), plain, exact)


@pytest.mark.parametrize("attention", ["sdpa", "flash-attn"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_other_attentions_err_no_more(family: str, attention: Any, load: Load) -> None:
    if attention == "flash-attn":
        pytest.importorskip("flash_attn")
    packed = texts(*LENGTHS)
    exact, plain = step(load(family, torch.float32), packed), step(load(family), packed)
    model = load(family)
    model.fuse(attention)
    assert_errs_no_more(step(model, packed), plain, exact)


@pytest.mark.parametrize("copies", [False, True], ids=["one-copy", "transposed-copies"])
def test_nf4_weights_err_no_more(copies: bool, load: Load) -> None:
    packed = texts(*LENGTHS)
    plain = load("llama", quantize="nf4")
    exact = load("llama", quantize="nf4").to(torch.float32)
    model = load("llama", quantize="nf4")
    model.fuse()
    if copies:
        add_transposed_copies(model.early)
    assert_errs_no_more(*(step(m, packed) for m in (model, plain, exact)))


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param((60, 17, 64, 2), id="few-rows"),
        # with dropout or without, all products decode their weight first, and keep it
        pytest.param((60,) * 104, id="over-6144-rows"),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_run_again_is_saved_bit_for_bit(
    family: str, quantize: str, dropout: float, lengths: tuple[int, ...], load: Load
) -> None:
    model = load(family, quantize=quantize, lora=LORA.model_copy(update={"dropout": dropout}))
    model.fuse()
    model.train()
    # within one tile of keys: the gradient of longer ones' queries is summed in any order
    packed = texts(*lengths)
    found = []
    some = Arrangement(2, 2), Arrangement(3, 1, 0), Arrangement(3, 1, 1)
    for arrangement in (EVERYTHING, NOTHING, *some):
        model.activations.arrangement = arrangement
        torch.manual_seed(5)
        found.append(step(model, packed))
    for again in found[1:]:
        different = [n for n, t in found[0].items() if not torch.equal(t, again[n])]
        assert different == []


@pytest.mark.parametrize("modules", [("q_proj",), ALL], ids=["q", "all"])
@pytest.mark.parametrize("documents", [10, 13], ids=["5000-rows", "6500-rows"])
@pytest.mark.parametrize("copies", [False, True], ids=["one-copy", "transposed-copies"])
def test_a_weight_is_decoded_twice_at_most(
    copies: bool,
    documents: int,
    modules: tuple[str, ...],
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the way there, and once for the second run and the way back together."""
    model = load("llama", quantize="nf4", lora=LORA.model_copy(update={"modules": modules}))
    model.fuse()
    if copies:
        add_transposed_copies(model.early)
    model.activations = Activations("recompute")
    counts: Counter[int] = Counter()
    for kernel, name, stored in DECODERS:
        plain = getattr(kernel, name)

        def counted(*args: Any, plain: Any = plain, stored: int = stored) -> Any:
            counts[args[stored].data_ptr()] += 1
            return plain(*args)

        monkeypatch.setattr(kernel, name, counted)
    # so many rows that some products take cuBLAS, or all
    loss = model.loss(texts(*[500] * documents))
    loss.backward()
    assert counts
    assert all(count <= 2 for count in counts.values())
    assert not keep_decoded._kept


def kept_by(model: CausalModel, packed: Texts, activations: Activations) -> int:
    """Bytes that a forward leaves allocated for the way back."""
    model.activations = activations
    before = torch.cuda.memory_allocated()
    loss = model.loss(packed)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return kept


def test_a_plan_knows_what_blocks_keep(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama")
    model.fuse()
    packed = texts(*[500] * 8)
    # cuBLAS takes a workspace once
    model.loss(packed).backward()
    measured: list[int] = []

    def note(blocks: list[list[Part]], first: int, size: int, room: object) -> Arrangement:
        measured.extend(held(parts, [True] * len(parts), size) for parts in blocks)
        return NOTHING

    monkeypatch.setattr("tli_engine.models.recompute.arrange", note)
    again = kept_by(model, packed, Activations("auto"))
    saved = kept_by(model, packed, Activations("save"))
    # block 0 is below the first adapter
    assert len(measured) == 3
    assert sum(measured) == pytest.approx(saved - again, rel=0.15)


def test_auto_saves_what_fits(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama")
    model.fuse()
    packed = texts(*[500] * 4)
    model.activations = Activations("auto")
    model.loss(packed).backward()
    assert model.activations.arrangement == Arrangement(1, 1)
    monkeypatch.setattr("tli_engine.models.recompute._free", lambda device: 0)
    model.activations = Activations("auto")
    model.loss(packed).backward()
    assert model.activations.arrangement == Arrangement(4, 4)


def test_a_plan_leaves_the_random_numbers_alone(load: Load) -> None:
    model = load("llama", lora=LORA.model_copy(update={"dropout": 0.5}))
    model.fuse()
    model.train()
    packed, losses = texts(60, 40), []
    for policy in ("auto", "recompute"):
        model.activations = Activations(policy)  # type: ignore[arg-type]
        torch.manual_seed(0)
        losses += [model.loss(packed), model.loss(packed)]
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])
    assert not torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("window", [None, 33, 128])
@pytest.mark.parametrize("name", ["varlen", "flash-attn"])
@pytest.mark.parametrize(("heads", "key_heads", "D"), [(4, 4, 64), (8, 2, 128), (4, 1, 256)])
def test_attention_within_documents(
    name: Any, heads: int, key_heads: int, D: int, window: int | None
) -> None:
    if name == "flash-attn":
        pytest.importorskip("flash_attn")
    assert choose_attention(name, CUDA, torch.bfloat16, D) == name
    packed, results = texts(*LENGTHS).words, []
    T, seed = len(packed.input_ids), torch.Generator().manual_seed(0)
    joined = torch.randn(T, heads + 2 * key_heads, D, generator=seed).to(CUDA, torch.bfloat16)
    dout = torch.randn(T, heads, D, generator=seed).to(CUDA, torch.bfloat16)
    for kind, dtype in ((name, torch.bfloat16), ("sdpa", torch.bfloat16), ("sdpa", torch.float64)):
        # its own leaf: a tensor of that dtype would be the same one every time
        x = joined.to(dtype, copy=True).requires_grad_()
        q, k, v = x.split([heads, key_heads, key_heads], 1)
        out = Documents.of(packed, kind).attend(q, k, v, 0.7 * D**-0.5, window)
        out.backward(dout.to(dtype))
        assert x.grad is not None
        results.append((out.detach(), x.grad))
    for ours, plain, exact in zip(*results, strict=True):
        assert_within_error_budget(ours, plain, exact, floor=1e-2)


@pytest.mark.parametrize("rows", [64, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_linear_cross_entropy(dtype: torch.dtype, rows: int) -> None:
    M, D, V = 300, 128, 20_000
    hidden = torch.randn(M, D, device=CUDA).to(dtype).requires_grad_()
    weight = (0.2 * torch.randn(V, D, device=CUDA)).to(dtype).requires_grad_()
    targets = torch.randint(V, (M,), device=CUDA)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        acc = torch.promote_types(logits.dtype, torch.float32)
        return torch.nn.functional.cross_entropy(logits.to(acc), targets, reduction="sum")

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    ours = linear_cross_entropy(hidden, weight, targets, rows=rows)
    found = [
        (loss.detach(), *torch.autograd.grad(loss, inputs))
        for loss, inputs in (
            (ours, [hidden, weight]),
            (plain(hidden, weight), [hidden, weight]),
            (plain(*wide), wide),
        )
    ]
    for a, b, truth in zip(*found, strict=True):
        assert_within_error_budget(a, b, truth, floor=1e-3)


@pytest.mark.parametrize("arrangement", [Arrangement(4, 1, 0), Arrangement(4, 1, 1)], ids=str)
def test_a_part_keeps_what_is_counted(arrangement: Arrangement, load: Load) -> None:
    model = load("llama")
    model.fuse()
    packed = texts(*[500] * 8)
    model.loss(packed).backward()
    blocks: list[list[Part]] = []
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:

        def note(parts: list[list[Part]], first: int, size: int, room: object) -> Arrangement:
            blocks.extend(parts)
            sizes.append(size)
            return NOTHING

        patch.setattr("tli_engine.models.recompute.arrange", note)
        nothing = kept_by(model, packed, Activations("auto"))
    some = Activations("auto")
    some.arrangement = arrangement
    keeps = [arrangement.keeps(1 + i, 2) for i in range(len(blocks))]
    expected = sum(held(b, k, sizes[0]) for b, k in zip(blocks, keeps, strict=True))
    assert expected == pytest.approx(kept_by(model, packed, some) - nothing, rel=0.15)
