"""What a run learns from: the section ``data`` of a run."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(ge=1)]


class DataConfig(BaseModel):
    """Word pairs: files or ``builtin:sw-en``, and the columns that hold the two languages.

    For objectives that write summaries, articles: ``xlsum:LANGUAGE``, or a JSON Lines, CSV or Parquet
    file, with the columns that hold an article and its summary. ``data: xlsum:swahili`` is short for
    ``data: {texts: xlsum:swahili}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    pairs: str = "builtin:sw-en"
    control: str | None = None
    languages: tuple[str, str] = ("swahili", "english")
    limit: PositiveInt | None = None
    texts: str | None = None
    # articles to measure the loss on while training; a preset has its own
    validation: str | None = None
    # articles for a comparison to summarise; a preset has its own
    test: str | None = None
    columns: tuple[str, str] = ("text", "summary")
    # articles to train on at most, and to measure on
    texts_limit: PositiveInt | None = None
    validation_limit: PositiveInt = 256
    # name or code of the summaries' language, whose words BLEU and ROUGE count; a preset has its own
    language: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_texts(cls, values: Any) -> Any:
        return {"texts": values} if isinstance(values, str) else values

    @field_validator("languages", "columns", mode="before")
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        # --set data.languages=amharic,english
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _two_columns(self) -> "DataConfig":
        for name, columns in (("languages", self.languages), ("columns", self.columns)):
            if columns[0] == columns[1] or not all(columns):
                raise ValueError(f"{name} must be two different columns")
        return self
