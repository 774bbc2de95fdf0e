"""What a run is made of: recipes and YAML files, checked and resolved to one ``RunConfig``."""

from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tli_engine.config_combinations import OF_TEXTS as OF_TEXTS
from tli_engine.config_combinations import PRESETS as PRESETS
from tli_engine.config_combinations import ROUNDING_OF_FP32 as ROUNDING_OF_FP32
from tli_engine.config_combinations import check_combination
from tli_engine.config_data import DataConfig as DataConfig
from tli_engine.config_data import PositiveInt as PositiveInt
from tli_engine.config_distributed import DistributedConfig
from tli_engine.errors import ConfigError

Pooling = Literal["paper", "content", "last", "weighted"]
Presentation = Literal["bare", "leading-space", "template"]
Space = Literal["raw", "centred", "whitened"]
Quantize = Literal["auto", "none", "nf4"]
Numerics = Literal["exact", "fast"]
Residency = Literal["nf4", "bf16", "auto"]
Loss = Literal["triplet-hardest", "triplet-semihard", "infonce"]
# of configurations
Kind = Literal["run", "compare"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class PromptConfig(_Section):
    """What a model reads before it writes: an instruction with the article in it.

    ``template`` is ``chat`` for the tokenizer's chat template, ``plain`` for none, ``auto`` for the
    tokenizer's if it has one.
    """

    template: Literal["auto", "chat", "plain"] = "auto"
    instruction: str = "Fupisha habari hii kwa sentensi moja.\n\n{text}\n\nMuhtasari:"

    @field_validator("instruction")
    @classmethod
    def _has_the_text(cls, value: str) -> str:
        if value.count("{text}") != 1:
            raise ValueError("must contain {text} once")
        return value


class SftConfig(_Section):
    """Supervised fine-tuning: the loss is on the summary's tokens alone."""

    # tokens of a row: of packed examples, or of one
    context: Annotated[int, Field(ge=8)] = 2048
    packing: bool = True
    attention: Literal["auto", "sdpa", "varlen", "flash-attn"] = "auto"
    # what a block keeps for the way back: all, only its input, or all where that fits
    activations: Literal["auto", "save", "recompute"] = "auto"
    # weight of the align objective in joint training
    align_weight: Annotated[float, Field(gt=0)] = 1.0
    # pairs in each of its batches
    align_pairs: Annotated[int, Field(ge=2)] = 32
    # steps between two measurements of the loss on data.validation; the end of training is one
    evaluate_steps: PositiveInt = 100
    # measurements without a better one before training stops; null: none stops it
    patience: PositiveInt | None = None


class TrainConfig(_Section):
    """Optimizer, schedule and length of training."""

    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    # training time after which no other step begins; the schedule is that of all steps
    seconds: Annotated[float, Field(gt=0)] | None = None
    # pairs; rows of tokens where summaries are written
    batch_size: PositiveInt = 8
    # AdamW's first updates are ten times as long, in fp32
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = 2e-4
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    # steps at the end in which the wsd schedule (warm-up, stable, decay) falls to zero
    decay_steps: PositiveInt | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    checkpoint_steps: PositiveInt = 200
    keep_checkpoints: PositiveInt = 2
    tensorboard: bool = False
    # who computes a step: transformers' modules, or the engine's ops; auto: these on a GPU
    engine: Literal["auto", "modules", "fused"] = "auto"
    # replay a step's launches from a CUDA graph; auto: where they take longer than the GPU's work
    cuda_graph: bool | Literal["auto"] = "auto"
    # rows of a pack at the most: a larger batch is encoded in parts, with exact gradients
    chunk_tokens: PositiveInt | None = None
    # the rest is for the objectives sft and joint: batches of batch_size rows whose gradients are
    # added up in a step
    accumulate: PositiveInt = 1
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-paged-8bit"] = "adamw"
    # LoRA+: how many times A's learning rate B has
    lora_plus: Annotated[float, Field(ge=1)] = 1.0
    # of full fine-tuning in bf16: an fp32 master copy, or updates rounded at random
    rounding: Literal["master", "stochastic"] = "master"
    # of full fine-tuning: update each weight as soon as its gradient is there, and free that
    in_backward: bool = False

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
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError("decay_steps goes with schedule: wsd, and it needs them")
        if self.in_backward and (self.accumulate > 1 or self.max_grad_norm is not None):
            raise ValueError(
                "in_backward frees each gradient: it needs accumulate 1 and no max_grad_norm"
            )
        return self


class RunConfig(_Section):
    """One training run; ``provenance`` is what a run folder records beside it, and is not read."""

    model: str
    objective: Literal["align", "sft", "joint"] = "align"
    method: Literal["lora", "full"] = "lora"
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
    prompt: PromptConfig = PromptConfig()
    sft: SftConfig = SftConfig()
    train: TrainConfig = TrainConfig()
    distributed: DistributedConfig = DistributedConfig()
    provenance: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        check_combination(self)
        return self


def recipe_names(kind: Kind = "run") -> list[str]:
    """Names that ``--recipe`` takes: of runs, or of comparisons, which are called ``compare-…``."""
    names = (f.name for f in (files("tli_engine") / "recipes").iterdir())
    found = sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
    return [name for name in found if name.startswith("compare-") == (kind == "compare")]


def read_recipe(name: str, kind: Kind = "run") -> dict[str, Any]:
    """The mapping of a shipped recipe."""
    known = recipe_names(kind)
    if name not in known:
        raise ConfigError(f"--recipe: no recipe {name!r}; there are {', '.join(known)}")
    text = (files("tli_engine") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return _mapping(text, f"recipe {name}")


def read_yaml(path: Path, kind: Kind = "run") -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such configuration; give a YAML file or --recipe "
            f"{'|'.join(recipe_names(kind))}"
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
    result = deepcopy(values)
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


def resolve_config(values: dict[str, Any], where: str) -> RunConfig:
    """Check ``values`` and fill in the defaults.

    Raises:
        ConfigError: Names the file or recipe, the key, what is wrong and what is allowed.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as e:
        raise ConfigError(f"{where}: {explain(e.errors()[0])}") from None


def explain(error: Any, root: Any = None) -> str:
    """One line on an error of pydantic's: the key, what is wrong and allowed, a single value."""
    key = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] == "extra_forbidden":
        section: Any = root or RunConfig
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        known = f"known here: {', '.join(section.model_fields)}"
        if key == "compare":
            known = "it is of a comparison, which tli-engine compare runs"
        return f"{key}: unknown key; {known}"
    if error["type"] == "missing":
        return f"{key}: is required"
    if error["type"] == "model_type":
        return f"{key}: must be a section of keys (got {error['input']!r})"
    message = error["msg"].removeprefix("Value error, ")
    line = f"{key}: {message[0].lower()}{message[1:]}"
    names_keys = error["type"] == "value_error" and isinstance(error["input"], dict)
    return line.removeprefix("(top level): ") if names_keys else f"{line} (got {error['input']!r})"


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every default written out."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that reads back as they are, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text with a line break of Unicode's, which plain YAML would read as a space."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    quoted = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


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
        raise ConfigError(f"--presentation, --template: {explain(e.errors()[0])}") from None


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with local files and folders spelled out, for use from another folder."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).absolute()) if name and Path(name).exists() else name

    names = ("pairs", "control", "texts", "validation", "test")
    paths = {name: absolute(getattr(config.data, name)) for name in names}
    data = config.data.model_copy(update=paths)
    lora = config.lora.model_copy(update={"init": absolute(config.lora.init)})
    return config.model_copy(update={"model": absolute(config.model), "data": data, "lora": lora})
