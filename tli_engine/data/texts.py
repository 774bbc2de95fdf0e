"""Articles and their summaries."""

from abc import ABC, abstractmethod
from typing import NamedTuple


class Article(NamedTuple):
    """An article, its summary, and where they stand, such as ``news.jsonl: line 3``."""

    text: str
    summary: str
    where: str


class Texts(ABC):
    """Articles that are read one by one, from files that may be larger than memory."""

    name: str
    licence: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Article: ...
