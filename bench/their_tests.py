"""A pytest plugin for other projects' own tests: every layer that is called is an accelerated one.

``pytest -p bench.their_tests`` in a checkout of bitsandbytes or PEFT; docs/drop-in.md says how.
"""

from collections import Counter
from typing import Any

import pytest

from tli_engine.integrations.frozen_weight import NotReplacedError
from tli_engine.integrations.replace import Kind, kinds, replace_layer

_replaced: Counter[str] = Counter()


def _accelerated_at_first_call(theirs: type, kind: Kind) -> Any:
    original: Any = theirs.forward  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if type(self) is theirs:
            try:
                replace_layer(self, kind)
            except NotReplacedError:
                return original(self, *args, **kwargs)
            _replaced[kind.name] += 1
            return self.forward(*args, **kwargs)
        return original(self, *args, **kwargs)

    return forward


def pytest_configure(config: pytest.Config) -> None:
    """Replace ``forward`` of the classes that the engine replaces."""
    for kind in kinds():
        for theirs in kind.theirs:
            if "forward" in vars(theirs):
                theirs.forward = _accelerated_at_first_call(theirs, kind)  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many layers were accelerated: none would prove nothing."""
    terminalreporter.write_line(f"accelerated layers: {dict(_replaced)}")
