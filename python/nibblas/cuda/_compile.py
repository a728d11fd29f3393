"""Compiling the kernels at run time, with a cache on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from pathlib import Path

__all__ = ["SOURCES", "CompileError", "compile_source", "cubin", "sources"]

SOURCES = Path(__file__).resolve().parent.parent / "kernels"

# No fused multiply-add that the source does not ask for; subnormals and divisions are IEEE's by
# default, which CuPy's own compilation would not leave so.
_OPTIONS = ("-std=c++17", "-default-device", "--fmad=false")


class CompileError(RuntimeError):
    """A kernel that does not compile."""


@functools.cache
def sources() -> dict[str, bytes]:
    """Return every source by the name that an include has."""
    if not SOURCES.is_dir():
        raise RuntimeError(f"the CUDA sources are not at {SOURCES}: the installation is incomplete")
    files = sorted(SOURCES.glob("*.cu")) + sorted(SOURCES.glob("include/nibblas/*.cuh"))
    return {f.name if f.suffix == ".cu" else f"nibblas/{f.name}": f.read_bytes() for f in files}


def _options(arch: str, defines: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    return (
        *_OPTIONS,
        *(["-DNB_EVERY_LANE=1"] if os.environ.get("NIBBLAS_CUDA_RACECHECK") == "1" else []),
        f"--gpu-architecture={arch}",
        *(f"-DNB_{name}={value}" for name, value in defines),
    )


def compile_source(name: str, arch: str, defines: tuple[tuple[str, int], ...] = ()) -> bytes:
    """Compile one loop nest; needs NVRTC and no GPU.

    Parameters
    ----------
    name : str
        File name, such as ``"gemm.cu"``.
    arch : str
        Such as ``"sm_90a"``.
    defines : tuple of (str, int)
        What the nest is made for.

    Raises
    ------
    CompileError
        Names the kernel, the architecture and the first error.
    """
    from cupy_backends.cuda.libs import nvrtc

    texts = sources()
    headers = [n for n in texts if n.startswith("nibblas/")]
    program = nvrtc.createProgram(
        texts[name].decode(), name, [texts[h] for h in headers], [h.encode() for h in headers]
    )
    try:
        try:
            nvrtc.compileProgram(program, _options(arch, defines))
        except nvrtc.NVRTCError as e:
            log = nvrtc.getProgramLog(program)
            found = re.search(r"^.*\berror\b.*$", log, re.MULTILINE)
            first = found.group(0).strip() if found else (log.strip() or str(e))
            values = " ".join(f"{n}={v}" for n, v in defines)
            raise CompileError(f"{name} ({values}) does not compile for {arch}: {first}") from None
        image: bytes = nvrtc.getCUBIN(program)
        return image
    finally:
        nvrtc.destroyProgram(program)


def _cache_dir() -> Path | None:
    named = os.environ.get("NIBBLAS_CUDA_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "nibblas" / "cuda"


@functools.cache
def _digest() -> bytes:
    h = hashlib.sha256()
    for name, text in sources().items():
        h.update(f"{name}\0{len(text)}\0".encode())
        h.update(text)
    return h.digest()


def cubin(name: str, arch: str, defines: tuple[tuple[str, int], ...] = ()) -> bytes:
    """Return a compiled loop nest, from the cache where it is there and whole.

    The key holds the contents of every source, the options and the compiler's version; a file is
    written under another name and moved, so that processes may race.
    """
    from cupy_backends.cuda.libs import nvrtc

    h = hashlib.sha256(_digest())
    h.update(repr((name, _options(arch, defines), nvrtc.getVersion())).encode())
    folder = _cache_dir()
    path = folder / f"{h.hexdigest()}.cubin" if folder else None
    if path is not None:
        try:
            data = path.read_bytes()
        except OSError:
            data = b""
        if len(data) > 32 and hashlib.sha256(data[32:]).digest() == data[:32]:
            return data[32:]
    image = compile_source(name, arch, defines)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(fd, "wb") as f:
                f.write(hashlib.sha256(image).digest() + image)
            os.replace(temporary, path)
        except OSError:
            pass  # a cache that cannot be written costs time, nothing else
    return image
