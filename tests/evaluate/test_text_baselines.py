"""Baselines: the first sentences in several scripts, and the summary of another article."""

import time
from collections import Counter

import pytest

from tli_engine.evaluate.text_baselines import (
    baseline_texts,
    lead,
    random_summaries,
    split_sentences,
)


@pytest.mark.parametrize(
    "sentences",
    [
        ["Mvua kubwa ilinyesha jana.", "Watu 1,200 walihama!", "Je, itaendelea?", "Haijulikani…"],
        ["Bei ilipanda kwa asilimia 3.5 jana.", "Wauzaji walilalamika."],
        ["Dkt. Asha J. Mrema alisema saa 4 k.m. kwamba maji yapo.", "Bw. Juma alikubali."],
        ["Alisema: “Tutarudi kesho.”", "Kisha akaondoka (bila kusema zaidi.)", "Mwisho"],
        ["Walifunga mabao 3.", "Mechi... iliisha saa moja."],
        ["ከተማዋ አዲስ ቤተ መጻሕፍት ከፈተች።", "ልጆች ተደሰቱ፡፡", "መቼ ይዘጋል፧", "አልታወቀም።"],
        ["افتتحت المدينة مكتبة جديدة.", "هل هي مجانية؟", "نعم!"],
        ["新图书馆开放了。", "“真好！”", "票价3.5元？", "不知道。"],  # noqa: RUF001
        ["डा. शर्मा आए।", "मूल्य रु. ५० छ.", "राम्रो छ।", "कहिले बन्द हुन्छ?", "थाहा छैन॥"],
        ["Kichwa bila nukta", "Sentensi ya kwanza.", "Ya pili."],
    ],
    ids=lambda s: s[0][:12],
)
def test_sentences(sentences: list[str]) -> None:
    unspaced = sentences[0].endswith("。")
    text = ("\n" if sentences[0].startswith("Kichwa") else "" if unspaced else " ").join(sentences)
    assert split_sentences(text) == sentences
    assert lead(text, 1) == sentences[0]
    assert lead(text, 3) == "\n".join(sentences[:3])


@pytest.mark.parametrize("text", ["", " \n\n "])
def test_no_sentences(text: str) -> None:
    assert split_sentences(text) == []
    assert lead(text, 3) == ""


@pytest.mark.parametrize("text", ["." * 30_000 + "x", '."' * 15_000 + "x", '!")' * 10_000 + "x"])
def test_a_run_of_stops_is_looked_at_once(text: str) -> None:
    start = time.perf_counter()
    assert split_sentences(text) == [text]
    assert time.perf_counter() - start < 2


def test_no_letter_is_lost() -> None:
    text = "A. B! c?d e... F\n\n.  G.H. i 3. \t? “J.” k。L"
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_summaries_are_of_other_articles_each_as_often() -> None:
    summaries = [str(i) for i in range(5)]
    drawn = Counter(
        (i, other)
        for seed in range(400)
        for i, other in enumerate(random_summaries(summaries, seed))
    )
    assert all(str(i) != other for i, other in drawn)
    assert len(drawn) == 20
    # 100 are expected, ± 9
    assert 55 < min(drawn.values()) <= max(drawn.values()) < 145


def test_summaries_are_repeatable() -> None:
    summaries = [str(i) for i in range(30)]
    assert random_summaries(summaries) == random_summaries(summaries)
    assert random_summaries(summaries) != random_summaries(summaries, seed=1)
    assert random_summaries(["pekee"]) == [""]
    assert random_summaries([]) == []


def test_all_baselines() -> None:
    found = baseline_texts(["Moja. Mbili. Tatu. Nne."] * 2, ["a", "b"])
    assert found == {
        "lead-1": ["Moja."] * 2,
        "lead-3": ["Moja.\nMbili.\nTatu."] * 2,
        "random-summary": ["b", "a"],
    }
