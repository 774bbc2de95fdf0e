import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from tli_engine import backends
from tli_engine.backends import BackendUnavailableError, explain, resolve
from tli_engine.reference import segment_mean as reference

ENV = "TLI_ENGINE_BACKEND"
KERNEL = "tli_engine.kernels.segment_mean"


@pytest.fixture(autouse=True)
def _forgets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice in the environment, no kernel loaded, nothing resolved before or after."""
    monkeypatch.delenv(ENV, raising=False)
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    backends._resolve.cache_clear()
    yield
    backends._resolve.cache_clear()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A Triton kernel of segment_mean that is there."""
    module: Any = ModuleType(KERNEL)
    module.segment_mean = lambda *args: "triton"
    monkeypatch.setitem(sys.modules, KERNEL, module)
    function: Callable[..., Any] = module.segment_mean
    return function


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the kernel's import fail for want of a package, or of itself."""

    def fail(package: str) -> None:
        import_module = backends.importlib.import_module

        def absent(name: str) -> Any:
            if name == KERNEL:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return import_module(name)

        monkeypatch.setattr(backends.importlib, "import_module", absent)

    return fail


def test_triton_is_preferred(kernel: Callable[..., Any]) -> None:
    assert resolve("segment_mean") is kernel
    assert explain("segment_mean") == ("triton", ())


def test_an_op_without_kernel_takes_the_reference_and_says_why(
    needs: Callable[[str], None],
) -> None:
    needs(KERNEL)
    assert resolve("segment_mean") is reference.segment_mean
    assert explain("segment_mean") == ("reference", ("triton has no segment_mean",))


def test_a_missing_kernels_folder_is_a_missing_kernel(needs: Callable[[str], None]) -> None:
    needs("tli_engine.kernels")
    assert explain("segment_mean") == ("reference", ("triton has no segment_mean",))


def test_missing_triton_is_named(needs: Callable[[str], None]) -> None:
    needs("triton")
    backend, reasons = explain("segment_mean")
    assert backend == "reference"
    assert reasons == ("triton needs triton, which is not installed",)


def test_the_environment_chooses(
    kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve("segment_mean") is kernel
    # read at every call, not once
    monkeypatch.setenv(ENV, "reference")
    assert resolve("segment_mean") is reference.segment_mean
    assert explain("segment_mean") == ("reference", ())
    monkeypatch.setenv(ENV, "")
    assert resolve("segment_mean") is kernel


def test_a_chosen_backend_that_cannot_run_raises_and_is_not_replaced(
    needs: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("triton")
    monkeypatch.setenv(ENV, "triton")
    for ask in (resolve, explain):
        with pytest.raises(
            BackendUnavailableError,
            match="no backend for 'segment_mean': triton needs triton, which is not installed",
        ):
            ask("segment_mean")


def test_an_unknown_backend_is_named_with_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, "tritn")
    with pytest.raises(
        BackendUnavailableError,
        match="TLI_ENGINE_BACKEND=tritn: not one of cuda, triton, reference",
    ):
        resolve("segment_mean")


def test_an_unknown_op_lists_every_reason() -> None:
    with pytest.raises(
        BackendUnavailableError,
        match="no backend for 'nothing': triton has no nothing; reference has no nothing",
    ):
        resolve("nothing")


def test_a_kernel_that_is_broken_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only absence is a reason to choose another: a bug in a kernel has to show."""

    def broken(name: str) -> Any:
        raise SyntaxError(name)

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    with pytest.raises(SyntaxError):
        resolve("segment_mean")
