"""What a run is made of: recipes and YAML files, checked and resolved to one ``RunConfig``."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tli_engine.errors import ConfigError

Pooling = Literal["paper", "content", "last", "weighted"]
Presentation = Literal["bare", "leading-space", "template"]
Space = Literal["raw", "centred", "whitened"]
Quantize = Literal["auto", "none", "nf4"]
Numerics = Literal["exact", "fast"]
Residency = Literal["nf4", "bf16", "auto"]
Loss = Literal["triplet-hardest", "triplet-semihard", "infonce"]
PositiveInt = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Word pairs: files or ``builtin:sw-en``, and the columns that hold the two languages."""

    pairs: str = "builtin:sw-en"
    control: str | None = None
    languages: tuple[str, str] = ("swahili", "english")
    limit: PositiveInt | None = None

    @field_validator("languages", mode="before")
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        # --set data.languages=amharic,english
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _two_columns(self) -> "DataConfig":
        if self.languages[0] == self.languages[1] or not all(self.languages):
            raise ValueError("languages must be two different columns")
        return self


class WordsConfig(_Section):
    """How a word becomes tokens: alone, after a space, or inside a template per language."""

    presentation: Presentation = "bare"
    template: dict[str, str] = {}
    prefix: str = "auto"

    @model_validator(mode="after")
    def _template_has_the_word(self) -> "WordsConfig":
        if self.presentation == "template" and not self.template:
            raise ValueError("presentation 'template' needs a template per language")
        for language, template in self.template.items():
            if template.count("{word}") != 1:
                raise ValueError(f"template for {language!r} must contain {{word}} once")
        return self


class LoraConfig(_Section):
    """Low-rank adapters: which blocks and projections carry them, and their size."""

    # YAML reads a single block, layers: 0, as a number
    layers: Annotated[str, Field(coerce_numbers_to_str=True)] = "0-1"
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    r: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    init: str | None = None


class AlignConfig(_Section):
    """The contrastive objective on pooled vectors of ``hidden_states[layer]``."""

    layer: PositiveInt = 2
    pooling: Pooling = "content"
    loss: Loss = "infonce"
    margin: Annotated[float, Field(gt=0)] = 0.4
    temperature: Annotated[float, Field(gt=0)] = 0.05
    space: Space = "raw"
    two_way: bool = True
    mask_duplicates: bool = True


class TrainConfig(_Section):
    """Optimizer, schedule and length of training."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    batch_size: Annotated[int, Field(ge=2)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    checkpoint_steps: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2
    tensorboard: bool = False
    # who computes a step: transformers' modules, or the engine's ops; auto: these on a GPU
    engine: Literal["auto", "modules", "fused"] = "auto"
    cuda_graph: bool = True
    # rows of a pack at the most: a larger batch is encoded in parts, with exact gradients
    chunk_tokens: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _five_epochs_by_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is values.get("steps") is None:
            return {**values, "epochs": 5}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("only one of epochs and steps can be set")
        return self


class RunConfig(_Section):
    """One training run; ``provenance`` is what a run folder records beside it, and is not read."""

    model: str
    objective: Literal["align"] = "align"
    method: Literal["lora"] = "lora"
    # torch's generators take 64 bits
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Quantize = "auto"
    double_quant: bool = False
    # of products with NF4 weights; see docs/nf4-layers.md
    numerics: Numerics = "exact"
    weight_residency: Residency = "nf4"
    data: DataConfig = DataConfig()
    words: WordsConfig = WordsConfig()
    lora: LoraConfig = LoraConfig()
    align: AlignConfig = AlignConfig()
    train: TrainConfig = TrainConfig()
    provenance: dict[str, Any] | None = None


def recipe_names() -> list[str]:
    """Names that ``--recipe`` takes."""
    folder = files("tli_engine") / "recipes"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def read_recipe(name: str) -> dict[str, Any]:
    """The mapping of a shipped recipe."""
    if name not in recipe_names():
        raise ConfigError(f"--recipe: no recipe {name!r}; there are {', '.join(recipe_names())}")
    text = (files("tli_engine") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return _mapping(text, f"recipe {name}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such configuration; give a YAML file or --recipe "
            f"{'|'.join(recipe_names())}"
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as UTF-8 YAML: {e}") from e
    return _mapping(text, str(path))


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as e:
        line = f"line {e.problem_mark.line + 1}: " if e.problem_mark else ""
        raise ConfigError(f"{where}: {line}not YAML: {e.problem}") from e
    except yaml.reader.ReaderError as e:
        line = f"line {text[: e.position].count(chr(10)) + 1}: "
        raise ConfigError(f"{where}: {line}not YAML: {e.reason}: #x{e.character:04x}") from e
    except (ValueError, RecursionError) as e:
        # a date such as 2024-13-45, brackets hundreds deep
        raise ConfigError(f"{where}: holds a value that YAML cannot read: {e}") from e
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a mapping of keys, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: {key!r}: a key must be text, got {type(key).__name__}")
    return value


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return ``values`` with each ``key=value`` (dotted key, YAML value) of ``--set`` applied."""
    result = _deep_copy(values)
    for override in overrides:
        key, separator, text = override.partition("=")
        *parents, leaf = key.split(".")
        if not separator or not all((*parents, leaf)):
            raise ConfigError(f"--set {override}: must be key=value, e.g. train.learning_rate=1e-4")
        section = result
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise ConfigError(f"--set {override}: {parent!r} is a value, not a section")
        try:
            section[leaf] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            raise ConfigError(f"--set {override}: the value is not YAML") from e
    # --set train.steps=100 over a recipe that counts epochs, or the other way round
    lengths = {o.partition("=")[0] for o in overrides} & {"train.steps", "train.epochs"}
    if len(lengths) == 1 and isinstance(result["train"], dict):
        other = {"train.steps": "epochs", "train.epochs": "steps"}[lengths.pop()]
        result["train"].pop(other, None)
    return result


def _deep_copy(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, dict) else v for k, v in values.items()}


def resolve_config(values: dict[str, Any], where: str) -> RunConfig:
    """Check ``values`` and fill in the defaults.

    Raises:
        ConfigError: Names the file or recipe, the key, what is wrong and what is allowed.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as e:
        raise ConfigError(f"{where}: {_explain(e.errors()[0])}") from None


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        return f"{key}: unknown key; known here: {', '.join(section.model_fields)}"
    if error["type"] == "missing":
        return f"{key}: is required"
    if error["type"] == "model_type":
        return f"{key}: must be a section of keys (got {error['input']!r})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]} (got {error['input']!r})"


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def resolve_words(
    presentation: Presentation, templates: tuple[str, ...], prefix: str
) -> WordsConfig:
    """The ``words`` section from command-line options, ``LANGUAGE=TEXT`` each template."""
    for template in templates:
        if "=" not in template:
            raise ConfigError(f"--template {template}: must be LANGUAGE=TEXT with {{word}} in it")
    pairs = dict(template.split("=", 1) for template in templates)
    try:
        return WordsConfig(presentation=presentation, template=pairs, prefix=prefix)
    except ValidationError as e:
        raise ConfigError(f"--presentation, --template: {_explain(e.errors()[0])}") from None


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with local files and folders spelled out, for use from another folder."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).absolute()) if name and Path(name).exists() else name

    data = {"pairs": absolute(config.data.pairs), "control": absolute(config.data.control)}
    return config.model_copy(
        update={
            "model": absolute(config.model),
            "data": config.data.model_copy(update=data),
            "lora": config.lora.model_copy(update={"init": absolute(config.lora.init)}),
        }
    )
