"""BLEU, chrF++ and ROUGE of generated texts, each with an interval and a signature."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from tli_engine import __version__
from tli_engine.errors import UserError
from tli_engine.evaluate.rouge import rouge, split_lines

Metric = Literal["bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum"]
Array = NDArray[np.float64]
# statistics and a signature
_Counted = tuple[Array, str]

RESAMPLES = 10_000
# weights of texts in resamples, held at a time
BLOCK = 1 << 21
_BLEU_ORDERS = 4
_ROUGE: tuple[Metric, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# sacreBLEU's tokenizers for scripts that put no spaces between words; 13a for all others
_TOKENIZERS = {
    **dict.fromkeys(("chinese", "mandarin", "zh"), "zh"),
    **dict.fromkeys(("burmese", "japanese", "khmer", "lao", "thai", "tibetan"), "char"),
    **dict.fromkeys(("my", "ja", "km", "lo", "th", "bo"), "char"),
}


@dataclass(frozen=True, eq=False)
class Score:
    """One figure of all texts.

    Attributes:
        metric: Its name.
        score: From 0 to 100: BLEU and chrF++ of the corpus, the texts' mean F1 of ROUGE.
        per_text: That of each text alone, ``[N]``; BLEU's of the n-gram orders the text has. Of
            pooled runs, the mean.
        ci95: Percentile interval over resampled texts; NaN of fewer than two.
        signature: Figures with the same one can be compared.
        statistics: Counts of each text, ``[N, K]``; their sum over any texts gives those texts'
            score, by :func:`score_sums`.
        runs: How many are pooled in it.
    """

    metric: Metric
    score: float
    per_text: Array = field(repr=False)
    ci95: tuple[float, float]
    signature: str
    statistics: Array = field(repr=False)
    runs: int = 1

    def report(self) -> dict[str, object]:
        """Score, interval and signature, for JSON."""
        return {"score": self.score, "ci95": list(self.ci95), "signature": self.signature}


class TextScores(NamedTuple):
    """All figures of the same texts."""

    bleu: Score
    chrf: Score
    rouge1: Score
    rouge2: Score
    rougeL: Score
    rougeLsum: Score

    def report(self) -> dict[str, dict[str, object]]:
        """Every figure by its metric, for JSON."""
        return {score.metric: score.report() for score in self}


def tokenizer_of(language: str | None) -> str:
    """SacreBLEU's tokenizer for a language's name or code, ``zh_Hant`` and ``chinese_simplified`` too."""
    name = (language or "").lower().replace("-", "_").partition("_")[0]
    return _TOKENIZERS.get(name, "13a")


def score_texts(
    predictions: Sequence[str],
    references: Sequence[str],
    language: str | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> TextScores:
    """Score texts against one reference each.

    BLEU and chrF++ (character order 6, word order 2) are sacreBLEU's; ROUGE is of XL-Sum's words,
    without a stemmer, Lsum's sentences being lines. Where either side is empty a text scores 0.

    Args:
        predictions: What a system wrote.
        references: What people wrote, in the same order.
        language: Name or code. Where words are not spaced, BLEU and ROUGE count characters:
            sacreBLEU's ``zh`` and ``char`` in place of 13a; signatures say so.
        resamples: For the intervals; the same for all figures.
        seed: Of the resampling.

    Raises:
        UserError: Not as many references as predictions, or none.
    """
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions for {len(references)} references")
    if not predictions:
        raise UserError("no texts to score")
    tokenizer = tokenizer_of(language)
    counted: dict[Metric, _Counted] = {
        "bleu": _sacrebleu(BLEU(tokenize=tokenizer, force=True), predictions, references),
        "chrf": _sacrebleu(CHRF(word_order=2), predictions, references),
        **_rouge(predictions, references, characters=tokenizer == "char"),
    }
    scores = _scores(counted, resamples, seed)
    return TextScores(**{score.metric: score for score in scores})


def pool(runs: Sequence[Score], *, resamples: int = RESAMPLES, seed: int = 0) -> Score:
    """One figure of several runs on the same texts, such as seeds: every text once a run.

    The interval resamples texts, each with all its runs; it does not cover how runs differ.

    Raises:
        UserError: The runs were not scored alike, or not on as many texts.
    """
    for run in runs[1:]:
        require_alike(runs[0], run)
    first = runs[0]
    summed = np.sum([run.statistics for run in runs], axis=0)
    count = sum(run.runs for run in runs)
    counted: dict[Metric, _Counted] = {first.metric: (summed, first.signature)}
    score = _scores(counted, resamples, seed, count)[0]
    mean = np.average([run.per_text for run in runs], axis=0, weights=[run.runs for run in runs])
    return replace(score, per_text=mean)


def require_alike(first: Score, second: Score) -> None:
    """Raise ``UserError`` unless two figures are of the same kind and of as many texts."""
    if first.signature != second.signature or first.metric != second.metric:
        raise UserError(
            f"scored differently: {first.metric} {first.signature} and "
            f"{second.metric} {second.signature}; score both with one version and language"
        )
    if len(first.statistics) != len(second.statistics):
        raise UserError(
            f"{first.metric} of {len(first.statistics)} texts and of {len(second.statistics)}; "
            "only systems on the same texts can be compared"
        )


def score_sums(metric: Metric, sums: Array, runs: int = 1) -> Array:
    """Scores of texts from their summed statistics over so many runs, ``[..., K]`` to ``[...]``."""
    if metric == "bleu":
        return _bleu(sums, runs=runs)
    if metric == "chrf":
        return _chrf(sums)
    score: Array = 100 * sums[..., 0] / sums[..., 1]
    return score


def resample_sums(statistics: Array, resamples: int, seed: int) -> Array:
    """Summed statistics of texts drawn with replacement, ``[N, K]`` to ``[resamples, K]``.

    The draws depend on the seed and the number of texts alone, so systems' resamples are paired.
    """
    generator = np.random.default_rng(seed)
    count = len(statistics)
    block = max(1, BLOCK // count)
    sums = np.empty((resamples, statistics.shape[1]))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(0, count, (rows, count)) + np.arange(rows)[:, None] * count
        weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        # a product of whole numbers: exact for BLEU and chrF++
        sums[start : start + rows] = weights.astype(np.float64) @ statistics
    return sums


def _scores(
    counted: dict[Metric, _Counted], resamples: int, seed: int, runs: int = 1
) -> list[Score]:
    """Figures of statistics and signatures; all share the resamples."""
    statistics = [s for s, _ in counted.values()]
    drawn = resample_sums(np.hstack(statistics), resamples, seed)
    columns = np.cumsum([s.shape[1] for s in statistics])[:-1]
    scores = []
    for (metric, (s, signature)), sums in zip(
        counted.items(), np.split(drawn, columns, axis=1), strict=True
    ):
        low = high = float("nan")
        if len(s) > 1:
            low, high = map(float, np.quantile(score_sums(metric, sums, runs), (0.025, 0.975)))
        per_text = _bleu(s, effective_order=True) if metric == "bleu" else score_sums(metric, s)
        score = float(score_sums(metric, s.sum(0), runs))
        scores.append(Score(metric, score, per_text, (low, high), signature, s, runs))
    return scores


def _sacrebleu(
    metric: BLEU | CHRF, predictions: Sequence[str], references: Sequence[str]
) -> _Counted:
    # what sacreBLEU itself resamples; a text's counts are nowhere else to be had
    counts = metric._extract_corpus_statistics(predictions, [references])
    return np.array(counts, dtype=np.float64), str(metric.get_signature())


def _rouge(
    predictions: Sequence[str], references: Sequence[str], characters: bool
) -> dict[Metric, _Counted]:
    f1 = np.array(
        [
            rouge(split_lines(p, characters), split_lines(r, characters))
            for p, r in zip(predictions, references, strict=True)
        ]
    )
    tokenizer = "xlsum-char" if characters else "xlsum"
    signature = f"nrefs:1|case:lc|tok:{tokenizer}|stem:no|f:1|avg:texts"
    version = f"version:tli-engine-{__version__}"
    return {
        name: (
            np.column_stack([column, np.ones(len(column))]),
            f"{signature}|sent:lines|{version}"
            if name == "rougeLsum"
            else f"{signature}|{version}",
        )
        for name, column in zip(_ROUGE, f1.T, strict=True)
    }


def _bleu(sums: Array, effective_order: bool = False, runs: int = 1) -> Array:
    """BLEU of lengths, matched and counted n-grams, ``[..., 2 + 4 + 4]``, smoothed as sacreBLEU's ``exp``.

    What no n-gram of several runs matches is smoothed as of one: else more runs would have a lower score.
    """
    length, expected = sums[..., 0], sums[..., 1]
    matched, total = np.split(sums[..., 2:], [_BLEU_ORDERS], axis=-1)
    # orders beyond the first that no text is long enough for are not looked at
    counted = np.logical_and.accumulate(total > 0, axis=-1)
    missed = counted & (matched == 0)
    smoothed = np.where(missed, runs * 0.5 ** np.cumsum(missed, axis=-1), matched)
    precision = np.where(counted, smoothed, 1.0) / np.where(counted, total, 1.0)
    orders = counted.sum(-1) if effective_order else np.full(length.shape, _BLEU_ORDERS)
    mean = np.log(precision).sum(-1) / np.maximum(orders, 1)
    brevity = np.minimum(0.0, 1 - expected / np.maximum(length, 1))
    defined = matched.any(-1) & (effective_order | counted.all(-1))
    score: Array = np.where(defined, 100 * np.exp(mean + brevity), 0.0)
    return score


def _chrf(sums: Array, beta: float = 2) -> Array:
    """ChrF of predicted, expected and matched n-grams by order, ``[..., 8 * 3]``."""
    predicted, expected, matched = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    counted = (predicted > 0) & (expected > 0)
    orders = np.maximum(counted.sum(-1), 1)
    precision = np.where(counted, matched / np.maximum(predicted, 1), 0).sum(-1) / orders
    recall = np.where(counted, matched / np.maximum(expected, 1), 0).sum(-1) / orders
    weighted = beta**2 * precision + recall
    score: Array = 100 * (1 + beta**2) * precision * recall / np.where(weighted > 0, weighted, 1)
    return score
