import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tli_engine.config import (
    RunConfig,
    apply_overrides,
    read_recipe,
    read_yaml,
    recipe_names,
    resolve_config,
    resolve_words,
    to_yaml,
)
from tli_engine.errors import ConfigError, UserError

SECTIONS = ("data", "words", "lora", "align", "train")


def resolve(**values: Any) -> RunConfig:
    return resolve_config({"model": "m", **values}, "here.yaml")


def set_on(values: dict[str, Any], *overrides: str) -> RunConfig:
    return resolve_config(apply_overrides(values, list(overrides)), "here.yaml")


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert isinstance(error.value, UserError)
    return message


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves(name: str) -> None:
    config = resolve_config(read_recipe(name), name)
    assert config.model
    assert config.provenance is None
    assert yaml.safe_load(to_yaml(config)).keys() == RunConfig.model_fields.keys()


def test_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--recipe: no recipe 'demmo'; there are .*demo.*paper"):
        read_recipe("demmo")


@pytest.mark.parametrize("name", recipe_names())
def test_to_yaml_round_trips(name: str, tmp_path: Path) -> None:
    config = resolve_config(read_recipe(name), name)
    config = config.model_copy(update={"provenance": {"pairs": {"train": {"count": 3}}}})
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert resolve_config(read_yaml(path), str(path)) == config


@pytest.mark.parametrize("text", ["0\x85", "a\u2028b", "\u2029", "plain é"])
def test_unicodes_line_breaks_survive_yaml(text: str) -> None:
    config = resolve(words={"template": {"sw": "{word}" + text}})
    assert resolve_config(yaml.safe_load(to_yaml(config)), "yaml") == config


