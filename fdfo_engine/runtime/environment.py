"""What a run ran on: recorded with the run, shown by `fdfo doctor` and in reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
from pathlib import Path
from typing import Any

PACKAGES = (
    "fdfo-engine", "torch", "diffusers", "transformers", "peft", "deepspeed", "triton", "numpy", "safetensors",
    "xformers",
)  # fmt: skip
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def package_version(name: str) -> str | None:
    """Installed version of a distribution, without importing it; None if it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def user_cache(name: str) -> Path:
    """The folder `name` of this project in the user's cache (`XDG_CACHE_HOME`, else `~/.cache`); it may not be there.

    Raises:
        OSError: the user has no home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path("~/.cache").expanduser()) / "fdfo_engine" / name
    except RuntimeError as error:
        raise OSError(f"no home folder, and no XDG_CACHE_HOME: {error}") from error


def describe_environment() -> dict[str, Any]:
    """Versions, devices and CPU of this machine, ready for JSON; an absent package has version null."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "devices": _devices(),
        "cuda": {"torch": torch.version.cuda, "driver": gpu_driver()},
    }


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return {"name": name, "cores": len(os.sched_getaffinity(0)), "flags": [f for f in _CPU_FLAGS if f in flags]}


def _devices() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"}
        for p in properties
    ]


def gpu_driver() -> str | None:
    """What the NVIDIA driver says of itself; None where there is none."""
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.is_file() else None
