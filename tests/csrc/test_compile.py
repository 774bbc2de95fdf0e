"""The CUDA extension builds with no GPU: no spills, no serialised products; and a torch for CPUs loads it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
TILES = 11
INSTANCES = 8  # two dtypes, two directions, exact and fast
KERNELS = TILES * INSTANCES + 2 * INSTANCES  # that for few rows has blocks of 64 and 32 rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="needs nvcc on the path"),
]


@dataclass(frozen=True)
class Build:
    library: Path
    log: str


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("extension")
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = os.environ | {"TLI_ENGINE_CUDA": "1", "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    log = result.stdout + result.stderr
    assert result.returncode == 0, log[-3000:]
    return Build(folder / "lib/tli_engine/_C.so", log)


def disassembler() -> str | None:
    """The toolkit's cuobjdump, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.is_file() else None


def launch_registers(kernel: str) -> int:
    """Registers a thread that the launch bounds leave; setmaxnreg's budgets rest on them."""
    assert "nf4_linear_kernel" in kernel
    numbers = re.search(r"Li\d+ELi\d+ELi(\d+)ELi(\d+)E", kernel)
    assert numbers, kernel
    warpgroups, ctas = (int(n) for n in numbers.groups())
    return 65536 // ctas // (128 * warpgroups + 128) // 8 * 8


def test_ptxas_serialises_nothing(build: Build) -> None:
    """C7510 to C7515: it waits for every product, e.g. because of a call in the loop."""
    assert re.findall(r".*C75\d\d.*", build.log) == []
    assert "warning" not in build.log


def test_nothing_spills_and_the_register_pool_is_as_planned(build: Build) -> None:
    properties = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+ptxas info\s*: Used (\d+) registers",
        build.log,
    )
    assert len(properties) == KERNELS
    for kernel, stack, stores, loads, registers in properties:
        assert (stack, stores, loads) == ("0", "0", "0"), kernel
        if "nf4_gemv_kernel" in kernel:
            # 512 threads share a multiprocessor's 64 K
            assert int(registers) <= 128, kernel
        else:
            assert int(registers) == launch_registers(kernel), kernel


def test_machine_code_is_what_was_meant(build: Build) -> None:
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump in the toolkit, nor in Triton")
    text = subprocess.run(
        [tool, "-sass", str(build.library)], capture_output=True, text=True, check=True
    ).stdout
    kernels = text.split("Function : ")[1:]
    assert len(kernels) == KERNELS
    for code in kernels:
        name = code.split()[0]
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
        assert "CALL" not in code, f"{name} calls a function"
        if "nf4_gemv_kernel" in name:
            # x in registers: four columns of four steps for each 16 rows, and the low-rank update
            steps = 4 * 4 * (2 if "ELi32E" in name else 4)
            assert len(re.findall(r"HMMA\.16816", code)) == steps + 1, name
            # a look-up a byte, four a step
            look_ups = r"LDS(?:\.64)? R\d+, \[R\d+\+0x400\]"
            assert len(re.findall(look_ups, code)) == 4 * steps, name
            continue
        # one product runs while the next block is decoded, in each half of the loop
        assert len(re.findall(r"DEPBAR\.LE gsb0, 0x1", code)) >= 2, (
            f"{name} waits for every product"
        )
        assert re.search(r"HGMMA\S* R\d+, R\d+, gdesc", code), f"{name} multiplies from memory"
        # the fifth number; giving a stage back to others in the cluster must not cost a fence
        (cluster,) = re.findall(r"nf4_linear_kernel\w+?(?:Li\d+E){4}Li(\d)E", name)
        assert ("UTMALDG.2D.MULTICAST" in code) == (cluster == "2"), name
        assert not re.search(r"MEMBAR(?:(?!MEMBAR)[\s\S]){,1000}SYNCS\.ARRIVE", code), name
        (taken,) = re.findall(r"USETMAXREG\.TRY_ALLOC\S* \w+, (0x[0-9a-f]+)", code)
        used = max(int(n) for n in re.findall(r"\bR(\d+)\b", code))
        assert used < int(taken, 16), f"{name} uses R{used} of {int(taken, 16)}"