@given(
    word=st.text(max_size=8),
    margin=st.floats(0, 1e300, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
)
@settings(deadline=None, max_examples=50)
def test_any_value_survives_yaml(word: str, margin: float, seed: int) -> None:
    template = {"kiswahili": "{word} é: " + word.replace("{word}", "")}
    config = resolve(seed=seed, align={"margin": margin}, words={"template": template})
    assert resolve_config(yaml.safe_load(to_yaml(config)), "yaml") == config


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_key_in_a_section(section: str) -> None:
    values: dict[str, Any] = {"train": {"steps": 1}, section: {"steps": 1, "stepz": 3}}
    if section != "train":
        del values[section]["steps"]
    with pytest.raises(ConfigError) as raised:
        resolve(**values)
    known = ", ".join(RunConfig.model_fields[section].annotation.model_fields)  # type: ignore[union-attr]
    expected = f"here.yaml: {section}.stepz: unknown key; known here: {known}"
    assert one_line(raised) == expected


def test_unknown_key_at_the_top() -> None:
    with pytest.raises(ConfigError, match=r"^here\.yaml: modle: unknown key; known here: model, "):
        resolve(modle="x")
    with pytest.raises(ConfigError, match=r"it is of a comparison, which tli-engine compare runs$"):
        resolve(compare={"seeds": [0]})


def test_model_is_required() -> None:
    with pytest.raises(ConfigError, match=r"^here\.yaml: model: is required$"):
        resolve_config({}, "here.yaml")


BAD_VALUES = [
    ("model", 5, "string"),
    ("model", None, "string"),
    ("objective", "dpo", "'align'"),
    ("method", "qlora", "'lora'"),
    ("quantize", "int3", "'none'"),
    ("dtype", "int8", "'bfloat16'"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than"),
    ("seed", "one", "integer"),
    ("data", 3, "section of keys"),
    ("data", None, "section of keys"),
    ("data", ["pairs"], "section of keys"),
    ("data.pairs", ["a.csv"], "string"),
    ("data.limit", 0, "greater than or equal to 1"),
    ("words.presentation", "space", "'leading-space'"),
    ("words.template", "{word}", "dictionary"),
    ("words.prefix", None, "string"),
    ("lora.layers", [0, 1], "string"),
    ("lora.modules", "q_proj", "tuple"),
    ("lora.modules", 3, "tuple"),
    ("lora.r", 0, "greater than or equal to 1"),
    ("lora.r", 2.5, "integer"),
    ("lora.alpha", 0, "greater than 0"),
    ("lora.dropout", -0.1, "greater than or equal to 0"),
    ("lora.dropout", 1.0, "less than 1"),
    ("lora.rslora", "perhaps", "boolean"),
    ("align.layer", 0, "greater than or equal to 1"),
    ("align.pooling", "mean", "'content'"),
    ("align.loss", "triplet", "'triplet-hardest'"),
    ("align.space", "whiten", "'whitened'"),
    ("align.margin", 0, "greater than 0"),
    ("align.temperature", -0.05, "greater than 0"),
    ("align.temperature", float("nan"), "finite"),
    ("train.batch_size", 0, "greater than or equal to 1"),
    ("train.learning_rate", 0, "greater than 0"),
    ("train.learning_rate", float("inf"), "finite"),
    ("train.learning_rate", "fast", "number"),
    ("train.schedule", "exponential", "'cosine'"),
    ("train.warmup_steps", -1, "greater than or equal to 0"),
    ("train.weight_decay", -1, "greater than or equal to 0"),
    ("train.max_grad_norm", 0, "greater than 0"),
]


@pytest.mark.parametrize(
    ("key", "value", "message"), BAD_VALUES, ids=[f"{k}={v!r}" for k, v, _ in BAD_VALUES]
)
def test_bad_value_is_named_with_what_it_must_be(key: str, value: object, message: str) -> None:
    section, _, leaf = key.rpartition(".")
    values = {section: {leaf: value}} if section else {key: value}
    if section == "train":
        values = {"train": {"epochs": 1, leaf: value}}
    with pytest.raises(ConfigError) as raised:
        resolve(**values)
    line = one_line(raised)
    assert line.startswith(f"here.yaml: {key}")
    assert message in line
    assert f"(got {value!r})" in line


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("words", {"presentation": "template"}, "'template' needs a template per language"),
        ("words", {"template": {"sw": "neno"}}, "template for 'sw' must contain {word} once"),
        ("words", {"template": {"sw": "{word}{word}"}}, "must contain {word} once"),
        ("data", {"languages": ["a", "a"]}, "languages must be two different columns"),
        ("data", {"languages": ["a", ""]}, "languages must be two different columns"),
        ("data", {"languages": ["a"]}, "data.languages.1: is required"),
        ("data", {"languages": ["a", "b", "c"]}, "data.languages: "),
        ("train", {"epochs": 1, "steps": 1}, "only one of epochs and steps can be set"),
    ],
)
def test_values_that_do_not_go_together(section: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        resolve(**{section: value})
    assert one_line(raised).startswith(f"here.yaml: {section}")


def test_values_are_frozen() -> None:
    config = resolve()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


SOME: dict[str, Any] = {"model": "m", "train": {"epochs": 3, "batch_size": 4}}


def test_set_replaces_a_value_and_leaves_the_rest() -> None:
    config = set_on(SOME, "train.batch_size=16", "align.layer=3", "model=other", "lora.r=4")
    assert (config.train.batch_size, config.train.epochs) == (16, 3)
    assert (config.align.layer, config.model, config.lora.r) == (3, "other", 4)
    # what was read from the file stays as it was
    assert SOME == {"model": "m", "train": {"epochs": 3, "batch_size": 4}}


def test_the_last_set_of_a_key_wins() -> None:
    assert set_on(SOME, "seed=1", "seed=2").seed == 2


def test_set_takes_yaml_values() -> None:
    config = set_on(
        SOME,
        "lora.modules=[q_proj, o_proj]",
        "train.learning_rate=1e-4",
        "data.control=null",
        "align.two_way=false",
        "words.template.sw='{word}: neno = x'",
        "data={pairs: a.csv, languages: [x, y]}",
    )
    assert config.lora.modules == ("q_proj", "o_proj")
    assert config.train.learning_rate == 1e-4
    assert config.align.two_way is False
    assert config.words.template == {"sw": "{word}: neno = x"}
    assert config.data.languages == ("x", "y")


@pytest.mark.parametrize("layers", ["0", "0-1", "0,2,5-7", "all"])
def test_set_of_layers(layers: str) -> None:
    assert set_on(SOME, f"lora.layers={layers}").lora.layers == layers


def test_set_in_a_section_that_the_file_leaves_out_or_empty() -> None:
    assert set_on({"model": "m"}, "data.limit=3").data.limit == 3
    assert set_on({"model": "m", "data": None}, "data.limit=3").data.limit == 3


def test_set_of_steps_takes_the_place_of_epochs() -> None:
    assert set_on(SOME, "train.steps=7").train.epochs is None
    steps = {"model": "m", "train": {"steps": 7}}
    assert set_on(steps, "train.epochs=2").train.steps is None
    assert set_on({"model": "m"}, "train.steps=7").train.steps == 7
    with pytest.raises(ConfigError, match="only one of epochs and steps"):
        set_on(SOME, "train.steps=7", "train.epochs=2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps"], "--set steps: must be key=value, e.g. train.learning_rate=1e-4"),
        ([""], "--set : must be key=value"),
        (["=5"], "--set =5: must be key=value"),
        ([".=5"], "--set .=5: must be key=value"),
        (["train..steps=5"], "--set train..steps=5: must be key=value"),
        (["train.=5"], "--set train.=5: must be key=value"),
        (["model.name=x"], "--set model.name=x: 'model' is a value, not a section"),
        (["train.epochs.x=1"], "--set train.epochs.x=1: 'epochs' is a value, not a section"),
        (["train=3", "train.steps=5"], "--set train.steps=5: 'train' is a value, not a section"),
        (["train.steps=5", "train=3"], "here.yaml: train: must be a section of keys (got 3)"),
        (["train=3"], "here.yaml: train: must be a section of keys (got 3)"),
        (["foo.bar=1"], "here.yaml: foo: unknown key; known here: model"),
        (["train.stepz=1"], "here.yaml: train.stepz: unknown key; known here: epochs"),
        (["model=[a"], "--set model=[a: the value is not YAML"),
        (["model=2024-13-45"], "--set model=2024-13-45: the value is not YAML"),
        (["model=0x_"], "--set model=0x_: the value is not YAML"),
        (["model=" + "[" * 600], "the value is not YAML"),
        (["model=@x"], "--set model=@x: the value is not YAML"),
        (["model=a\x00"], "the value is not YAML"),
        (["train.steps=1e3"], "here.yaml: train.steps: "),
    ],
)
def test_malformed_set(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        set_on(SOME, *overrides)
    one_line(raised)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "line 1: not YAML: "),
        ("model: x\ntrain:\n  steps: 1: 2\n", "line 3: not YAML: mapping values are not allowed"),
        ("model: x\n\tseed: 1\n", "line 2: not YAML: "),
        ("model: x\nseed: *a\n", "line 2: not YAML: found undefined alias"),
        ("model: x\nseed: \x07\n", "line 2: not YAML: special characters are not allowed"),
        ("model: !!python/object:os.x {}", "line 1: not YAML: could not determine a constructor"),
        ("{[1]: 2}", "line 1: not YAML: found unhashable key"),
        ("model: 2024-13-45", "holds a value that YAML cannot read: month must be in 1..12"),
        ("[" * 600, "holds a value that YAML cannot read"),
        ("- model: x", "must be a mapping of keys, got list"),
        ("model", "must be a mapping of keys, got str"),
        ("3", "must be a mapping of keys, got int"),
        ("1: x", "1: a key must be text, got int"),
        ("model: x\n---\nmodel: y\n", "line 2: not YAML: but found another document"),
    ],
)
def test_malformed_yaml_names_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        read_yaml(path)
    assert one_line(raised).startswith(f"{path}: {message}")


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model: é".encode("latin-1"))
    for path, message in (
        (tmp_path / "none.yaml", r"no such configuration; give a YAML file or --recipe demo\|"),
        (tmp_path, "cannot be read as UTF-8 YAML: .*directory"),
        (latin, "cannot be read as UTF-8 YAML: "),
    ):
        with pytest.raises(ConfigError, match=message) as raised:
            read_yaml(path)
        assert one_line(raised).startswith(f"{path}: ")


