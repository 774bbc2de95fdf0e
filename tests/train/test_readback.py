"""Numbers on their way to the host, and how long they are waited for."""

import pytest
import torch

from tli_engine.train.readback import Readback


class Late:
    """A step that ends after so many looks."""

    def __init__(self, looks: float) -> None:
        self.left = looks

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_numbers_are_those_of_the_tensor() -> None:
    values = torch.tensor([1.5, -2.0])
    found = Readback(values)
    values.zero_()
    assert found.is_there
    assert found.wait() == found.wait(limit=0.0) == [1.5, -2.0]


def test_what_comes_in_time_is_waited_for_and_what_does_not_is_an_error() -> None:
    found = Readback(torch.tensor([3.0]))
    late = Late(3)
    found._event = late  # type: ignore[assignment]
    assert found.wait(limit=60.0) == [3.0]
    assert late.left == -1
    found._event = Late(float("inf"))  # type: ignore[assignment]
    with pytest.raises(TimeoutError, match=r"did not come within 0\.01 s"):
        found.wait(limit=0.01)
