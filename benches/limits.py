"""What the core can do at most, measured in turn with the contenders of a case.

`probes/limits.c` has the loops, built by the C compiler of the machine when the race begins. A
shared host slows down and recovers from one second to the next; the share of a limit that ran in
the same rounds says what a contender leaves on the table whatever the host does.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent / "probes" / "limits.c"


#: kind: (function, bytes of K in a tile, multiplications and additions of a step)
KINDS = {
    "int8 tiles": ("limit_int8", 64, 4 * 2 * 16 * 16 * 64),
    "int8 tiles of 32": ("limit_int8", 32, 4 * 2 * 16 * 16 * 32),
    "bf16 tiles": ("limit_bf16", 64, 4 * 2 * 16 * 16 * 32),
    "f32 registers": ("limit_f32", 0, 28 * 2 * 16),
}


@cache
def _library() -> ctypes.CDLL:
    """Build and load the loops; RuntimeError says why not."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler or platform.machine() != "x86_64":
        raise RuntimeError("no C compiler for x86-64")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "limits.so"
        command = [compiler, "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(out)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(out))
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"{compiler}: {error}") from error


class Limit:
    """A loop that takes as long as the machine needs for the multiplications of a case alone."""

    def __init__(self, kind: str):
        self.name = f"limit: {kind}"
        self._function, self._k, self._work = KINDS[kind]

    def missing(self) -> str:
        """Why it cannot run here, or nothing."""
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        need = "avx512f" if self._function == "limit_f32" else "amx_bf16"
        if need not in flags:
            return f"the CPU has no {need}"
        try:
            if need == "amx_bf16" and _library().limit_tiles():
                return "the process may not use tiles"
        except RuntimeError as error:
            return str(error)
        return ""

    def within(self, f: Callable[..., Any], *args: Any) -> Any:
        """Call in this thread, as a contender would."""
        return f(*args)

    def call(self, work: float) -> Callable[[], object]:
        """Return a call that does so many operations."""
        function = getattr(_library(), self._function)
        function.argtypes, function.restype = [ctypes.c_long, ctypes.c_int], None
        steps = max(1, round(work / self._work))
        return lambda: function(steps, self._k)
