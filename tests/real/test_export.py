"""A GGUF file as the base of an export: SmolLM2, out of its wheel."""

from pathlib import Path

import torch

from tli_engine.evaluate.logit_drift import measure_drift, sample_words
from tli_engine.models import builtin
from tli_engine.models.blockwise import logits_of
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.merged import MergedSource, write_model
from tli_engine.models.model_folder import layout_of


def test_a_gguf_base_is_written_whole(smollm2: ModelFiles, tmp_path: Path) -> None:
    """The built-in model is made of the same values, fp32."""
    gguf_file = builtin._fetch(builtin.find(smollm2.name), tmp_path)
    files = open_model(str(gguf_file))
    write_model(files, MergedSource(files).read, tmp_path / "out", shard_bytes=10**8)
    out = open_model(str(tmp_path / "out"))
    assert layout_of(out.config) == layout_of(smollm2.config)
    for name in layout_of(smollm2.config).shapes:
        assert torch.equal(out.source.read(name), smollm2.source.read(name)), name
    words = sample_words(smollm2)
    assert sample_words(out) == words
    drift = measure_drift(logits_of(smollm2, words), logits_of(out, words))
    assert (drift.max, drift.kl) == (0.0, 0.0)
    # a token a word or less would be no text
    assert drift.tokens > 200
