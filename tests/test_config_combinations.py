"""Keys that are allowed each on its own, and not together."""

from typing import Any

import pytest

from tests.test_config import one_line, resolve
from tli_engine.errors import ConfigError

SFT = {"objective": "sft", "data": "a.jsonl"}
FULL = SFT | {"method": "full"}
STOCHASTIC = {"rounding": "stochastic"}


def test_patience_goes_with_articles_to_measure_on() -> None:
    data = {"texts": "a.jsonl", "validation": "b.jsonl"}
    for texts in (data, "xlsum:swahili", "builtin:sw-demo"):
        assert resolve(objective="sft", data=texts, sft={"patience": 2}).sft.patience == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "sft"}, "objective sft needs data.texts"),
        ({"method": "full"}, "method full goes with objective sft or joint"),
        ({"train": {"batch_size": 1}}, "train.batch_size must be at least 2"),
        (
            {"objective": "sft", "method": "full", "data": "a.jsonl", "quantize": "nf4"},
            "method full trains the weights: it needs quantize none",
        ),
        ({"train": {"schedule": "wsd"}}, "decay_steps goes with schedule: wsd"),
        ({"train": {"decay_steps": 3}}, "decay_steps goes with schedule: wsd"),
        ({"train": {"in_backward": True, "accumulate": 2}}, "in_backward frees each gradient"),
        (
            {"objective": "joint", "data": "a.jsonl", "train": {"in_backward": True}},
            "a step of objective joint has two: set train.in_backward: false, or objective: sft",
        ),
        (
            {"objective": "sft", "data": "a.jsonl", "train": {"chunk_tokens": 64}},
            "train.chunk_tokens cuts batches of word pairs and goes with objective align",
        ),
        (
            {"train": {"chunk_tokens": 64, "engine": "modules"}},
            "train.chunk_tokens is of the engine's ops",
        ),
        ({"train": {"accumulate": 2}}, "train.accumulate goes with objective sft or joint"),
        ({"train": {"optimizer": "adamw-8bit"}}, "train.optimizer goes with objective sft"),
        ({"train": {"lora_plus": 2.0}}, "train.lora_plus goes with objective sft or joint"),
        ({"train": {"rounding": "stochastic"}}, "train.rounding goes with objective sft or joint"),
        ({"train": {"in_backward": True}}, "train.in_backward goes with objective sft or joint"),
        (
            SFT | {"sft": {"patience": 2}},
            "sft.patience counts measurements of the loss on data.val",
        ),
        (FULL | {"lora": {"init": "a"}}, "lora.init is an adapter to go on from, and method full"),
        (
            FULL | {"train": {"lora_plus": 2}},
            "train.lora_plus is of adapters, and method full trains",
        ),
        (
            SFT | {"train": STOCHASTIC},
            "train.rounding: stochastic is of weights in bf16, and adapters",
        ),
        (
            FULL | {"train": STOCHASTIC, "dtype": "float32"},
            "float32 needs no rounding: set rounding",
        ),
        ({"prompt": {"instruction": "Fupisha:"}}, "must contain {text} once"),
        ({"data": {"columns": "text,text"}}, "columns must be two different columns"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(**values)
    line = one_line(raised)
    assert message in line
    # a whole section is no help
    assert "(got {" not in line
    assert "top level" not in line
