"""The configurations of the published comparisons: five arms, three seeds, the same articles for all."""

from pathlib import Path

import pytest
import yaml

from tli_engine.config import read_yaml
from tli_engine.evaluate.compare.config import ALIGN, ARMS, arm_config, split_config

FOLDER = Path(__file__).parents[3] / "docs" / "comparisons"
FILES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_arms_differ_in_what_they_are_called_and_in_rates_alone(path: Path) -> None:
    shared, settings = split_config(read_yaml(path, "compare"), path.name)
    assert settings.arms == ARMS
    assert len(settings.seeds) >= 3
    assert not settings.keep_weights
    runs = {arm: arm_config(shared, settings, arm, 0, Path()) for arm in (*ARMS, ALIGN)}
    alike = [
        run.model_dump(exclude={"objective", "method", "lora", "train"}) for run in runs.values()
    ]
    assert all(values == alike[0] for values in alike)
    trained = {arm: run.train.model_dump(exclude={"learning_rate"}) for arm, run in runs.items()}
    assert all(trained[arm] == trained["full"] for arm in ARMS)
    assert runs["lora-all"].lora.layers == "all"
    assert {runs[arm].lora.layers for arm in ("lora-early", "joint", ALIGN)} == {"0-3"}
    # layer of the loss: what the adapted blocks put out
    assert runs[ALIGN].align.layer == 4


def test_the_two_differ_in_the_model_its_first_token_and_rates() -> None:
    first, second = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES)
    for config in (first, second):
        del config["sft"]["evaluate_steps"]
        # of the second each is one of several
        rates = config["compare"].pop("rates", {})
        changes = config["compare"].pop("set")
        assert changes.pop("full", None) == (
            {"train": {"learning_rate": 1e-4}} if not rates else None
        )
        assert changes.pop("tli")["train"].items() >= {"steps": 80, "batch_size": 118}.items()
        assert not changes
    assert {key for key in first if first[key] != second[key]} == {"model", "words"}
