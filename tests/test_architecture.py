"""The layout's rules, read off the source: who may import whom, and how long code may be."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tli_engine"
KERNELS = ROOT / "kernels"

# anyone may import these; they import nothing but one another
BASE = {"", "errors", "config"}
# the parts of tli_engine that each part may import, besides itself and BASE
MAY_IMPORT = {
    "errors": set(),
    "config": {"config_combinations", "config_data", "config_distributed"},
    "config_combinations": set(),
    "config_data": set(),
    "config_distributed": set(),
    "": set(),
    "kernels": set(),
    "reference": {"nf4"},
    "extension": set(),
    "backends": {"kernels", "extension"},
    "ops": {"backends", "reference", "nf4"},
    "nf4": set(),
    "nf4_checkpoint": {"nf4"},
    "layouts": {"backends", "ops", "nf4"},
    "nn": {"layouts", "ops", "nf4", "nf4_checkpoint"},
    "data": set(),
    "models": {"data", "nn", "ops", "nf4", "nf4_checkpoint"},
    "align": {"models", "data", "nn", "ops"},
    "integrations": {"align", "models", "data", "nn", "layouts", "ops", "nf4", "nf4_checkpoint"},
    "train": {"distributed", "integrations", "align", "models", "data", "nn", "ops"},
    "distributed": {"nn"},
    "evaluate": {"integrations", "align", "models", "data", "nn", "ops"},
    "cli": {
        *{
            "train",
            "distributed",
            "evaluate",
            "integrations",
            "align",
            "models",
            "data",
            "nn",
            "ops",
        },
        *{"backends", "extension", "nf4", "nf4_checkpoint"},
    },
    "__main__": {"cli"},
    # shipped for users' tests; no part of the engine needs it
    "testing": {"data"},
}
# parts that import these packages alone, so that they run without the rest
LEAVES = {"kernels": {"torch", "triton"}, "reference": {"torch"}}
# modules that only the command line may use
FOR_CLI = {"tli_engine.train.run_folder", "tli_engine.train.provenance"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_DEVICE_FUNCTION_LINES = 120


def python_files(folder: Path) -> Iterator[Path]:
    # the link tli_engine/kernels is not followed: kernels/ itself is read
    for path, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (Path(path) / name for name in names if name.endswith(".py"))


def modules() -> dict[str, ast.Module]:
    """Every module of the package, kernels included, by its dotted name."""
    found = {}
    for folder, package in ((PACKAGE, "tli_engine"), (KERNELS, "tli_engine.kernels")):
        for path in python_files(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(module: str, tree: ast.Module) -> set[str]:
    """Dotted names that a module imports anywhere, ``if TYPE_CHECKING`` and functions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def part(name: str) -> str:
    """``align`` of ``tli_engine.align.space``; empty for ``tli_engine`` itself and its names."""
    second = name.split(".")[1:2]
    return second[0] if second and second[0] in MAY_IMPORT else ""


def wrong_imports(module: str, tree: ast.Module) -> list[str]:
    own = part(module)
    wrong = []
    for name in sorted(imports(module, tree)):
        package = name.split(".")[0]
        if package != "tli_engine":
            if own in LEAVES and package not in LEAVES[own] | sys.stdlib_module_names:
                wrong.append(f"{module} imports {name}")
            continue
        allowed = MAY_IMPORT[own] | {own} | (set() if own in LEAVES else BASE)
        if part(name) not in allowed:
            wrong.append(f"{module} imports {name}")
        elif own not in ("cli", "train") and any(name.startswith(m) for m in FOR_CLI):
            wrong.append(f"{module} imports {name}, which is for cli")
    return wrong


def long_functions(tree: ast.Module) -> list[str]:
    long = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            on_device = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            limit = MAX_DEVICE_FUNCTION_LINES if on_device else MAX_FUNCTION_LINES
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > limit:
                long.append(f"{node.name}: {lines} lines, over {limit}")
    return long


def test_imports_run_one_way() -> None:
    assert [w for name, tree in modules().items() for w in wrong_imports(name, tree)] == []


def test_every_part_has_a_place_in_the_order() -> None:
    assert {name.split(".")[1] for name in modules() if "." in name} <= MAY_IMPORT.keys()


def test_the_order_has_no_cycle() -> None:
    settled: set[str] = set()
    while ready := {p for p, below in MAY_IMPORT.items() if p not in settled and below <= settled}:
        settled |= ready
    assert settled == MAY_IMPORT.keys()


def test_only_backends_names_the_kernels() -> None:
    """Imports are seen above; this sees names that are imported by text."""
    naming = {
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith("tli_engine.kernels")
    }
    assert naming == {"tli_engine.backends"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tli_engine.ops.x", "from tli_engine.kernels.x import x"),
        ("tli_engine.ops.x", "import tli_engine.kernels.x"),
        ("tli_engine.ops.x", "from tli_engine import kernels"),
        ("tli_engine.models.x", "from tli_engine.align.space import fit_space"),
        ("tli_engine.evaluate.x", "from tli_engine.train.loop import Trainer"),
        ("tli_engine.train.x", "from tli_engine import evaluate"),
        ("tli_engine.train.loop", "def f():\n    from tli_engine.cli import main"),
        ("tli_engine.align.x", "from tli_engine.testing import random_words"),
        ("tli_engine.kernels.x", "import numpy"),
        ("tli_engine.kernels.x", "from tli_engine.errors import UserError"),
        ("tli_engine.reference.x", "import triton"),
        ("tli_engine.evaluate.x", "from tli_engine.train.run_folder import write_json"),
        ("tli_engine.config", "from tli_engine.data.pairs import PairList"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert wrong_imports(module, ast.parse(source))


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "triton", "yaml", "numpy", "pydantic"]
    program = f"import sys, tli_engine; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_public_names_can_be_had() -> None:
    import tli_engine

    assert {name: callable(getattr(tli_engine, name)) for name in tli_engine.__all__} == (
        dict.fromkeys(tli_engine.__all__, True)
    )
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tli_engine.nothing


def test_kernels_are_a_link_and_no_package_of_their_own() -> None:
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert link.resolve() == KERNELS
    assert KERNELS.is_dir()
    # with one, kernels/ at the root would hide Hugging Face's package of that name
    assert not (KERNELS / "__init__.py").exists()


def test_files_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines}"
        for folder in ("tli_engine", "kernels", "bench", "tests")
        for path in python_files(ROOT / folder)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    ]
    assert long == []


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {function}"
        for folder in ("tli_engine", "kernels", "bench", "tests")
        for path in python_files(ROOT / folder)
        for function in long_functions(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert long == []


def test_a_long_function_is_seen() -> None:
    body = "".join(f"    x = {i}\n" for i in range(80))
    assert long_functions(ast.parse(f"def f():\n{body}"))
    assert long_functions(
        ast.parse(f"class C:\n    def f(self):\n{body.replace('    x', 8 * ' ' + 'x')}")
    )
    assert not long_functions(ast.parse(f"@triton.jit\ndef f():\n{body}"))
    assert long_functions(ast.parse(f"@triton.jit\ndef f():\n{body}{body}"))
