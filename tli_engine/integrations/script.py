"""Runs another code base's script with its models accelerated as they load."""

import builtins
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary
from zipfile import is_zipfile

from torch import nn

from tli_engine.errors import UserError
from tli_engine.integrations.accelerate import accelerate
from tli_engine.integrations.direct_grad import direct_grad
from tli_engine.integrations.lazy_model import settings_of
from tli_engine.integrations.memo import Memo
from tli_engine.integrations.training_graphs import TrainingGraphs
from tli_engine.integrations.weight_writes import watched

Say = Callable[[str], None]


class ScriptRun:
    """What happens while a script runs.

    Args:
        say: Prints a line for the user.

    Attributes:
        counts: What models did, in the order in which they were loaded: their class, and the
            counts of :class:`~tli_engine.integrations.lazy_model.LazySettings`.
        models: Number of times that a model was loaded or adapted.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        # of each model, what was said of it last: PEFT may load one in several steps
        self._told: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self.counts: list[tuple[str, Counter[str]]] = []
        self.models = 0

    def take(self, model: Any) -> None:
        """Accelerate a model that was loaded or adapted, and say what that changed."""
        if not isinstance(model, nn.Module):
            return
        self.models += 1
        name = type(model).__name__
        try:
            summary = str(accelerate(model))
        except UserError as reason:
            self._tell(model, f"{name} runs as it is: {reason}")
            return
        for module in model.modules():
            settings = settings_of(module)
            if settings is not None and settings.memo is None:
                settings.memo, settings.graphs = Memo(), TrainingGraphs()
                self.counts.append((type(module).__name__, settings.counts))
        self._tell(model, "\n".join(f"{name}: {line}" for line in summary.splitlines()))

    def _tell(self, model: nn.Module, lines: str) -> None:
        if self._told.get(model) != lines:
            self._told[model] = lines
            for line in lines.splitlines():
                self._say(line)


@contextmanager
def accelerated_loading(run: ScriptRun) -> Iterator[None]:
    """Have models accelerated as transformers and PEFT load them or put adapters on them."""
    from transformers import PreTrainedModel

    with ExitStack() as patches:
        patches.enter_context(watched())
        patches.enter_context(_after(PreTrainedModel, "from_pretrained", run.take))
        for name in ("load_adapter", "add_adapter"):
            patches.enter_context(_after(PreTrainedModel, name, run.take))
        if find_spec("bitsandbytes"):
            from bitsandbytes.nn import Params4bit

            patches.enter_context(direct_grad(Params4bit))
        if find_spec("peft"):
            from peft import PeftModel

            for name in ("__init__", "load_adapter", "add_adapter"):
                patches.enter_context(_after(PeftModel, name, run.take))
        yield


@contextmanager
def _after(owner: Any, name: str, take: Callable[[Any], None]) -> Iterator[None]:
    """Call ``take`` with the model that a method loads or changes, once the call is over."""
    own = owner.__dict__.get(name)
    theirs: Any = getattr(owner, name) if own is None else own
    of_class = isinstance(theirs, classmethod)
    function = theirs.__func__ if of_class else theirs

    @wraps(function)
    def wrapper(first: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(first, *args, **kwargs)
        # from_pretrained may give what it found beside the model
        loaded = result[0] if isinstance(result, tuple) else result
        take(loaded if of_class else first)
        return result

    setattr(owner, name, classmethod(wrapper) if of_class else wrapper)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def run_script(path: Path, arguments: Sequence[str], say: Say) -> tuple[int, ScriptRun, float]:
    """Run a script as ``python SCRIPT ARGS`` would, with models accelerated as they load.

    Args:
        path: The script.
        arguments: Its ``sys.argv[1:]``.
        say: Prints a line for the user.

    Returns:
        The exit status that the script would have; what happened; seconds.

    Raises:
        UserError: There is no such file, or it is a directory, a pipe or a device.
    """
    _check_script(path)
    run = ScriptRun(say)
    argv, search = sys.argv, sys.path
    sys.argv, sys.path = [str(path), *arguments], _search_path(path)
    start = time.perf_counter()
    try:
        with accelerated_loading(run):
            _run_main(path.absolute())
        status = 0
    except SystemExit as exit_:
        status = _status(exit_)
    except BaseException as error:
        # as the interpreter would show it, from the script's own first line on
        error.__traceback__ = _from_script(error, path.absolute())
        sys.excepthook(type(error), error, error.__traceback__)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.argv, sys.path = argv, search
    return status, run, time.perf_counter() - start


def _check_script(path: Path) -> None:
    if path.is_file():
        return
    if str(path) == "-":
        raise UserError("-: a script is read from a file, not from standard input")
    if path.is_dir():
        main = path / "__main__.py"
        hint = f"; name {main}" if main.is_file() else ""
        raise UserError(f"{path}: is a directory, not a script{hint}")
    if path.exists():
        raise UserError(f"{path}: is a pipe or a device; a script is read from a file")
    raise UserError(f"{path}: no such script")


def _search_path(path: Path) -> list[str]:
    """``sys.path`` for a script: its own folder first, in the place of that of the command that runs it."""
    search = list(sys.path)
    if search and search[0] == str(Path(sys.argv[0]).resolve().parent):
        del search[0]
    return [str(path.resolve().parent), *search]


def _run_main(path: Path) -> None:
    """Run what is at an absolute path as ``__main__``; ``runpy`` would put the path into ``sys.argv``."""
    if path.suffix == ".pyc" or is_zipfile(path):
        runpy.run_path(str(path), run_name="__main__")
        return
    module = ModuleType("__main__")
    loader = SourceFileLoader("__main__", str(path))
    module.__dict__.update(
        __annotations__={},
        __builtins__=builtins,
        __cached__=None,
        __file__=str(path),
        __loader__=loader,
        __package__=None,
    )
    ours = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        source = loader.get_data(str(path))
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    finally:
        sys.modules["__main__"] = ours


def _status(exit_: SystemExit) -> int:
    if exit_.code is None:
        return 0
    if isinstance(exit_.code, int):
        return exit_.code
    print(exit_.code, file=sys.stderr)
    return 1


def _from_script(error: BaseException, path: Path) -> Any:
    """The traceback from the script's first frame on; all of it if the script was not reached."""
    trace = error.__traceback__
    inner = trace
    while inner is not None and inner.tb_frame.f_code.co_filename != str(path):
        inner = inner.tb_next
    # a syntax error has no frame of its own, and says itself where it is
    return trace if inner is None and not isinstance(error, SyntaxError) else inner
