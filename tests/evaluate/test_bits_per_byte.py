"""The price of alignment, held against transformers' own logits."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.errors import UserError
from tli_engine.evaluate import bits_per_byte as module
from tli_engine.evaluate.bits_per_byte import bits_per_byte, read_lines
from tli_engine.models.adapters import adapter_strength, adapter_tensors, adapters_off, add_lora
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import FAMILIES, ModelFiles, open_model
from tli_engine.testing import save_tiny_model

# tokens are bytes; of one byte and of several, short lines and one of 57 bytes
LINES = [
    "maji",
    "Mtu ni watu.",
    "ŋala 水 ñ",
    "a",
    "Haraka haraka haina baraka, haba na haba hujaza kibaba!..",
]
Open = Callable[..., ModelFiles]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Open a tiny model by family and configuration; not to be written to."""
    made: dict[str, ModelFiles] = {}

    def find(family: str = "llama", **overrides: Any) -> ModelFiles:
        key = f"{family} {sorted(overrides.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = open_model(str(save_tiny_model(folder, family, **overrides)))
        return made[key]

    return find


def load(files: ModelFiles, **options: Any) -> EarlyModel:
    options = {"dtype": torch.float32, "device": torch.device("cpu")} | options
    return load_early(files, files.config.num_hidden_layers, **options)


def head_of(files: ModelFiles) -> Tensor:
    tied = files.config.tie_word_embeddings
    return files.source.read("embed_tokens.weight" if tied else "lm_head.weight")


def measure(files: ModelFiles, lines: list[str] = LINES, tokenizer: Any = None) -> float:
    head = head_of(files)
    return bits_per_byte(load(files), tokenizer or files.tokenizer, head, lines)


def without_bos(files: ModelFiles) -> Any:
    """The tokenizer of a model such as Qwen's, which has no token to begin with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    tokenizer.bos_token = None
    return tokenizer


def by_transformers(
    files: ModelFiles, lines: list[str] = LINES, bos: int | None = 256, window: int = 1024
) -> float:
    """Bits of each byte, from the logits of the model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()
    tokens = files.tokenizer.get_vocab()
    nats = 0.0
    for line in lines:
        ids = [tokens[character] for character in files.tokenizer.tokenize(line)]
        assert len(ids) == len(line.encode())
        for start in range(0, len(ids), window):
            piece = ids[start : start + window]
            piece = piece if bos is None else [bos, *piece]
            with torch.no_grad():
                logits = model(torch.tensor([piece])).logits[0].double()
            for i, token in enumerate(piece[1:]):
                nats -= float(logits[i].log_softmax(0)[token])
    return nats / math.log(2) / sum(len(line.encode()) for line in lines)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, tied: bool, tiny: Open) -> None:
    # attention windows are shorter than the last line; that is tested below
    files = tiny(family, tie_word_embeddings=tied)
    lines = LINES[:4] if getattr(files.config, "sliding_window", None) else LINES
    assert files.config.tie_word_embeddings == tied
    expected = by_transformers(files, lines)
    assert 4 < expected < 40
    assert measure(files, lines) == pytest.approx(expected, rel=0, abs=1e-6 * expected)


def test_without_a_bos_token_the_first_is_given(tiny: Open) -> None:
    files = tiny("qwen2")
    tokenizer = without_bos(files)
    expected = by_transformers(files, bos=None)
    assert measure(files, tokenizer=tokenizer) == pytest.approx(expected, rel=1e-6)
    # one token, and none before it: nothing is predicted, a byte is counted
    assert measure(files, ["a"], tokenizer) == 0
    two = measure(files, ["a", "bb"], tokenizer)
    assert two == pytest.approx(by_transformers(files, ["bb"], bos=None) * 2 / 3, rel=1e-6)


@pytest.mark.parametrize("window", [1, 4, 5, 16, 56, 57, 58])
@pytest.mark.parametrize("bos", [256, None], ids=["bos", "no-bos"])
def test_long_lines_are_cut(
    bos: int | None, window: int, tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece stands alone, with a BOS of its own if there is one."""
    monkeypatch.setattr(module, "_WINDOW", window)
    files = tiny()
    tokenizer = files.tokenizer if bos is not None else without_bos(files)
    expected = by_transformers(files, bos=bos, window=window)
    actual = measure(files, tokenizer=tokenizer)
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-12)
    if bos is not None and window <= 16:
        assert actual != pytest.approx(by_transformers(files), rel=1e-3)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("bos", [256, None], ids=["bos", "no-bos"])
def test_lines_longer_than_the_attention_window_are_cut_to_it(
    bos: int | None, family: str, tiny: Open
) -> None:
    """Such as Gemma 3's 512 tokens: a line of text is not a word to be refused."""
    files = tiny(family)
    assert files.config.sliding_window == 24
    tokenizer = files.tokenizer if bos is not None else without_bos(files)
    expected = by_transformers(files, bos=bos, window=24 - (bos is not None))
    assert measure(files, tokenizer=tokenizer) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 57])
