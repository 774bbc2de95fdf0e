"""Models of transformers that give their hidden states when they are read."""

import inspect
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import cache, wraps
from importlib.util import find_spec
from threading import RLock
from typing import Any

from torch import Tensor, nn

from tli_engine.errors import UserError
from tli_engine.integrations.call_state import CallState
from tli_engine.integrations.lazy_output import is_compiling, lazy_output
from tli_engine.integrations.lazy_run import Call, LazyRun, note_steps, run_step
from tli_engine.integrations.memo import Memo
from tli_engine.integrations.model_parts import ModelParts, has_global_hooks, is_transformed
from tli_engine.integrations.replace import mark
from tli_engine.integrations.training_graphs import TrainingGraphs

# model type in transformers, and the folder of its code
_FAMILIES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
_SETTINGS = "_tli_engine_lazy"
# in a lazy class: the class that it stands in for
_STANDS_FOR = "_tli_engine_stands_for"
# before a reason among a model's counts, which count the calls that it kept from being lazy
AT_ONCE = "at once: "
# the decoder of a model whose call is not lazy, and whose decoder's therefore is not
_at_once: ContextVar[Any] = ContextVar("at_once", default=None)
_REPLACED = "its forward was replaced by another library"


class LazySettings:
    """What a lazy model remembers between calls.

    Attributes:
        stop_at: The last hidden state that may be read, or None.
        lock: Whoever holds it works for a lazy call; of a causal LM its decoder's counts.
        memo: Holds the hidden states of words, if it is to.
        graphs: Replays blocks of training steps, if it is to.
        counts: Of ``calls``, those that were ``lazy``, ``words`` found again, ``blocks`` that lazy
            calls ran, and those that they would have run, ``of_blocks``; ``at once: …``, calls for hidden
            states that were not lazy, and why; ``replayed``, blocks of
            training steps from graphs; ``launched: …``, those that were not, and why; ``recordings``
            that were made for them. Of the host's nanoseconds ``call_ns`` went by in lazy calls,
            ``read_ns`` in reading what they put off, of those ``first_read_ns`` in the first and
            ``recording_ns`` in recordings.
    """

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.memo: Memo | None = None
        self.graphs: TrainingGraphs | None = None
        self.counts: Counter[str] = Counter()
        # a call may be made inside another one
        self.lock = RLock()
        self._parts: ModelParts | None = None
        self._parametrises = False

    def check_limit(self, reason: str = "") -> None:
        """Raise ``UserError`` for a call that cannot be lazy, and so does not stop, if it has to."""
        if self.stop_at is not None:
            raise UserError(
                f"the model stops at hidden_states[{self.stop_at}] (stop_at), so it is called "
                f"with output_hidden_states=True, without a cache or hooks, and gives no more{reason}"
            )

    def parts_of(self, model: Any, decoder: Any) -> ModelParts:
        """The model's modules, found anew when some were exchanged."""
        if self._parts is None or not self._parts.are_same():
            self._parts = ModelParts(model, decoder)
            self._parametrises = any(map(_parametrises, model.modules()))
        return self._parts

    def why_at_once(
        self, model: Any, decoder: Any, parts: ModelParts, arguments: Mapping[str, Any]
    ) -> str | None:
        """Why a call for hidden states cannot be put off, if there is a reason."""
        # what another library wraps around a call may look at all that it returns
        if "forward" in model.__dict__ or "forward" in decoder.__dict__:
            return _REPLACED
        if decoder.__dict__.get("_compiled_call_impl") is not None:
            return "its decoder is compiled as a whole"
        if is_transformed():
            return "it is called inside a transform of torch.func"
        if has_global_hooks():
            return "all modules have hooks"
        if self._parametrises:
            return "PEFT parametrises weights while it runs (target_parameters)"
        return _masked_by_cache(model.config, arguments) or parts.why_at_once()


def settings_of(model: nn.Module) -> LazySettings | None:
    """What a lazy model remembers; ``None`` for another module."""
    found: LazySettings | None = model.__dict__.get(_SETTINGS)
    return found


