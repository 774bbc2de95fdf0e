"""Beam search: of each text the likeliest continuations so far, as transformers searches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tli_engine.models.decoder import Decoder


class Beams:
    """The continuations of some texts that are open, and the best of those that have ended.

    Ended ones are ranked by their mean log-probability a token. A text is searched on while its best open
    one has a higher mean than the worst of ``beams`` ended ones.

    Attributes:
        tokens: Open ones, best first, ``[texts, beams, new_tokens]``.
        scores: Sums of their log-probabilities, ``[texts, beams]``.
        searching: Whether a text may still be improved, ``[texts]``, bool.
    """

    def __init__(
        self, texts: int, beams: int, new_tokens: int, eos_token_ids: Sequence[int], like: Tensor
    ) -> None:
        self._beams = beams
        self._eos_token_ids = torch.tensor(eos_token_ids, device=like.device)
        self.tokens = like.new_full((texts, beams, new_tokens), eos_token_ids[0], dtype=torch.int64)
        self.scores = like.new_full((texts, beams), -torch.inf)
        # all are alike at first: one of them goes on
        self.scores[:, 0] = 0
        self.searching = like.new_ones(texts, dtype=torch.bool)
        self._ended = self.tokens.clone()
        self._sums = torch.full_like(self.scores, -torch.inf)
        self._means = self._sums.clone()

    def extend(self, log_probs: Tensor, step: int, *, last: bool) -> Tensor:
        """Add a token to each open continuation.

        Args:
            log_probs: Of the next token, ``[texts, beams, V]``.
            step: Number of the token, from 0.
            last: There will be no other: all end here.

        Returns:
            Which row each open one continues, counted over all texts, ``[texts * beams]``.
        """
        texts, beams, vocab = log_probs.shape
        sums = (self.scores[:, :, None] + log_probs).flatten(1)
        # if all of the best ones end, in every way there is, as many are left
        sums, found = sums.topk(min((1 + len(self._eos_token_ids)) * beams, sums.shape[1]))
        sources, tokens = found // vocab, found % vocab
        candidates = _pick(self.tokens, sources)
        candidates[:, :, step] = tokens
        ends = torch.ones_like(tokens, dtype=torch.bool)
        if not last:
            ends = torch.isin(tokens, self._eos_token_ids)
        self._end_with(candidates[:, :beams], sums[:, :beams], ends[:, :beams], step + 1)
        self.scores, going_on = sums.masked_fill(ends, -torch.inf).topk(beams)
        self.tokens = _pick(candidates, going_on)
        self.searching &= self.scores[:, 0] / (step + 1) > self._means[:, -1]
        first = beams * torch.arange(texts, device=found.device)
        return (first[:, None] + sources.gather(1, going_on)).flatten()

    def best(self) -> tuple[Tensor, Tensor]:
        """The best of each text, ``[texts, new_tokens]``, filled up with the end, and its score."""
        return self._ended[:, 0], self._sums[:, 0]

    def _end_with(self, candidates: Tensor, sums: Tensor, ends: Tensor, length: int) -> None:
        sums = sums.masked_fill(~(ends & self.searching[:, None]), -torch.inf)
        means = torch.cat([self._means, sums / length], 1)
        self._means, kept = means.topk(self._beams)
        self._sums = torch.cat([self._sums, sums], 1).gather(1, kept)
        self._ended = _pick(torch.cat([self._ended, candidates], 1), kept)


def beam_search(
    decoder: Decoder,
    prompts: Sequence[tuple[int, ...]],
    *,
    beams: int,
    new_tokens: int,
    eos_token_ids: Sequence[int],
    look_every: int,
) -> tuple[Tensor, Tensor]:
    """Search the best continuation of each prompt.

    Args:
        decoder: That runs the model.
        prompts: Token ids.
        beams: Open continuations of each.
        new_tokens: Longest continuation.
        eos_token_ids: Tokens that end one; the first fills it up.
        look_every: Steps after which the host looks whether the search is over.

    Returns:
        As :meth:`Beams.best`.
    """
    logits = decoder.begin(prompts, new_tokens, copies=beams)
    found = Beams(len(prompts), beams, new_tokens, eos_token_ids, logits)
    log_probs = logits.log_softmax(-1)[:, None].expand(-1, beams, -1)
    for step in range(new_tokens):
        last = step + 1 == new_tokens
        sources = found.extend(log_probs, step, last=last)
        if last or ((step + 1) % look_every == 0 and not found.searching.any()):
            break
        decoder.reorder(sources)
        logits = decoder.step(found.tokens[:, :, step].flatten())
        log_probs = logits.log_softmax(-1).view(len(prompts), beams, -1)
    return found.best()


def _pick(held: Tensor, which: Tensor) -> Tensor:
    """Of each text, some of its continuations, ``[texts, n, new_tokens]``."""
    return held.gather(1, which[:, :, None].expand(-1, -1, held.shape[2]))
