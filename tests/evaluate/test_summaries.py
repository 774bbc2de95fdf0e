"""The language of summaries, and what is said where their words are not to be seen."""

import json
from pathlib import Path

import pytest

from tli_engine.config import DataConfig
from tli_engine.data.texts import Article
from tli_engine.evaluate.summaries import language_of, spacing_warning
from tli_engine.evaluate.text_metrics import tokenizer_of

SUMMARIES = json.loads((Path(__file__).parent / "summaries.json").read_text(encoding="utf-8"))
THAI = "น้ำท่วมเมืองหลังฝนตกหนักเมื่อคืนนี้ ประชาชนหลายพันคนต้องอพยพออกจากบ้าน"


@pytest.mark.parametrize(
    ("data", "language"),
    [
        ({}, None),
        ({"texts": "news.jsonl"}, None),
        ({"texts": "builtin:sw-demo"}, None),
        ({"texts": "xlsum:thai"}, "thai"),
        ({"texts": "news.jsonl", "language": "zh"}, "zh"),
        # headlines in another language than the articles
        ({"texts": "xlsum:thai", "language": "english"}, "english"),
    ],
)
def test_the_language_is_the_configurations(data: dict[str, str], language: str | None) -> None:
    assert language_of(DataConfig(**data)) == language  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokenizer", "languages"),
    [
        ("13a", [None, "swahili", "serbian_latin", "klingon"]),
        ("zh", ["Chinese", "chinese_simplified", "zh-CN", "zh_Hant", "zh"]),
        ("char", ["Thai", "ja", "ja-JP", "burmese"]),
    ],
)
def test_names_and_codes(tokenizer: str, languages: list[str | None]) -> None:
    assert {tokenizer_of(language) for language in languages} == {tokenizer}


@pytest.mark.parametrize("language", SUMMARIES)
def test_only_texts_without_spaces_are_spoken_of(language: str) -> None:
    articles = [Article(s["reference"], s["reference"], "") for s in SUMMARIES[language]]
    line = spacing_warning(articles, None)
    assert (line is not None) == (language == "chinese")
    assert spacing_warning(articles, language) is None


def test_a_language_that_is_not_known_to_have_no_spaces() -> None:
    # a summary may be too short to tell
    line = spacing_warning([Article(THAI, "ข่าว", "")], "siamese")
    assert line is not None
    assert "hardly any spaces" in line
    assert "'siamese' is not known as such; set data.language" in line
    assert spacing_warning([Article(THAI, "ข่าว", "")], "th") is None
    assert spacing_warning([Article("Mvua kubwa imenyesha mjini leo.", THAI, "")], None)
