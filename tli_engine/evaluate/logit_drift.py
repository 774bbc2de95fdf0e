"""How far two models' predictions lie apart, over a fixed sample of text."""

from dataclasses import dataclass

from torch import Tensor

from tli_engine.data.words import Word
from tli_engine.errors import UserError
from tli_engine.models.files import ModelFiles

SAMPLE = (
    "Mvua kubwa ilinyesha usiku kucha na barabara zote za kijiji zilijaa maji.",
    "Mwalimu aliwaambia wanafunzi wasome kitabu hicho kabla ya mtihani wa kesho.",
    "Serikali imetangaza kwamba bei ya mafuta itapanda kuanzia mwezi ujao.",
    "Wavuvi walirudi pwani asubuhi na mapema wakiwa na samaki wengi.",
    "Daktari alisema mgonjwa anaendelea vizuri na atarudi nyumbani wiki hii.",
    "Timu ya taifa ilishinda mechi yake ya kwanza kwa mabao matatu kwa moja.",
    "Bibi yangu hupika chai ya tangawizi kila jioni tunapokaa barazani.",
    "Je, unajua treni ya kwenda Mombasa inaondoka saa ngapi?",
    "The river rose quickly after the storm, and the bridge was closed for two days.",
    "She put the letter back in the drawer and never spoke of it again.",
    "The committee will publish its report on public transport before the end of June.",
    "Add the flour slowly, stir until it is smooth, and leave it for twenty minutes.",
    "Scientists have found traces of water in a rock that is four billion years old.",
    "If the price falls below ten, we will buy another hundred shares.",
    "His grandfather built boats, his father sold them, and he only sails them.",
    "What would you do if nobody were watching?",
)

# tokens whose logits are compared at a time
_TOKENS = 32


@dataclass(frozen=True)
class LogitDrift:
    """Differences of logits, and the divergence of the predictions, over so many tokens.

    Attributes:
        max: Largest magnitude of a difference.
        mean: Mean magnitude.
        kl: Kullback-Leibler divergence of the second model's next token from the first's, in nats,
            the mean over the tokens.
        tokens: Of the sample.
    """

    max: float
    mean: float
    kl: float
    tokens: int

    def __str__(self) -> str:
        return f"logit drift: max {self.max:.3g}, mean {self.mean:.3g}, KL {self.kl:.3g} nats"


def sample_words(files: ModelFiles) -> list[Word]:
    """Tokenise the sample; each sentence is cut to the attention window, where it is shorter.

    Raises:
        UserError: The tokenizer cannot be loaded, or makes no tokens of the sample.
    """
    encoded = files.tokenizer(list(SAMPLE))["input_ids"]
    window = getattr(files.config, "sliding_window", None)
    cut = [tuple(ids[:window]) for ids in encoded]
    if not all(cut):
        raise UserError(f"{files.name}: its tokenizer makes no tokens of a sentence")
    return [Word(ids, (True,) * len(ids)) for ids in cut]


def measure_drift(expected: Tensor, actual: Tensor) -> LogitDrift:
    """Compare logits, ``[T, V]`` both; the divergence is computed in fp64."""
    largest, total, nats = 0.0, 0.0, 0.0
    for e, a in zip(expected.split(_TOKENS), actual.split(_TOKENS), strict=True):  # type: ignore[no-untyped-call]
        e, a = e.double(), a.double()
        difference = (a - e).abs()
        largest = max(largest, difference.max().item())
        total += difference.sum().item()
        p, q = e.log_softmax(-1), a.log_softmax(-1)
        nats += (p.exp() * (p - q)).sum().item()
    tokens = expected.shape[0]
    # of equal predictions a rounding may leave it below zero
    return LogitDrift(largest, total / expected.numel(), max(nats / tokens, 0.0), tokens)
