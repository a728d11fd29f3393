"""What the package found on this machine."""

from __future__ import annotations

import math
import platform
from importlib import metadata, util
from typing import Any

import numpy as np

from . import _core, _threads

__all__ = ["info"]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    if util.find_spec("cupy") is None:
        return {"available": False, "reason": "CuPy is not installed"}
    from .cuda import require

    try:
        cupy, index = require("cuda")
    except (ImportError, RuntimeError) as e:
        return {"available": False, "reason": str(e)}
    name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    return {
        "available": True,
        "reason": None,
        "device": f"cuda:{index}",
        "name": name,
        "cupy": cupy.__version__,
    }


def info() -> dict[str, Any]:
    """Describe this machine as the package sees it.

    Returns
    -------
    dict
        Plain values, fit for JSON: versions, ISA levels and why each missing one is missing, AMX
        permission, threads, CUDA.
    """
    levels = dict(_core.isa_report())
    quota = _threads.cgroup_quota()
    return {
        "nibblas": _core.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "isa": {
            "active": _core.isa_active(),
            "detected": _core.isa_detected(),
            "note": _core.isa_warning(),
            "levels": {
                name: {"available": reason is None, "reason": reason}
                for name, reason in levels.items()
            },
        },
        "amx": {"available": levels["amx"] is None, "reason": levels["amx"]},
        "threads": {
            "num_threads": _threads.get_num_threads(),
            "cpus": _threads.available_cpus(),
            "cgroup_quota": None if math.isinf(quota) else quota,
        },
        "cuda": _cuda(),
        "packages": {
            name: _version(name) for name in ("ml_dtypes", "rich", "matplotlib", "threadpoolctl")
        },
    }