def make_lazy(
    name: str, module: Any, stop_at: int | None, lazy: dict[str, int | None], eager: dict[str, str]
) -> None:
    """Make a module lazy if it is a decoder or a causal LM, and note it with its limit, or why it is not.

    Raises:
        UserError: ``stop_at`` is no hidden state of it.
    """
    if not _is_model(module):
        return
    theirs = _stood_for(type(module))
    decoder = decoder_of(module, theirs)
    if isinstance(decoder, str):
        eager[name] = decoder
        return
    depth = module.config.num_hidden_layers
    if stop_at is not None and not 0 <= stop_at <= depth:
        raise UserError(f"stop_at must be 0 … {depth} for this model, got {stop_at}")
    if settings_of(module) is None:
        # one that was made by a lazy class is of that already
        module.__class__ = theirs
        mark(module, _lazy_class(theirs))
        module.__dict__[_SETTINGS] = LazySettings(stop_at)
    elif stop_at is not None:
        module.__dict__[_SETTINGS].stop_at = stop_at
    # a decoder inside a causal LM goes without saying
    if not any(outer == "" or name.startswith(f"{outer}.") for outer in lazy):
        lazy[name] = module.__dict__[_SETTINGS].stop_at


def _is_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers; :func:`decoder_of` looks further."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def decoder_of(module: Any, theirs: type) -> Any:
    """The decoder in a model, the model itself if it is one; or why it stays as it was."""
    family = _FAMILIES.get(str(getattr(module.config, "model_type", None)))
    if family is None:
        known = ", ".join(_FAMILIES)
        return f"model type {module.config.model_type!r}; known are {known}"
    if theirs.__module__ != f"transformers.models.{family}.modeling_{family}":
        return f"{theirs.__name__} is not transformers' own class"
    if "forward" in module.__dict__:
        return _REPLACED
    decoder = _decoder_in(module)
    if not all(hasattr(decoder, part) for part in ("embed_tokens", "layers", "norm")):
        return f"{theirs.__name__} is neither a decoder nor a causal LM"
    return decoder


def _decoder_in(module: Any) -> Any:
    return getattr(module, "model", None) if hasattr(module, "lm_head") else module