def test_yaml_with_bom_crlf_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("\ufeffmodel: é\r\nseed: 3\r\n".encode())
    assert read_yaml(path) == {"model": "é", "seed": 3}
    path.write_bytes(b"# nothing\n")
    assert read_yaml(path) == {}


def test_words_from_the_command_line() -> None:
    words = resolve_words("template", ("sw=neno = {word}", "en={word}"), "none")
    assert words.template == {"sw": "neno = {word}", "en": "{word}"}
    assert words.prefix == "none"
    for templates, message in (
        ((), "'template' needs a template per language"),
        (("neno {word}",), r"--template neno \{word\}: must be LANGUAGE=TEXT"),
        (("sw=neno",), r"template for 'sw' must contain \{word\} once"),
    ):
        with pytest.raises(ConfigError, match=message) as raised:
            resolve_words("template", templates, "auto")
        assert one_line(raised).startswith("--")


@pytest.mark.parametrize("train", [{}, {"batch_size": 16}, {"epochs": None, "steps": None}])
def test_five_epochs_by_default(train: dict[str, Any]) -> None:
    config = resolve_config({"model": "m", "train": train}, "here")
    assert (config.train.epochs, config.train.steps) == (5, None)


def test_languages_may_be_comma_separated() -> None:
    values = {"model": "m", "data": {"languages": "amharic, english"}}
    assert resolve_config(values, "here").data.languages == ("amharic", "english")


def test_articles_alone_are_short_for_a_section_of_data() -> None:
    config = resolve(objective="sft", data="xlsum:swahili")
    assert config.data.texts == "xlsum:swahili"
    assert config.data.columns == ("text", "summary")
    # a row alone is a batch there
    assert resolve(objective="sft", data="a.jsonl", train={"batch_size": 1}).train.batch_size == 1
