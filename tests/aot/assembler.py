"""Kernels compiled with no GPU, and what ptxas says of them: registers, spills, and how they take products."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_WAIT = r"wgmma\.wait_group\S*\s+(\d+)"


def print_reports(report_of: Callable[[int], dict[str, Any]]) -> None:
    """Print JSON: what is said of each architecture that the command names, such as ``80,90``.

    One process for all of them: it takes longer to start than to compile most kernels.
    """
    print(json.dumps({name: report_of(int(name)) for name in sys.argv[1].split(",")}))


def compile_kernel(
    kernel: Any,
    constants: Mapping[str, Any],
    type_of: Callable[[str], str],
    divisible: Callable[[str], bool],
    capability: int,
    options: dict[str, Any],
) -> Any:
    """Compile a kernel as its launcher would on an architecture.

    Args:
        kernel: Of Triton.
        constants: Its constants by name.
        type_of: The type of every other argument.
        divisible: Which arguments Triton is told to be multiples of 16.
        capability: Of the architecture.
        options: Of the launch.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else type_of(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if divisible(name)},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(compiled: Any, capability: int) -> dict[str, Any]:
    """What every kernel is held to: shared memory, registers and spilled bytes.

    ``log`` is empty unless the assembler failed.
    """
    log = assembler_log(compiled.asm["ptx"], capability)
    return {
        "shared": compiled.metadata.shared,
        "spilled": max([int(n) for n in re.findall(r"(\d+) bytes spill", log)], default=0),
        "registers": max([int(n) for n in re.findall(r"Used (\d+) registers", log)], default=0),
        "serialised": bool(re.search(r"C75\d\d", log)),
        # products still in flight when the loop goes on, their operands open to being overwritten
        "in_flight": max([int(n) for n in re.findall(_WAIT, compiled.asm["ptx"])], default=0),
        "log": log if "Used" not in log else "",
    }


def assembler_log(ptx: str, capability: int) -> str:
    """What ptxas says of the PTX: spills, and wgmma that it had to serialise."""
    suffix = "a" if capability >= 90 else ""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas /= "ptxas-blackwell" if capability >= 100 else "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(ptxas), "-v", f"--gpu-name=sm_{capability}{suffix}", str(source)]
        command += ["-o", f"{folder}/kernel.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stderr + result.stdout
