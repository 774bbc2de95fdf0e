"""When a training step holds the most memory, and what it is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tli_engine.models.arrangement import (
    EVERYTHING,
    NOTHING,
    Arrangement,
    Room,
    arrange,
    held,
    left,
)
from tli_engine.models.linear_cross_entropy import chunk_rows
from tli_engine.models.recompute import UNPLANNED, with_gaps
from tli_engine.train.mixed_adamw import CHUNK
from tli_engine.train.pack_graphs import wants_graphs, why_not_captured
from tli_engine.train.plan_blocks import BlockMemory
from tli_engine.train.plan_devices import GIB, Target
from tli_engine.train.plan_outline import Outline
from tli_engine.train.staging import padded
from tli_engine.train.updates import reads_gradients_as_they_are, update_parts

# of a process on a GPU, beside what torch allocates; an estimate
CONTEXT = 500 * 2**20
# a workspace each for the products of the forward and of the backward thread
_WORKSPACES, _WORKSPACES_HOPPER = 2 * 8_519_680, 2 * 32 * 2**20
# bitsandbytes: from so many elements states are of 8 bits, with an absmax for each 256
_EIGHT_BIT_FROM, _EIGHT_BIT_BLOCK = 4096, 256
# two pairs compared with one another: cosine, logits either way and their masks, the mean over those that
# are mismatched, which are listed by two numbers of 64 bits
_OF_TWO_PAIRS = 36
_EMBEDDINGS = "embed_tokens.weight"
# elements to which tensors in one buffer are filled up
_FLAT = 64


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment of a step, beside what is always held.

    Attributes:
        gradients: Of what is trained.
        activations: Kept for the way back.
        working: Gradients of activations, logits, weights decoded in full.
    """

    gradients: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """Of all."""
        return self.gradients + self.activations + self.working


