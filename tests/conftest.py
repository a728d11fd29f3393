"""What several test files share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import nibblas as nb
from nibblas import _core

PACKAGE_ROOT = str(Path(nb.__file__).resolve().parent.parent)


def pytest_configure() -> None:
    """Hear Ctrl-C: what a shell without job control starts in the background is deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def levels() -> list[str]:
    """ISA levels that run here, lowest first."""
    names = []
    for name, reason in _core.isa_report():
        if reason is None:
            names.append(name)
        if name == _core.isa_active():
            break
    return names


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240607)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run a program in a fresh interpreter; returns what it prints."""

    def run(code: str, *, timeout: float = 120, warnings: str = "error", **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", warnings, "-c", code],
            env={**os.environ, "PYTHONPATH": PACKAGE_ROOT, **env},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr or f"exit {done.returncode}"
        return done.stdout

    return run


def sequential_f32(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``x @ w.T`` as one chain of correctly rounded fused multiply-adds per output, k ascending.

    A product of two float32 is exact in longdouble's 64 bits; the sum is rounded to odd there by
    keeping the sticky bit, so that the second rounding to float32 is harmless.
    """
    out = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k in range(x.shape[1]):
        product = x[:, k].astype(np.longdouble)[:, None] * w[:, k].astype(np.longdouble)[None, :]
        out = _add_rounded(product, out)
    return out


def _add_rounded(product: np.ndarray, acc: np.ndarray) -> np.ndarray:
    wide = acc.astype(np.longdouble)
    total = product + wide
    # Two-sum: what the addition in 64 bits lost decides ties of the rounding to float32.
    back = total - product
    lost = (product - (total - back)) + (wide - back)
    near = total.astype(np.float32)
    gap = total - near.astype(np.longdouble)
    toward = np.where(gap > 0, np.float32(np.inf), np.float32(-np.inf)).astype(np.float32)
    other = np.nextafter(near, toward)
    tie = np.abs(gap) == np.abs(other.astype(np.longdouble) - total)
    wrong_side = tie & (lost != 0) & (np.sign(lost) == np.sign(gap))
    return np.where(wrong_side, other, near).astype(np.float32)
