"""A plan's bytes are those that a run holds, exactly where they can be counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import RunConfig, resolve_config
from tli_engine.data.words import Word, pack
from tli_engine.errors import UserError
from tli_engine.models.adapters import add_lora, add_transposed_copies
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.models.survey import survey
from tli_engine.nn import NF4Linear
from tli_engine.reference.nf4_records import to_records
from tli_engine.testing import save_tiny_model
from tli_engine.train.plan import limited, make_plan
from tli_engine.train.plan_blocks import BlockMemory
from tli_engine.train.plan_devices import find_target
from tli_engine.train.plan_outline import nf4_bytes, outline
from tli_engine.train.plan_peak import moments_of_pairs, optimizer_bytes
from tli_engine.train.updates import Updates

RESULTS = Path(__file__).parents[2] / "bench" / "results"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STOCHASTIC = {"method": "full", "train": {"rounding": "stochastic"}}
CPU = torch.device("cpu")
# a prime: only tensors of rows have it in their shape
TOKENS = 251
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            sizes = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 512}
            window = {"sliding_window": 1024} if family == "gemma3_text" else {}
            path = tmp_path_factory.mktemp(family)
            made[family] = save_tiny_model(path, family, **sizes, **window)
        return made[family]

    return make


def config(model: object, **sections: Any) -> RunConfig:
    """Fine-tuning on rows of ``TOKENS`` tokens, with adapters on blocks 1 and 2."""
    values: dict[str, Any] = {
        "model": str(model),
        "objective": "sft",
        "data": {"texts": "none.jsonl"},
        "lora": {"layers": "1-2", "modules": ALL, "r": 4},
        "sft": {"context": TOKENS},
        "train": {"steps": 9, "batch_size": 1},
    }
    for name, change in sections.items():
        old = values.get(name)
        values[name] = old | change if isinstance(old, dict) else change
    return resolve_config(values, "test")


def load(run: RunConfig) -> CausalModel:
    """The run's model as training sets it up, on the CPU."""
    quantize = run.quantize
    files = open_model(run.model)
    options: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "quantize": quantize}
    model = load_causal(files, double_quant=run.double_quant, **options)
    if run.method == "full":
        model.train_all()
    else:
        add_lora(model.early, run.lora, model.early.depth, run.seed)
    if run.train.engine == "fused":
        model.fuse()
    for tensor in model.trainable().values():
        tensor.requires_grad_(True)
    return model