def test_rows_of_logits_at_a_time_do_not_matter(
    rows: int, tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(tiny())
    monkeypatch.setattr(module, "_ROWS", rows)
    assert measure(tiny()) == pytest.approx(expected, rel=1e-6)


def test_softcapped_logits(tiny: Open) -> None:
    files = tiny("gemma3_text", final_logit_softcapping=5.0)
    plain = measure(tiny("gemma3_text"), LINES[:4])
    actual = measure(files, LINES[:4])
    assert actual == pytest.approx(by_transformers(files, LINES[:4]), rel=1e-6)
    assert actual != pytest.approx(plain, rel=1e-3)


def test_a_model_that_knows_nothing_needs_a_token_s_choice(tiny: Open) -> None:
    files = tiny()
    nothing = torch.zeros_like(head_of(files))
    found = bits_per_byte(load(files), files.tokenizer, nothing, LINES)
    assert found == pytest.approx(math.log2(259), rel=1e-6)


def test_bytes_are_of_utf8_not_characters(tiny: Open) -> None:
    line = "水" * 5
    files = tiny()
    assert len(line.encode()) == 15
    assert measure(files, [line]) == pytest.approx(by_transformers(files, [line]), rel=1e-6)


def test_lines_stand_alone_and_count_by_their_bytes(tiny: Open) -> None:
    files = tiny()
    sizes = [len(line.encode()) for line in LINES]
    alone = [measure(files, [line]) for line in LINES]
    mean = sum(b * n for b, n in zip(alone, sizes, strict=True)) / sum(sizes)
    assert measure(files) == pytest.approx(mean, rel=1e-6)
    assert measure(files, LINES[::-1]) == pytest.approx(mean, rel=1e-6)


def test_progress_counts_lines(tiny: Open) -> None:
    files, counts = tiny(), []
    bits_per_byte(load(files), files.tokenizer, head_of(files), LINES, counts.append)
    assert counts == [1] * len(LINES)


def test_adapters_have_a_price_and_off_they_have_none(tiny: Open) -> None:
    files = tiny()
    model = load(files)
    add_lora(model, LoraConfig(r=4, alpha=8), 2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for tensor in adapter_tensors(model).values():
        tensor.data += 0.2 * torch.randn(tensor.shape, generator=generator)

    def bits() -> float:
        return bits_per_byte(model, files.tokenizer, head_of(files), LINES)

    before, after = measure(files), bits()
    assert after != pytest.approx(before, rel=1e-4)
    with adapters_off(model):
        assert bits() == before
    with adapter_strength(model, 0.0):
        assert bits() == pytest.approx(before, rel=1e-7)


def test_no_gradient_is_kept(tiny: Open) -> None:
    files = tiny()
    model = load(files)
    add_lora(model, LoraConfig(r=4, alpha=8), 2, seed=0)
    bits_per_byte(model, files.tokenizer, head_of(files), LINES[:1])
    assert all(p.grad is None for p in model.parameters())


def test_bf16_is_near_fp32(tiny: Open) -> None:
    files, dtype = tiny(), torch.bfloat16
    model = load(files, dtype=dtype)
    found = bits_per_byte(model, files.tokenizer, head_of(files).to(dtype), LINES)
    assert found == pytest.approx(measure(files), rel=0.05)


def test_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("maji\r\n\n  \nŋala 水\n\tmoto".encode())
    assert read_lines(path) == ["maji", "ŋala 水", "\tmoto"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "has no text"),
        (b"\n \n\t\n", "has no text"),
        (b"maji\n\xff\xfe", "not UTF-8; save the file as UTF-8"),
        ("maji".encode("utf-16"), "not UTF-8; save the file as UTF-8"),
    ],
    ids=["missing", "empty", "blank", "latin", "utf-16"],
)
def test_what_is_no_text_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_lines(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_lines(tmp_path)
