"""How products with adapted weights run: what is decoded for them, and whether their sums are in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

# rows from which products with NF4 weights decode them in full first: on the way there, exact, and
# where an adapter does not ride along in the extension's product
_DECODED, _DECODED_BESIDE = 6144, 128
# on other GPUs adapters ride along for so many rows
_FUSED_ELSEWHERE = 64
# an adapter that a launch takes: ranks, groups, and of the extension multiples of these
_RANKS, _GROUPS, _OF_RANKS, _OF_ROWS = 64, 3, 8, 64
# rows from which an adapter is appended to cuBLAS' contraction, and columns that tiles are of
_APPENDED, _TILE = 2048, 128


@dataclass(frozen=True)
class Product:
    """A product that layers share which read the same input.

    Attributes:
        columns: Of the input.
        sizes: Rows of each layer's weight.
        rank: Of each layer's adapter; 0 without.
    """

    columns: int
    sizes: Sequence[int]
    rank: int

    @property
    def rows(self) -> int:
        """Rows of all weights together."""
        return sum(self.sizes)

    @property
    def elements(self) -> int:
        """Numbers of all weights together."""
        return self.rows * self.columns

    def decodes(self, tokens: int, hopper: bool, fast: bool) -> bool:
        """Whether an NF4 weight is decoded in full on the way there; ``fast`` as for the product."""
        if not hopper:
            return True
        if self.rank and not self._rides_along:
            return tokens > _DECODED_BESIDE
        return tokens > _DECODED and not fast

    def sums_in_fp32(self, tokens: int, nf4: bool, hopper: bool, fast: bool) -> bool:
        """Whether 16-bit inputs make cuBLAS write sums in fp32, for the update to be added to.

        Args:
            tokens: Rows of the input.
            nf4: Whether the weight is NF4.
            hopper: Whether the extension runs.
            fast: Whether products round codes and scales apart.
        """
        if not self.rank:
            return False
        if not nf4:
            return True
        few = not hopper and self._is_narrow and tokens <= _FUSED_ELSEWHERE
        if few or not self.decodes(tokens, hopper, fast):
            return False
        whole = hopper or self.columns % _TILE == 0
        appended = tokens >= _APPENDED and self.columns < 2 * self.rows
        return not (self._is_narrow and whole and appended)

    @property
    def part(self) -> int:
        """Columns of the update that are in memory beside such sums: of one layer's, if no kernel adds it."""
        return 0 if self._is_narrow else max(self.sizes)

    @property
    def _is_narrow(self) -> bool:
        return self.rank * len(self.sizes) <= _RANKS and len(self.sizes) <= _GROUPS

    @property
    def _rides_along(self) -> bool:
        whole = all(size % _OF_ROWS == 0 for size in self.sizes)
        return self._is_narrow and self.rank * len(self.sizes) % _OF_RANKS == 0 and whole