LOADING = """
import torch
from pathlib import Path
from torch._subclasses.fake_tensor import FakeTensorMode
from tli_engine import extension
extension._LIBRARY = Path(@LIBRARY@)
assert extension.load(), extension.status()
assert extension.status() == "loaded from _C.so"
assert extension.load()
ops = torch.ops.tli_engine
print(ops.nf4_linear_sm90.default._schema)
print(ops.nf4_gemv_sm90.default._schema)
print(ops.nf4_linear_sm90_workspace(4096, 64, [64, 1, 2, 1, 1, 4, 0], 132))
print(ops.nf4_linear_sm90_workspace(28672, 16, [16, 1, 4, 1, 0, 1, 0], 132))
print(ops.nf4_linear_sm90_workspace(4096, 128, [64, 1, 2, 1, 0, 1, 128], 132))
for cut in ([0, 1, 0, 1], [0, 1, 0, 2], [0, 1, 12, 2], [1, 3, 0, 2]):
    print(ops.nf4_linear_sm90_workspace(1088, 300, [256, 1, 2, 1, *cut], 132))
with FakeTensorMode():
    x = torch.empty(3, 64, dtype=torch.float16, device="cuda")
    records = torch.empty(2, 2, 2304, dtype=torch.uint8, device="cuda")
    w, f = torch.empty(0, device="cuda"), torch.empty(0, dtype=torch.int32, device="cuda")
    y = ops.nf4_linear_sm90(
        x, records, None, None, None, [], 128, 64, False, True, [16, 1, 4, 1, 0, 1, 0], w, f
    )
    z = ops.nf4_gemv_sm90(x, records, None, None, None, [], 128, 64, False, True, [64, 1, 2], w, f)
print(tuple(y.shape), y.dtype)
print(tuple(z.shape), z.dtype)
for cut in ([1, 9, 0], [0, 1, 134, 2], [0, 1, 7, 2], [0, 1, 0, 3]):
    try:
        ops.nf4_linear_sm90_workspace(4096, 64, [64, 1, 2, 1, *cut], 132)
    except RuntimeError as e:
        print(e)
"""
PRINTED = [
    # split-K: 32 tiles of 64 x 128 for each of 4 CTAs
    f"({32 * 4 * 64 * 128}, 128)",
    "(0, 0)",
    f"({128 * 64 * 128}, 128)",
    # 9 row blocks of 128 and 2 of x, without clusters; 5 pairs of row blocks
    "(0, 0)",
    "(0, 0)",
    # 10 tiles for 6 clusters, which share the last 4; in three parts, each by a cluster
    f"({12 * 256 * 128}, 12)",
    f"({60 * 256 * 128}, 60)",
    "(3, 128) torch.float16",
    "(3, 128) torch.float16",
    "nf4_linear_sm90: 288 CTAs do not fit on 132 SMs at once",
    "nf4_linear_sm90: 134 CTAs do not fit on 132 SMs at once",
    "nf4_linear_sm90: grid must be a multiple of cluster",
    "nf4_linear_sm90: cluster must be 1 or 2",
]


def test_torch_without_cuda_loads_it(build: Build) -> None:
    """In a process of its own: an op can be registered only once."""
    program = LOADING.replace("@LIBRARY@", repr(str(build.library)))
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    schema, gemv, *rest = result.stdout.strip().splitlines()
    assert schema.startswith("tli_engine::nf4_linear_sm90(Tensor x, Tensor records, Tensor? bias")
    assert schema.endswith("Tensor(a!) workspace, Tensor(b!) flags) -> Tensor")
    # the same but for the name, and what the cut is called
    assert gemv == schema.replace("linear", "gemv").replace("int[] tile", "int[] plan")
    assert rest == PRINTED