def optimizer_bytes(outline: Outline) -> tuple[int, int]:
    """Bytes of statistics and master copies on the device, and of paged ones, which move."""
    train = outline.run.train
    if outline.causal is None and outline.fused:
        # parameters and gradients lie in buffers of that size too
        size = sum(-(-t.numel() // _FLAT) * _FLAT for t in outline.trained.values())
        return 8 * size + 16, 0
    held = paged = 0
    for tensor in outline.trained.values():
        count, element = tensor.numel(), tensor.element_size()
        stochastic = train.rounding == "stochastic"
        if element < 4 and not stochastic:
            held += 4 * count
        if "8bit" in train.optimizer and count >= _EIGHT_BIT_FROM:
            states = 2 * (count + 4 * -(-count // _EIGHT_BIT_BLOCK))
        else:
            states = 2 * count * (element if stochastic else 4)
        if "paged" in train.optimizer:
            paged += states
        else:
            held += states + (4 if train.optimizer == "adamw" else 0)
    return held, paged


class Step:
    """The moments of a step.

    Args:
        outline: The run.
        tokens: Of a pack.
        persistent: Bytes that are always held, optimizer included.
        optimizer: Bytes of the optimizer among them.
        to_come: Of a GPU that holds shares of the weights: bytes of gradients, of states and of blocks on
            their way, beside ``persistent``. By default those of a GPU that holds all.
    """

    def __init__(
        self,
        outline: Outline,
        tokens: int,
        persistent: int,
        optimizer: int,
        to_come: int | None = None,
    ) -> None:
        self._outline, self.tokens = outline, tokens
        self._blocks = BlockMemory(outline, tokens)
        self._first, self._depth = outline.first_trained, outline.early.depth
        self._workspaces = 0
        if outline.on_gpu:
            self._workspaces = _WORKSPACES_HOPPER if outline.target.hopper else _WORKSPACES
        self._before, self._to_come = persistent - optimizer, to_come
        self._parts = [self._blocks.parts(i) for i in range(self._first, self._depth)]
        self.arrangement = self._choose()

    @property
    def recomputed(self) -> int:
        """Blocks that are run again on the way back, as a whole or in part."""
        return sum(not all(self._keeps(i)) for i in range(self._first, self._depth))

    @property
    def recomputed_in_part(self) -> int:
        """Those among them that keep a part."""
        keeps = [self._keeps(i) for i in range(self._first, self._depth)]
        return sum(any(k) and not all(k) for k in keeps)

    def peak(self) -> Moment:
        """The fullest moment."""
        return max(self.moments(), key=lambda moment: moment.total)

    @property
    def left(self) -> int | None:
        """Bytes that are free at the fullest moment; None on a CPU."""
        room = self._room()
        if room is None:
            return None
        return left(self._parts, self._first, self._blocks.input, room, self.arrangement)

    def moments(self) -> Iterator[Moment]:
        """Those at which the most may be held."""
        if self._outline.causal is not None:
            yield from self.of_loss()
        yield from self.of_way_back()

    def of_loss(self) -> Iterator[Moment]:
        """Those of the loss, when all blocks have run."""
        yield from self._loss(
            self._earlier, sum(self._kept(i) for i in range(self._first, self._depth))
        )

    def of_way_back(self) -> Iterator[Moment]:
        """Those from the loss on."""
        outline, earlier = self._outline, self._earlier
        every = sum(t.nbytes for t in outline.trained.values())
        kept = [self._kept(i) for i in range(self._first, self._depth)]
        gradients = earlier or self._head_gradient()
        for i in reversed(range(self._first, self._depth)):
            activations = sum(kept[: i - self._first + 1])
            if not all(self._keeps(i)):
                activations += self._blocks.run_again(i, self._keeps(i))
            gradients = every if earlier else gradients + self._gradient(i)
            running = self._blocks.running(i, again=not self._keeps(i)[-1])
            working = max(self._blocks.working(i), running) + self._workspaces
            if outline.causal is None:
                # fused: they are made, then written to the buffer of all
                gradients = (2 if outline.fused else 1) * every
            yield Moment(self._at_once(gradients, f"layers.{i}."), activations, working)
        yield self._update(every)

    @property
    def _earlier(self) -> int:
        """Bytes of gradients that are there before a pass: of earlier batches, or such as stay for graphs."""
        outline = self._outline
        adds_up = outline.run.train.accumulate > 1 or self.uses_graphs
        if outline.causal is None or not adds_up:
            return 0
        return sum(t.nbytes for t in outline.trained.values())

    def _kept(self, number: int) -> int:
        """Bytes that a block and its input hold until its way back."""
        keeps, size = self._keeps(number), self._blocks.input
        frozen_input = number == self._first and self._outline.run.method == "lora" and all(keeps)
        return held(self._parts[number - self._first], keeps, size) + size * (not frozen_input)

    def _keeps(self, number: int) -> tuple[bool, ...]:
        return self.arrangement.keeps(number, len(self._parts[number - self._first]))

    def _gradient(self, number: int) -> int:
        prefix = f"layers.{number}."
        return sum(t.nbytes for n, t in self._outline.trained.items() if n.startswith(prefix))

    def _head_gradient(self) -> int:
        causal = self._outline.causal
        full = causal is not None and causal.head.requires_grad
        return causal.head.nbytes if causal is not None and full else 0

    def _at_once(self, gradients: int, prefix: str = "") -> int:
        """What of gradients is held where each is used at once: the largest of those so named, if any."""
        if not self._outline.run.train.in_backward:
            return gradients
        named = [t for n, t in self._outline.trained.items() if n.startswith(prefix)]
        # a frozen block above the first adapters has none
        if not named:
            return 0
        largest = max(named, key=lambda t: t.numel())
        return largest.nbytes + self._rounding(largest.numel(), largest.element_size())

    def _rounding(self, largest: int, element: int) -> int:
        """Bytes that an update takes for a moment."""
        if element >= 4 or self._updates_in_one_pass:
            return 0
        if self._outline.run.train.rounding == "stochastic":
            # gradient, mean, square, its root, value and random bits
            return 6 * 4 * min(largest, CHUNK)
        return 4 * largest

    @property
    def _updates_in_one_pass(self) -> bool:
        """Whether an update holds nothing beside gradients and statistics."""
        outline, train = self._outline, self._outline.run.train
        at_once = reads_gradients_as_they_are(outline.trained, train, outline.on_gpu)
        return at_once or (outline.on_gpu and train.rounding == "stochastic")

    def _loss(self, gradients: int, activations: int) -> Iterator[Moment]:
        """The output layer, all of whose rows are labels at most."""
        outline, config = self._outline, self._outline.config
        vocabulary, hidden, element = config.vocab_size, config.hidden_size, outline.element
        trained = self._head_gradient() > 0
        rows = min(self.tokens, chunk_rows(vocabulary, trained=trained))
        capped = bool(getattr(config, "final_logit_softcapping", None))
        logits = rows * vocabulary * (element + 12 * capped)
        working = 3 * self._blocks.input + logits + self._workspaces
        if not trained:
            yield Moment(gradients, activations, working)
            return
        summed = 4 * vocabulary * hidden
        yield Moment(gradients, activations, working + summed)
        # the sum, times what comes from above, rounded
        scaled = summed + vocabulary * hidden * element
        yield Moment(gradients, activations, 3 * self._blocks.input + scaled + self._workspaces)

    def _update(self, gradients: int) -> Moment:
        outline, train = self._outline, self._outline.run.train
        largest = max(outline.trained.values(), key=lambda t: t.numel())
        count, element = largest.numel(), largest.element_size()
        if train.in_backward or element >= 4 or self._updates_in_one_pass:
            return Moment(self._at_once(gradients), 0, self._workspaces)
        if train.rounding == "stochastic":
            return Moment(gradients, 0, self._rounding(count, element) + self._workspaces)
        # those of a part are copied to fp32, in place of the ones in 16 bits, unless they stay for a graph
        parts = update_parts(outline.trained, train)
        most = max(sum(outline.trained[name].numel() for name in part) for part in parts)
        copies = most * (4 - element * (not self.uses_graphs))
        return Moment(gradients + copies, 0, self._workspaces)

    @property
    def uses_graphs(self) -> bool:
        """Whether packs of texts are replayed from CUDA graphs."""
        return self._wants_graphs and self.why_launched is None

    @property
    def why_launched(self) -> str | None:
        """Why packs of texts are launched kernel by kernel, where graphs would be worth it or are asked for."""
        outline = self._outline
        if outline.causal is None or not self._wants_graphs:
            return None
        return why_not_captured(outline.run, outline.causal)

    @property
    def _wants_graphs(self) -> bool:
        outline, run = self._outline, self._outline.run
        if outline.causal is None or not outline.on_gpu:
            return False
        return wants_graphs(run, outline.causal, run.train.batch_size, outline.gpus)

    def _choose(self) -> Arrangement:
        """What blocks keep, as ``sft.activations`` is decided."""
        policy = self._outline.run.sft.activations
        if self._outline.causal is None or policy == "save":
            return EVERYTHING
        if policy == "recompute":
            return NOTHING
        if (room := self._room()) is None:
            return EVERYTHING
        return arrange(self._parts, self._first, self._blocks.input, room)

    def _room(self) -> Room | None:
        """What activations may take; None where nothing limits them."""
        outline, memory = self._outline, self._outline.target.memory
        if outline.causal is None or memory is None:
            return None
        master = 4 * sum(t.numel() for t in outline.trained.values() if t.element_size() < 4)
        if outline.run.train.rounding == "stochastic":
            master = 0
        reserve = outline.causal.reserve()
        to_come = master + reserve.states if self._to_come is None else self._to_come
        there = self._before + self._workspaces // 2 + to_come
        free = memory - context_of(outline.target) - int(UNPLANNED * memory)
        loss = reserve.loss + self.tokens * reserve.loss_of_token
        return with_gaps(free - there, self._blocks.reserved(), loss)


def step_of_words(outline: Outline, tokens: int, persistent: int, optimizer: int) -> Step:
    """The moments of a step of the align objective on so many tokens."""
    rows = padded(tokens) if outline.fused else tokens
    # modules encode a batch whole
    most = outline.run.train.chunk_tokens if outline.fused else None
    return Step(outline, rows if most is None else min(rows, most), persistent, optimizer)


def moments_of_pairs(outline: Outline, tokens: int, pairs: int) -> Iterator[Moment]:
    """Those of joint training's pass over word pairs, whose blocks keep all.

    It comes when the gradients of the texts are there, and adds to them.

    Args:
        outline: The run.
        tokens: Of the pairs' words.
        pairs: That are compared, each with each.
    """
    blocks = BlockMemory(replace(outline, causal=None), tokens)
    full = outline.run.method == "full"
    every = sum(t.nbytes for t in outline.trained.values())
    numbers = range(outline.first_trained, outline.run.align.layer)
    kept = [blocks.kept(i) + blocks.input * (full or i > numbers[0]) for i in numbers]
    compared = blocks.input + _OF_TWO_PAIRS * pairs**2
    yield Moment(every, sum(kept), compared)
    for i in reversed(numbers):
        own = sum(t.nbytes for n, t in outline.trained.items() if n.startswith(f"layers.{i}."))
        working = max(blocks.working(i), blocks.running(i, again=False))
        yield Moment(every + own, sum(kept[: i + 1 - numbers[0]]), working)
    if full:
        # of all rows, whichever words there are
        yield Moment(every + outline.trained[_EMBEDDINGS].nbytes, blocks.input, 0)


def context_of(target: Target) -> int:
    """Bytes of the target's memory that CUDA takes: none of a share, which is the allocator's alone."""
    return 0 if target.limited else CONTEXT


def _counted(target: Target, total: int) -> int:
    """What of a plan's bytes, CUDA's context among them, counts against the target's memory."""
    return total - CONTEXT + context_of(target)


def room_on(target: Target, total: int) -> str:
    """In words how much of a GPU's memory a plan takes; arguments as of :func:`fits`."""
    assert target.memory is not None
    beside = ", CUDA's context not counted," if target.limited else ""
    return f"{_counted(target, total) / GIB:.1f} GiB of {target.memory / GIB:.1f}{beside}"


def fits(target: Target, total: int) -> bool:
    """Whether a GPU holds what a plan takes and what fragments; True of a CPU.

    Args:
        target: The device.
        total: Bytes, CUDA's context among them.
    """
    return target.memory is None or _counted(target, total) <= target.memory * (1 - UNPLANNED)