def saved_bytes(model: CausalModel, run: Callable[[Any], Tensor] | None = None) -> int:
    """Bytes of rows that the way back of the whole model, or of ``run``, will read, weights left out."""
    weights = (*model.parameters(), *model.trainable().values())
    own = {w.untyped_storage().data_ptr() for w in weights}
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        rows = any(size and size % TOKENS == 0 for size in tensor.shape)
        if rows and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = tuple(torch.randint(0, 256, (TOKENS,)).tolist())
    words = pack([Word(ids, (True,) * TOKENS)])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = (run or model.hidden_states)(words)
    assert hidden.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("engine", ["fused", "modules"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_activations_are_what_autograd_keeps(
    family: str, engine: str, method: str, folder: Folder
) -> None:
    run = config(folder(family), method=method, train={"engine": engine})
    model = load(run)
    made = outline(run, survey(run.model), find_target("cpu", "auto"))
    blocks = BlockMemory(made, TOKENS)
    numbers = range(made.first_trained, 4)
    # each block's input, and what the final norm reads; a frozen block below puts out what none keeps
    inputs = len(numbers) + 1 - (method == "lora")
    planned = sum(map(blocks.kept, numbers)) + inputs * blocks.input
    tolerance = 0.01 if engine == "fused" else 0.06
    assert planned == pytest.approx(saved_bytes(model), rel=tolerance)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("engine", ["fused", "modules"])
def test_pairs_of_joint_training_are_counted(engine: str, method: str, folder: Folder) -> None:
    """Their blocks keep what autograd keeps, beside the gradients of the texts, which are there."""
    train = {"engine": engine}
    run = config(folder("llama"), objective="joint", method=method, align={"layer": 3}, train=train)
    model = load(run)
    made = outline(run, survey(run.model), find_target("cpu", "auto"))
    loss, *back = moments_of_pairs(made, TOKENS, 8)
    kept = saved_bytes(model, lambda words: model.early(words, 3))
    tolerance = 0.01 if engine == "fused" else 0.06
    assert loss.activations == pytest.approx(kept, rel=tolerance)
    every = sum(t.nbytes for t in model.trainable().values())
    assert loss.gradients == every
    assert back[0].gradients > every
    alone, few, many = (
        make_plan(
            run.model_copy(
                update={
                    "objective": objective,
                    "sft": run.sft.model_copy(update={"align_pairs": n}),
                }
            ),
            survey(run.model),
            find_target("h100", "auto"),
        )
        for objective, n in (("sft", 2), ("joint", 2), ("joint", 1298))
    )
    assert alone.gpu_bytes == few.gpu_bytes
    assert sum(many.gpu_bytes.values()) > sum(few.gpu_bytes.values())
    assert many.gpu_bytes["activations"] > few.gpu_bytes["activations"]


@pytest.mark.parametrize(
    ("changes", "replayed"),
    [
        ({}, True),
        ({"in_backward": True}, False),
        ({"in_backward": True, "cuda_graph": True}, False),
        ({"engine": "modules", "cuda_graph": True}, False),
        ({"cuda_graph": False}, False),
    ],
)
def test_graphs_are_planned_by_the_rule_of_training(
    changes: dict[str, Any], replayed: bool, folder: Folder
) -> None:
    target = find_target("h100", "auto")
    for gpus in (1, 2):
        run = config(folder("llama"), method="full", train=changes)
        plan = make_plan(run, survey(run.model), target, gpus)
        assert any("replayed from CUDA graphs" in note for note in plan.notes) == replayed


def test_graphs_that_were_asked_for_and_cannot_be_are_told(folder: Folder) -> None:
    target = find_target("h100", "auto")
    for train, said in (
        ({"cuda_graph": True, "in_backward": True}, ["train.in_backward updates weights in the"]),
        ({"cuda_graph": True, "engine": "modules"}, ["transformers' modules wait for the GPU"]),
        ({"cuda_graph": True}, []),
        ({"engine": "modules"}, []),
    ):
        run = config(folder("llama"), method="full", train=train)
        notes = make_plan(run, survey(run.model), target).notes
        found = [note for note in notes if "launched one by one: " in note]
        assert [s in note for s, note in zip(said, found, strict=True)] == [True] * len(said)


@pytest.mark.parametrize(
    ("changes", "remedies"),
    [
        (
            {"method": "full", "train": {"batch_size": 512}},
            "a smaller train.batch_size, a smaller sft.context or method: lora",
        ),
        (
            {"method": "full", "train": {"batch_size": 1}, "sft": {"activations": "save"}},
            "a smaller sft.context, sft.activations: recompute or method: lora",
        ),
        (
            {"train": {"batch_size": 2}, "sft": {"activations": "recompute"}},
            "a smaller train.batch_size, a smaller sft.context or quantize: nf4",
        ),
    ],
    ids=["full", "full-of-a-row", "lora"],
)
def test_what_does_not_fit_is_told_what_would_take_less(
    changes: dict[str, Any], remedies: str, folder: Folder
) -> None:
    """Nothing that a run has already, or that its method does not take."""
    run = config(folder("llama"), **changes)
    plan = make_plan(run, survey(run.model), limited(find_target("h100", "auto"), 0.01))
    (line,) = (note for note in plan.notes if note.startswith("does not fit: "))
    assert line.endswith(f", of which a twentieth is left free; {remedies}")


@pytest.mark.parametrize("engine", ["fused", "modules"])
@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        pytest.param("float32", {}, id="lora"),
        pytest.param("float32", {"lora": {"modules": ["q_proj", "v_proj"]}}, id="lora-beside-none"),
        pytest.param("bfloat16", {}, id="lora-in-bf16"),
        pytest.param("float32", {"method": "full"}, id="full"),
        pytest.param("bfloat16", {"method": "full"}, id="full-in-bf16"),
        pytest.param("bfloat16", STOCHASTIC, id="stochastic"),
    ],
)
def test_optimizer_and_trained_tensors_are_to_the_byte(
    dtype: str, changes: dict[str, Any], engine: str, folder: Folder
) -> None:
    train = changes.get("train", {}) | {"engine": engine}
    run = config(folder("llama"), dtype=dtype, **(changes | {"train": train}))
    files = open_model(run.model)
    model = load_causal(files, dtype=getattr(torch, dtype), device=CPU)
    if run.method == "full":
        model.train_all()
    else:
        add_lora(model.early, run.lora, 4, 0)
    if engine == "fused":
        model.fuse()
    tensors = model.trainable()
    made = outline(run, survey(run.model), find_target("cpu", "auto"))
    assert {n: (t.shape, t.dtype) for n, t in made.trained.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    updates = Updates(tensors, run.train)
    for tensor in tensors.values():
        tensor.requires_grad_(True).grad = torch.zeros_like(tensor)
    gradients, _ = updates.nbytes()
    updates.step()
    assert gradients == sum(t.nbytes for t in made.trained.values())
    assert optimizer_bytes(made) == (updates.nbytes()[1], 0)
    # every weight in its place, once
    weights = sum(p.nbytes for n, p in model.weights().items() if ".lora_" not in n)
    assert made.linear_bytes() + made.other_bytes() + made.embedding_bytes(None) == weights


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_weights_are_to_the_byte(double_quant: bool, folder: Folder) -> None:
    run = config(folder("qwen2"), quantize="nf4", double_quant=double_quant)
    layers = [m for m in load(run).modules() if isinstance(m, NF4Linear)]
    made = outline(run, survey(run.model), find_target("cpu", "auto"))
    assert made.linear_bytes() == sum(layer.nbytes for layer in layers)


@pytest.mark.parametrize("size", [(64, 64), (192, 320)])
def test_records_and_their_transpose_are_to_the_byte(size: tuple[int, int]) -> None:
    rows, columns = size
    packed = torch.zeros(rows * columns // 2, 1, dtype=torch.uint8)
    absmax = torch.ones(rows * columns // 64)
    for transposed, sides in ((False, size), (True, size[::-1])):
        records = to_records(packed, absmax, rows, columns, transposed)
        assert nf4_bytes(*sides, False, True) == records.nbytes


def test_align_reads_early_blocks_and_rows_in_use(tmp_path: Path, folder: Folder) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("swahili,english\nmaji,water\nmoto,fire\nmti,tree\n", encoding="utf-8")
    model = survey(str(folder("llama")))
    run = resolve_config(
        {
            "model": str(folder("llama")),
            "quantize": "nf4",
            "data": {"pairs": str(pairs)},
            "lora": {"layers": "1", "r": 4},
        },
        "test",
    )
    plan = make_plan(run, model, find_target("cpu", "auto"))
    tokens = {256, *(model.tokenizer()(w, add_special_tokens=False).input_ids[i] for w in
        ("maji", "water", "moto", "fire", "mti", "tree") for i in range(len(w)))}  # fmt: skip
    held = load_early(
        open_model(run.model), 2, dtype=torch.float32, device=CPU, quantize="nf4", token_ids=tokens
    )
    add_lora(held, run.lora, 2, 0)
    nbytes, copies = add_transposed_copies(held)
    assert copies == 0
    assert plan.host_bytes["weights_nf4"] == nbytes
    assert plan.host_bytes["embeddings"] == held.decoder.embed_tokens.weight.nbytes
    # on a GPU with the extension: all but what reads the input of the first adapted block
    made = outline(run, model, find_target("h100", "auto"))
    reading = ("q_proj", "k_proj", "v_proj")
    expected = sum(
        nf4_bytes(k, n, False, True)
        for name, (n, k) in made.linear.items()
        if name.startswith("layers.1.") and not name.endswith(reading)
    )
    assert made.transposed_bytes() == expected
    assert outline(run, model, find_target("4090", "auto")).transposed_bytes() == 0


def test_what_the_run_refuses_the_plan_refuses(folder: Folder) -> None:
    model = survey(str(folder("llama")))
    for changes, message in (
        ({"sft": {"context": 9999}}, "sft.context: 9999 is more than the model's 512 tokens"),
        ({"lora": {"layers": "4"}}, "the model has blocks 0-3, none 4"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(config(folder("llama"), **changes), model, find_target("cpu", "auto"))
    # of a GPU's own
    wide = config(folder("llama"), dtype="float32", sft={"context": TOKENS, "attention": "varlen"})
    with pytest.raises(UserError, match="varlen cannot run here: it needs bfloat16 or float16"):
        make_plan(wide, model, find_target("h100", "auto"))
    make_plan(
        config(folder("llama"), train={"optimizer": "adamw-paged"}),
        model,
        find_target("h100", "auto"),
    )
    with pytest.raises(UserError, match="--device abacus: not known; there are cpu, h100"):
        find_target("abacus", "auto")
    with pytest.raises(UserError, match="--memory goes with a GPU"):
        limited(find_target("cpu", "auto"), 8)
