import json

import pytest

from tli_engine.data.check import CheckReport, check
from tli_engine.data.pairs import PairList
from tli_engine.data.words import Word

SW_EN = ("swahili", "english")


def pairs(*rows: str, languages: tuple[str, str] = SW_EN) -> PairList:
    """Pairs written ``maji=water``."""
    source, target = zip(*(row.split("=") for row in rows), strict=True)
    return PairList(languages, source, target)


def letters(words: tuple[str, ...], language: str) -> list[Word]:
    """A tokenizer: a token a letter, and one more for Swahili words."""
    extra = language == "swahili"
    return [Word((0,) * (len(w) + extra), (True,) * (len(w) + extra)) for w in words]


def test_clean_pairs() -> None:
    report = check(pairs("maji=water", "moto=fire"), pairs("ndege=bird"))
    assert report.warnings == []
    assert report.duplicate_pairs == 0
    assert report.identical_sides == []
    assert report.leaks == {"swahili": [], "english": []}
    assert (report.train["swahili"].words, report.control["english"].words) == (2, 1)


def test_repeated_words_are_counted_by_side() -> None:
    report = check(pairs("maji=water", "Maji=liquid", "bahari=water", "ziwa=lake"), None)
    assert report.train["swahili"].repeated == {"maji": 2}
    assert report.train["english"].repeated == {"water": 2}
    assert (report.train["swahili"].words, report.train["swahili"].distinct) == (4, 3)
    # no pair repeats, though both of its words do
    assert report.duplicate_pairs == 0
    assert [w.split(":")[0] for w in report.warnings] == [
        "1 swahili words repeat in training",
        "1 english words repeat in training",
    ]
    assert all("align.mask_duplicates" in w for w in report.warnings)


def test_duplicate_pairs_differ_by_case_spaces_or_composition_only() -> None:
    report = check(pairs("é=Big  house", "e\u0301=big house", "É=BIG HOUSE", "a=b"), None)
    assert report.duplicate_pairs == 2


def test_leaks_are_found_on_each_side() -> None:
    train = pairs("maji=water", "moto=fire", "mti=tree")
    report = check(train, pairs("MAJI=liquid", "jiko=Fire", "ua=flower"))
    assert report.leaks == {"swahili": ["maji"], "english": ["fire"]}
    assert report.warnings == [
        "1 swahili control words are in training: not unseen",
        "1 english control words are in training: not unseen",
    ]
    # a language's words are not sought among the other's
    assert check(train, pairs("water=maji")).leaks == {"swahili": [], "english": []}


def test_without_control_pairs_there_are_no_leaks() -> None:
    report = check(pairs("maji=water", "moto=fire"), None)
    assert report.leaks == {}
    assert report.control == {}


def test_identical_sides() -> None:
    report = check(pairs("redio=Radio", "Picha=picha", "video=video", "video=VIDEO"), None)
    assert report.identical_sides == ["picha", "video"]


@pytest.mark.parametrize("languages", [SW_EN, ("english", "swahili")])
def test_class_cue(languages: tuple[str, str]) -> None:
    """Infinitive markers on both sides, whichever language comes first."""
    verbs = ["kusoma=to read", "kuona=to see", "kula=to eat", "maji=water"]
    if languages[0] == "english":
        verbs = ["=".join(reversed(v.split("="))) for v in verbs]
    (warning,) = check(pairs(*verbs, languages=languages), None).warnings
    assert warning.startswith("3 pairs begin with ")
    assert "'ku'" in warning
    assert "'to '" in warning
    # the same words without their markers teach nothing
    bare = [v.replace("ku", "").replace("to ", "") for v in verbs]
    assert check(pairs(*bare, languages=languages), None).warnings == []


def test_two_markers_or_one_sided_ones_are_no_cue() -> None:
    two = pairs("kusoma=to read", "kuona=to see", "kuku=chicken", "kundi=group")
    one_sided = pairs("kusoma=read", "kuona=see", "kula=eat", "maji=to water")
    for clean in (two, one_sided):
        assert check(clean, None).warnings == []
    assert check(two, None).train["swahili"].common_prefixes == {"ku": 4}
    assert check(two, None).train["english"].common_prefixes == {"to ": 2}


def test_lengths_in_words_and_tokens() -> None:
    report = check(pairs("maji=water", "nyumba kubwa=big house", "a=b"), None, letters)
    assert report.train["swahili"].multi_word == 1
    assert report.train["swahili"].tokens == {"mean": 6.67, "median": 5, "max": 13}
    assert report.train["english"].tokens == {"mean": 5.0, "median": 5, "max": 9}
    assert check(pairs("a=b"), None).train["english"].tokens == {}


def test_json_holds_everything() -> None:
    report = check(pairs("é=water", "é=water", "video=video"), pairs("é=lake"), letters)
    values = json.loads(json.dumps(report.to_json()))
    assert values.keys() == CheckReport.__dataclass_fields__.keys()
    assert values["duplicate_pairs"] == 1
    assert values["leaks"] == {"swahili": ["é"], "english": []}
    assert values["train"]["swahili"]["repeated"] == {"é": 2}
    assert values["control"]["english"]["words"] == 1
