"""Files made to do harm: each is refused with a ValueError, quickly, in little memory."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblas as nb


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def matrix(**changes):
    """The header and data of a small legal int4_g8 matrix (2, 16), with changes."""
    header = {
        "__metadata__": {"nibblas.version": "1", "w.format": "int4_g8", "w.shape": "[2, 16]"},
        "w.scales": entry("F16", [2, 2], 0, 8),
        "w.codes": entry("U8", [2, 8], 8, 24),
    }
    data = np.ones(4, np.float16).tobytes() + bytes(range(16))
    metadata = changes.pop("metadata", {})
    header["__metadata__"] |= metadata
    header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if v is not None}
    data = changes.pop("data", data)
    header |= changes
    return {k: v for k, v in header.items() if v is not None}, data


def refuse(tmp_path, header, data=b"", match="."):
    with pytest.raises(ValueError, match=match) as caught:
        nb.load(raw(tmp_path / "f", header, data))
    assert len(str(caught.value)) < 1000


def test_the_legal_file_loads(tmp_path):
    q = nb.load(raw(tmp_path / "f", *matrix()))["w"]
    assert q.shape == (2, 16)
    assert q.codes()[0, :4].tolist() == [-8, -8, -7, -8]


@pytest.mark.parametrize("name", ["truncated", "length_2_63", "length_past_end", "empty", "short"])
def test_length_fields(tmp_path, name):
    good = raw(tmp_path / "f", *matrix()).read_bytes()
    content = {
        "truncated": good[:-1],
        "length_2_63": (1 << 63).to_bytes(8, "little") + good[8:],
        "length_past_end": len(good).to_bytes(8, "little") + good[8:],
        "empty": b"",
        "short": good[:7],
    }[name]
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=r"truncated|limit|file of|too short"):
        nb.load(tmp_path / "f")


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": entry("U8", [1 << 63], 0, 4)}, b"1234", "64 bits"),
        ({"a": entry("U8", [1 << 32, 1 << 32, 4], 0, 4)}, b"1234", "64 bits"),
        ({"a": entry("F32", [2], 0, 4)}, b"1234", "8 bytes by its shape"),
        ({"a": entry("U8", [4], 0, 4)}, b"123", "truncated"),
        ({"a": entry("U8", [4], 0, 4)}, b"12345", "1 unused"),
        ({"a": entry("U8", [4], 1, 5)}, b"12345", "unused bytes before"),
        ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, b"123456", "overlaps"),
        ({"a": entry("U8", [1] * 9, 0, 1)}, b"1", "more than 8 dim"),
        ({"a": entry("X8", [1], 0, 1)}, b"1", "unknown type"),
        (
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"12",
            "two entries",
        ),
        ({"a": entry("U8", [0, 1 << 60], 0, 0), "b": entry("U8", [1 << 64, 0], 0, 0)}, b"", "."),
        ({"a": entry("U8", [0, 1 << 63], 0, 0)}, b"", "too large"),
        ({"a": entry("BOOL", [2], 0, 2)}, b"\x01\x02", "other than 0 and 1"),
        ({"a": entry("F4", [2], 0, 1)}, b"\x01", "no NumPy type"),
        (b"[" * 100_000, b"", "begin with"),
        (b'{"a":' + b"[" * 100_000, b"", "."),
    ],
)
def test_containers(tmp_path, header, data, match):
    refuse(tmp_path, header, data, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metadata": {"nibblas.version": "2"}}, "version '2'"),
        ({"metadata": {"nibblas.version": ""}}, "version"),
        ({"metadata": {"w.format": "int9_g8"}}, "int9"),
        ({"metadata": {"w.format": "int4_g0"}}, "g0|group"),
        ({"metadata": {"w.format": "int4_g" + "9" * 100_000}}, "."),
        ({"metadata": {"w.format": ""}}, "."),
        ({"metadata": {"w.format": "uint4_g8"}}, "zeros. is missing"),
        ({"metadata": {"w.format": "int4_g16"}}, "scales"),
        ({"metadata": {"w.format": "int4_g8_sf32"}}, "must be F32"),
        ({"metadata": {"w.format": "int5_g8"}}, "codes"),
        ({"metadata": {"w.shape": None}}, "shape"),
        ({"metadata": {"w.shape": "[2,17]"}}, "must be U8"),
        # A last half byte that is not zero: two files, one matrix.
        ({"metadata": {"w.shape": "[2,15]"}, "data": bytes(8) + b"\xff" * 16}, "."),
        ({"metadata": {"w.shape": "[3, 16]"}}, "must be U8"),
        ({"metadata": {"w.shape": "[-2, 16]"}}, "shape"),
        ({"metadata": {"w.shape": "[2]"}}, "shape"),
        ({"metadata": {"w.shape": "[2, 16, 1]"}}, "shape"),
        ({"metadata": {"w.shape": "[2.0, 16]"}}, "shape"),
        ({"metadata": {"w.shape": "[" * 50_000}}, "shape"),
        ({"metadata": {"w.shape": "[9999999999999999999, 9999999999999999999]"}}, "."),
        ({"metadata": {"w.shape": "[" + "9" * 5000 + ", 1]"}}, "shape"),
        ({"metadata": {"w.shape": "[٢, 16]"}}, "shape"),  # an Arabic digit
        ({"metadata": {"w.transposed": "yes"}}, "transposed"),
        ({"metadata": {"v.format": "int4_g8", "v.shape": "[2, 16]"}}, "missing"),
        ({"w.codes": entry("I8", [2, 8], 8, 24)}, "must be U8"),
        ({"w.codes": entry("U8", [16], 8, 24)}, "must be U8"),
        ({"w.codes": entry("U8", [8, 2], 8, 24)}, "must be U8"),
        ({"w.codes": None, "x": entry("U8", [2, 8], 8, 24)}, "missing"),
        ({"w.scales": entry("BF16", [2, 2], 0, 8)}, "must be F16"),
        ({"w": entry("U8", [0], 24, 24)}, "both"),
        ({"w.zeros": entry("U8", [0], 24, 24)}, "has no zeros"),
        ({"w.bounds": entry("U8", [0], 24, 24)}, "must be F32"),
        ({"data": np.full(4, np.nan, np.float16).tobytes() + bytes(16)}, "finite"),
        ({"data": np.full(4, np.inf, np.float16).tobytes() + bytes(16)}, "finite"),
    ],
)
def test_matrices(tmp_path, changes, match):
    refuse(tmp_path, *matrix(**changes), match)


def test_codes_that_mean_nothing(tmp_path):
    # Ternary has three codes in two bits.
    header = {
        "__metadata__": {"nibblas.version": "1", "w.format": "ternary_g8", "w.shape": "[1, 8]"},
        "w.scales": entry("F16", [1, 1], 0, 2),
        "w.codes": entry("U8", [1, 2], 2, 4),
    }
    one = np.ones(1, np.float16).tobytes()
    assert nb.load(raw(tmp_path / "f", header, one + b"\x00\xaa"))["w"].shape == (1, 8)
    refuse(tmp_path, header, one + b"\x00\xc0", "code")


@pytest.mark.parametrize("bound", [np.nan, np.inf, -1.0])
def test_bounds_that_bound_nothing(tmp_path, bound):
    header, data = matrix(**{"w.bounds": entry("F32", [2, 2], 24, 40)})
    refuse(tmp_path, header, data + np.full(4, bound, np.float32).tobytes(), "bounds")


def test_float_zero_points_that_are_not_finite(tmp_path):
    header, data = matrix(
        metadata={"w.format": "uint4_g8"}, **{"w.zeros": entry("F32", [2, 2], 24, 40)}
    )
    good = data + np.full(4, 3.5, np.float32).tobytes()
    assert nb.load(raw(tmp_path / "f", header, good))["w"].zeros[0, 0] == 3.5
    refuse(tmp_path, header, data + np.full(4, np.nan, np.float32).tobytes(), "finite")


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 30))
def test_a_damaged_file_loads_or_is_refused(tmp_path_factory, at, value, cut):
    path = raw(tmp_path_factory.getbasetemp() / "damaged", *matrix())
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content[: len(content) - max(0, cut - 15)])
    try:
        loaded = nb.load(path)
    except ValueError:
        return
    for tensor in loaded.values():
        assert np.asarray(tensor).ndim <= 8


@pytest.mark.parametrize("kind", ["tensors", "metadata", "names", "dims", "nesting"])
def test_memory_is_bounded_by_the_file(tmp_path, kind):
    """Opening takes at most the file's size and 16 MiB."""
    n = 65_536
    header = {
        "tensors": {f"{i:x}": entry("U8", [0], 0, 0) for i in range(n)},
        "metadata": {"__metadata__": {f"{i:x}": "" for i in range(n)}},
        "names": {f"{i}" + "n" * 60_000: entry("U8", [0], 0, 0) for i in range(500)},
        "dims": b'{"a":{"shape":[' + b"1," * 5_000_000 + b"1]}}",
        "nesting": b'{"a":{"x":' + b"[" * 5_000_000,
    }[kind]
    path = raw(tmp_path / "f", header)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                f"""
                import resource, time
                from nibblas import _core
                def peak():
                    with open("/proc/self/status") as f:
                        return next(int(l.split()[1]) for l in f if l.startswith("VmHWM")) << 10
                before = peak()
                start = time.perf_counter()
                try:
                    _core.SafetensorsReader({str(path)!r})
                except ValueError:
                    pass
                print(peak() - before, time.perf_counter() - start)
                """
            ),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    took, seconds = map(float, done.stdout.split())
    assert took <= path.stat().st_size + (16 << 20)
    assert seconds < 2
