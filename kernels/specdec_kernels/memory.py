"""How much memory a process has used, on its device and on the host."""

import re
import sys
from contextlib import suppress

import torch

_MIB = 2**20


def memory(device: torch.device | str = "cpu") -> dict[str, float]:
    """MiB by name; what the platform does not tell is left out.

    `rss_peak`: the largest resident size of the process. On CUDA `allocated`, `reserved` (by the caching allocator) and
    their peaks; on MPS `allocated` and `reserved` (by the driver), as they are now. Peaks are those since the start, or
    since `reset_peaks`.
    """
    device = torch.device(device)
    found: dict[str, float] = {}
    if device.type == "cuda":
        found = {
            "allocated": torch.cuda.memory_allocated(device) / _MIB,
            "allocated_peak": torch.cuda.max_memory_allocated(device) / _MIB,
            "reserved": torch.cuda.memory_reserved(device) / _MIB,
            "reserved_peak": torch.cuda.max_memory_reserved(device) / _MIB,
        }
    elif device.type == "mps":
        found = {
            "allocated": torch.mps.current_allocated_memory() / _MIB,
            "reserved": torch.mps.driver_allocated_memory() / _MIB,
        }
    peak = _resident_peak()
    return found if peak is None else {**found, "rss_peak": peak}


def reset_peaks(device: torch.device | str) -> None:
    """Begin the peaks of the device and of the host anew; the host's only on Linux."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Without the right to write there, the peak stays that of the process.
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        # 5 stands for the peak of the resident size; see proc_pid_clear_refs(5).
        file.write("5")


def _resident_peak() -> float | None:
    # What `getrusage` tells on Linux may be the peak of the process that started this one.
    with suppress(OSError), open("/proc/self/status") as file:
        found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
        return int(found[1]) / 1024 if found else None
    try:
        import resource
    except ImportError:
        return None
    # Bytes on macOS, KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (_MIB if sys.platform == "darwin" else 1024)
