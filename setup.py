"""Package layout, and the CUDA extension where it is wanted; everything else is in pyproject.toml.

``TLI_ENGINE_CUDA=1`` asks for ``tli_engine/_C.so``, ``0`` leaves it out. Unset, it is built where both
nvcc (of ``$CUDA_HOME``, or on the path) and a torch for CUDA are found. pip hides the installed torch
from a build unless told ``--no-build-isolation``.
"""

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# the oldest torch whose stable ABI is used: 2.11
TORCH_TARGET = "0x020b000000000000"
# wgmma and setmaxnreg exist for this architecture alone
ARCHITECTURE = "arch=compute_90a,code=sm_90a"
ENV = "TLI_ENGINE_CUDA"


def find_nvcc() -> str | None:
    """The compiler: of ``$CUDA_HOME`` if that is set, else on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def find_torch() -> Path | None:
    """Folder of the installed torch, which is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def wants_extension() -> bool:
    """Whether to build it; ends with a line that says why if it was asked for and cannot be."""
    choice = os.environ.get(ENV)
    nvcc, torch = find_nvcc(), find_torch()
    if choice == "1" and nvcc is None:
        raise SystemExit(f"{ENV}=1 needs nvcc: set CUDA_HOME, or put nvcc on the path")
    if choice == "1" and torch is None:
        raise SystemExit(f"{ENV}=1 needs torch's headers: install torch, use --no-build-isolation")
    if choice in ("0", "1"):
        return choice == "1"
    if choice:
        raise SystemExit(f"{ENV} must be 0 or 1, got {choice!r}")
    return bool(nvcc and torch and (torch / "lib/libtorch_cuda.so").exists())


class BuildCuda(build_ext):
    """Calls nvcc itself: torch's own BuildExtension does not build with a torch for CPUs."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python module but a library that torch loads: no Python version in its name."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources at the same time, and link."""
        torch = find_torch()
        assert torch is not None
        temporary, target = Path(self.build_temp), Path(self.get_ext_fullpath(ext.name))
        for folder in (temporary, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        objects = {source: str(temporary / f"{Path(source).name}.o") for source in ext.sources}
        flags = ["-O3", "-lineinfo", "--std=c++17", f"-gencode={ARCHITECTURE}"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        host = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-isystem={torch}/include"]
        # link to the runtime as a whole: the extension loads where no CUDA is installed
        link = ["-shared", "-cudart=static", f"-L{torch}/lib", "-ltorch_cpu", "-ldl"]

        def compile_one(source: str) -> None:
            extra = host if source.endswith(".cpp") else []
            self.nvcc(*flags, *extra, "-c", source, "-o", objects[source])

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(compile_one, ext.sources))
        self.nvcc(*objects.values(), *link, "-o", str(target))

    def nvcc(self, *arguments: str) -> None:
        """Run the compiler, and end with a line if it fails."""
        nvcc = find_nvcc()
        assert nvcc is not None
        print(nvcc, *arguments, flush=True)
        if (status := subprocess.run([nvcc, *arguments], check=False).returncode) != 0:
            raise SystemExit(
                f"nvcc failed with {status}; it must be of CUDA 12.5 or newer. {ENV}=0 installs "
                "without the extension"
            )


def extensions() -> list[Extension]:
    """The extension, if it is wanted."""
    if not wants_extension():
        return []
    # the longest to compile first
    sources = [*sorted(Path("csrc").glob("*.cu")), *sorted(Path("csrc").glob("*.cpp"))]
    return [Extension("tli_engine._C", [str(path) for path in sources])]


setup(
    # kernels/ installs as tli_engine.kernels, never as a top-level ``kernels``: that name belongs
    # to another distribution, which transformers imports
    packages=[*find_packages(include=["tli_engine", "tli_engine.*"]), "tli_engine.kernels"],
    package_dir={"tli_engine.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCuda},
)
