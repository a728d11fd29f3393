"""What the distribution promises: contents, size, import cost, and where unsafe code lives."""

import json
import os
import re
import subprocess
import sys
import zlib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20

# Where `unsafe` may stand: the kernels, the memory and threads under them, the raw views of the
# loop nest, and the bindings. The rest is safe Rust; rust/io forbids it outright.
UNSAFE_FILES = {
    "rust/core/src/activation.rs",
    "rust/core/src/buf.rs",
    "rust/core/src/dense/mod.rs",
    "rust/core/src/dense/trellis.rs",
    "rust/core/src/dense/wide.rs",
    "rust/core/src/format/lanes.rs",
    "rust/core/src/gemm.rs",
    "rust/core/src/halves.rs",
    "rust/core/src/isa.rs",
    "rust/core/src/matrix.rs",
    "rust/core/src/pack.rs",
    "rust/core/src/pair.rs",
    "rust/core/src/pool.rs",
    "rust/ops/src/intops/pieces.rs",
    "rust/ops/src/level.rs",
}
UNSAFE_FOLDERS = ("rust/core/src/kernel/", "rust/core/src/sparse/", "rust/py/src/")


@pytest.fixture(scope="module")
def installed() -> metadata.Distribution:
    try:
        dist = metadata.distribution("nibblas")
    except metadata.PackageNotFoundError:
        pytest.skip("nibblas is not installed as a distribution")
    return dist


def packaged(dist: metadata.Distribution) -> list[metadata.PackagePath]:
    """Return the files of the wheel: what is installed, less what the installer made."""
    made = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}
    files = dist.files
    assert files
    return [f for f in files if f.name not in made and f.suffix != ".pyc" and ".." not in f.parts]


def test_wheel_contents(installed: metadata.Distribution) -> None:
    names = {str(f) for f in packaged(installed)}
    assert "nibblas/py.typed" in names
    assert "nibblas/_core.pyi" in names
    assert "nibblas/__init__.py" in names
    assert [n for n in names if n.startswith("nibblas/_core.abi3.")]
    licences = {Path(n).name for n in names if ".dist-info/licenses/" in n}
    assert licences >= {"LICENSE-APACHE", "LICENSE-MIT"}
    tops = {n.split("/")[0] for n in names}
    assert all(t == "nibblas" or t.endswith(".dist-info") for t in tops), tops
    for name in ("gemm.cu", "hopper.cu", "include/nibblas/base.cuh"):
        assert f"nibblas/kernels/{name}" in names
    strange = [n for n in names if n.endswith((".rs", ".toml", ".c", ".o", ".a"))]
    assert not strange


def test_wheel_size(installed: metadata.Distribution) -> None:
    """A wheel is a zip file: the sum of the deflated files is its size to within the headers."""
    size = sum(len(zlib.compress(f.locate().read_bytes(), 6)) + 200 for f in packaged(installed))
    assert size < 6 * MIB, f"{size / MIB:.2f} MiB"


def test_metadata(installed: metadata.Distribution) -> None:
    meta = installed.metadata
    assert meta["License-Expression"] == "Apache-2.0 OR MIT"
    assert meta["Requires-Python"] == ">=3.10"
    required = [r for r in installed.requires or [] if "extra ==" not in r]
    assert [re.split(r"[<>=! ]", r)[0] for r in required] == ["numpy"]
    scripts = {e.name: e.value for e in installed.entry_points if e.group == "console_scripts"}
    assert scripts == {"nibblas": "nibblas.cli:main"}


IMPORT_PROBE = """
import ctypes, json, os, sys, time
import numpy
tasks = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
start = time.perf_counter()
import nibblas
took = time.perf_counter() - start
after = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0
amx = None
if sys.platform == "linux" and os.uname().machine == "x86_64":
    allowed = ctypes.c_ulong(0)
    if ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(allowed)) == 0:
        amx = bool(allowed.value >> 18 & 1)
heavy = [m for m in ("rich", "matplotlib", "safetensors") if m in sys.modules]
print(json.dumps({"seconds": took, "threads": after - tasks, "amx": amx, "heavy": heavy}))
"""


def probe_import() -> dict[str, object]:
    # Bytecode is cached, as in every installation.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", IMPORT_PROBE]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=60)
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_import_is_light() -> None:
    """Importing costs 60 ms over NumPy at most, starts no thread, asks for no AMX and no extra."""
    probe_import()
    probes = [probe_import() for _ in range(9)]
    times = sorted(float(str(p["seconds"])) for p in probes)
    assert times[len(times) // 2] < 0.060, times
    assert {p["threads"] for p in probes} == {0}
    assert {p["amx"] for p in probes} <= {None, False}
    assert all(p["heavy"] == [] for p in probes)


def rust_sources() -> list[Path]:
    if not (ROOT / "rust").is_dir():
        pytest.skip("needs the source tree")
    return sorted(p for p in (ROOT / "rust").rglob("*.rs") if "target" not in p.parts)


def code_of(path: Path) -> list[str]:
    """Return the lines without comments and without what strings say."""
    strings = re.compile(r'"(?:[^"\\]|\\.)*"')
    return [strings.sub('""', t).split("//")[0] for t in path.read_text().splitlines()]


def test_unsafe_lives_where_it_may() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in rust_sources()
        if any(re.search(r"\bunsafe\b", t) for t in code_of(path))
    }
    outside = {
        n
        for n in found
        if not n.startswith(UNSAFE_FOLDERS) and "/tests/" not in n and "/benches/" not in n
    }
    assert outside == UNSAFE_FILES, f"{outside ^ UNSAFE_FILES} on one side only"


def test_every_unsafe_block_says_why() -> None:
    silent = []
    for path in rust_sources():
        lines = path.read_text().splitlines()
        for i, line in enumerate(code_of(path)):
            if re.search(r"\bunsafe\s*(\{|impl\b)", line):
                above = lines[max(0, i - 8) : i + 1]
                if not any("SAFETY" in t for t in above):
                    silent.append(f"{path.relative_to(ROOT)}:{i + 1}")
    assert not silent


def test_io_forbids_unsafe() -> None:
    assert rust_sources()
    assert "#![forbid(unsafe_code)]" in (ROOT / "rust/io/src/lib.rs").read_text()


def test_x86_code_lives_in_its_folder() -> None:
    """The rest builds for any target."""
    allowed = (
        "rust/core/src/kernel/x86/",
        "rust/core/src/sparse/kernel/x86/",
        "rust/core/src/halves.rs",
        "rust/core/src/isa.rs",
        "rust/core/src/format/lanes.rs",
        "rust/ops/src/intops/pieces.rs",
    )
    outside = {
        path.relative_to(ROOT).as_posix()
        for path in rust_sources()
        if any(re.search(r"arch::x86|is_x86_feature|\basm!", t) for t in code_of(path))
    }
    assert not [n for n in outside if not n.startswith(allowed)]


def test_readme_commands() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("needs the source tree")
    text = readme.read_text()
    assert "pip install . && nibblas demo" in text
    assert "pip install '.[test]' && pytest" in text