@cache
def _lazy_class(theirs: Any) -> Any:
    names = list(inspect.signature(theirs.forward).parameters)[1:]

    @wraps(theirs.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # one that was made by this class, type(model)(config), is not lazy
        if settings_of(self) is None or is_compiling() or _at_once.get() is self:
            return theirs.forward(self, *args, **kwargs)
        output = _call(self, theirs, dict(zip(names, args, strict=False)) | kwargs)
        if output is not None:
            return output
        token = _at_once.set(_decoder_in(self))
        try:
            return theirs.forward(self, *args, **kwargs)
        finally:
            _at_once.reset(token)

    def reduce(self: Any, protocol: Any) -> Any:
        state = {n: v for n, v in self.__dict__.items() if not n.startswith("_tli_engine_")}
        settings = settings_of(self)
        if settings is None:
            return _new, (_stood_for(type(self)),), state
        return _rebuild, (theirs, settings.stop_at), state

    # everything that goes by the name of the class sees transformers' own
    attributes = {
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__reduce_ex__": reduce,
        "forward": forward,
        _STANDS_FOR: theirs,
    }
    return type(theirs.__name__, (theirs,), attributes)


def _stood_for(ours: type) -> type:
    """The class of transformers that a lazy class stands in for; any other class itself."""
    theirs: type = vars(ours).get(_STANDS_FOR, ours)
    return theirs


def _new(theirs: Any) -> Any:
    return theirs.__new__(theirs)


def _rebuild(theirs: Any, stop_at: int | None) -> Any:
    model = _new(theirs)
    mark(model, _lazy_class(theirs))
    model.__dict__[_SETTINGS] = LazySettings(stop_at)
    return model


def _call(model: Any, theirs: Any, arguments: dict[str, Any]) -> Any:
    """The lazy output of a call, or ``None`` if it has to run as it always did."""
    if "layers" in model.__dict__:
        # a run begins: stand-ins are there for the blocks
        return None
    settings: LazySettings = model.__dict__[_SETTINGS]
    settings.counts["calls"] += 1
    if not _asks_for_states(model.config, arguments):
        settings.check_limit()
        return None
    decoder = _decoder_in(model)
    # a causal LM's calls and those of its decoder run the same blocks
    lock = (settings_of(decoder) or settings).lock
    with lock:
        return _call_alone(model, theirs, decoder, settings, lock, arguments)


def _call_alone(
    model: Any,
    theirs: Any,
    decoder: Any,
    settings: LazySettings,
    lock: AbstractContextManager[Any],
    arguments: dict[str, Any],
) -> Any:
    start = time.perf_counter_ns()
    counts = settings.counts
    parts = settings.parts_of(model, decoder)
    reason = settings.why_at_once(model, decoder, parts, arguments)
    if reason:
        counts[f"{AT_ONCE}{reason}"] += 1
        settings.check_limit(f"; {reason}")
        return None
    _put_capturing_hooks()(decoder)
    tensors: Sequence[Tensor] = [v for v in arguments.values() if isinstance(v, Tensor)]
    state = CallState(parts, tensors, tensors[0].device)
    call = Call(theirs.forward, decoder, model, arguments, state, settings.stop_at, counts, lock)
    found = None if settings.memo is None else settings.memo.find(call)
    if found:
        run, read = found
    else:
        run_block = run_step if settings.graphs is None else settings.graphs.runner(call)
        run = LazyRun(call, *note_steps(call), run_block)
        read = run.read

    def read_alone(k: int) -> Tensor:
        with lock:
            return read(k)

    counts["lazy"] += 1
    counts["of_blocks"] += run.depth
    cached = _makes_cache(model.config, arguments)
    labels = arguments.get("labels") is not None
    output_class = _output_class(theirs)
    output = lazy_output(output_class, run, read_alone, labels=labels, cached=cached)
    counts["call_ns"] += time.perf_counter_ns() - start
    return output


@cache
def _put_capturing_hooks() -> Callable[[Any], None]:
    """What puts transformers' hooks on a decoder's blocks, as its own first call for hidden states does.

    So hooks that come later run after them, and calls that have to be computed at once by then give the
    states from before those hooks, as ever.
    """
    if not find_spec("transformers.utils.output_capturing"):
        # transformers 4 captures without hooks
        return lambda decoder: None
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    put: Callable[[Any], None] = maybe_install_capturing_hooks
    return put


def _parametrises(module: nn.Module) -> bool:
    """Whether a module exchanges a weight of another while it runs, which then is another one after."""
    peft_layer = sys.modules.get("peft.tuners.lora.layer")
    return isinstance(module, getattr(peft_layer, "ParamWrapper", ()))


def _masked_by_cache(config: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why a call's masks would be others without the cache that it makes, as blocks are run here.

    Without one, and without a mask, transformers takes positions that start anew for several texts in a row;
    a mask that is too long is cut only by a cache.
    """
    if not _makes_cache(config, arguments):
        return None
    mask = arguments.get("attention_mask")
    if mask is None and arguments.get("position_ids") is not None:
        return "position_ids without an attention_mask, and a cache"
    length = _tokens_of(arguments).shape[1:2]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1:] != length:
        return "an attention_mask longer or shorter than its tokens, and a cache"
    return None


def _tokens_of(arguments: Mapping[str, Any]) -> Any:
    """Numbers ``[B, T]`` or vectors ``[B, T, D]``, whichever a call is given."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def _makes_cache(config: Any, arguments: Mapping[str, Any]) -> bool:
    use_cache = arguments.get("use_cache")
    return bool(config.use_cache if use_cache is None else use_cache)


def _asks_for_states(config: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a call wants hidden states, all of them, and nothing that they do not lead to."""

    def given(name: str) -> Any:
        value = arguments.get(name)
        return getattr(config, name, None) if value is None else value

    tokens = _tokens_of(arguments)
    return (
        given("output_hidden_states") is True
        and not given("output_attentions")
        and given("return_dict") is not False
        # a cache that the caller has or asks for is filled at the call
        and arguments.get("past_key_values") is None
        and not arguments.get("use_cache")
        and isinstance(tokens, Tensor)
        # of none there is nothing to compute, and the error is transformers'
        and tokens.numel() > 0
    )


@cache
def _output_class(theirs: Any) -> Any:
    """What a model returns: that of a causal LM, or of a decoder."""
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

    return CausalLMOutputWithPast if "ForCausalLM" in theirs.__name__ else BaseModelOutputWithPast
