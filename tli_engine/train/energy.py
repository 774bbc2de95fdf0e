"""Energy that a GPU took, where NVIDIA's management library counts it."""

import ctypes

import torch


def energy_joules(device: torch.device) -> float | None:
    """Energy that a GPU has taken since its driver was loaded; ``None`` where that is not known.

    All that runs on the GPU takes part, other processes' work too.
    """
    if device.type != "cuda":
        return None
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return read_energy(library, uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def read_energy(library: ctypes.CDLL, uuid: str) -> float | None:
    """Ask the library for a GPU's counter; volta and newer have one."""
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlInit_v2() != 0:
        return None
    try:
        if library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
            return None
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) != 0:
            return None
    finally:
        library.nvmlShutdown()
    return millijoules.value / 1000
