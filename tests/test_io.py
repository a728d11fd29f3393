"""Saving and loading: round trips, other people's files, and writing that fails."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import nibblas as nb
from nibblas import io

GOLDEN = Path(__file__).parent / "golden"
FORMATS = [
    "int2_g8",
    "int4_g128",
    "int4_g32_sbf16",
    "int8",
    "int5_g16_sf32",
    "uint3_g16",
    "uint8_g64_sbf16",
    "bipolar1_g32",
    "bipolar8_g32",
    "ternary",
    "int4_g32_si8",
    "uint2_g8_si8",
]
PLAIN = [
    "bool",
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64"),
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz"),
]


def weight(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def plain(name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(1).integers(1, 4, shape)
    return values.astype(np.dtype(getattr(ml_dtypes, name, name)))


def same_array(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", [(16, 256), (3, 37), (1, 1), (0, 8), (5, 0)])
def test_matrix_round_trip(tmp_path, fmt, shape):
    q = nb.quantize(weight(*shape), fmt)
    nb.save(tmp_path / "q", {"q": q, "t": q.T})
    back = nb.load(tmp_path / "q")
    assert back["q"] == q
    assert back["t"] == q.T
    assert back["t"].shape == shape[::-1]
    np.testing.assert_array_equal(back["q"].dequantize(), q.dequantize())
    assert back["q"].error_bound is None


def test_bounds_are_saved_on_request(tmp_path):
    q = nb.quantize(weight(8, 64), "int4_g32")
    nb.save(tmp_path / "q", {"q": q}, bounds=True)
    np.testing.assert_array_equal(nb.load(tmp_path / "q")["q"].error_bound, q.error_bound)


def test_float_zero_points(tmp_path):
    codes = np.arange(32, dtype=np.uint8).reshape(2, 16) % 16
    scales = np.full((2, 2), 0.5, np.float32)
    q = nb.QTensor.from_parts("uint4_g8", codes, scales, np.full((2, 2), 7.5, np.float32))
    nb.save(tmp_path / "q", {"q": q})
    back = nb.load(tmp_path / "q")["q"]
    assert back == q
    assert back.zeros.dtype == np.float32


@pytest.mark.parametrize("name", PLAIN)
def test_plain_arrays(tmp_path, name):
    arrays = {f"{s}": plain(name, s) for s in [(), (3,), (2, 3), (0, 4), (2, 1, 3, 1, 2)]}
    nb.save(tmp_path / "a", arrays)
    back = nb.load(tmp_path / "a")
    assert set(back) == set(arrays)
    for key, a in arrays.items():
        assert same_array(back[key], a), key


def test_any_memory_layout(tmp_path):
    a = weight(6, 8)
    views = {
        "fortran": np.asfortranarray(a),
        "swapped": a.astype(">f4"),
        "reversed": a[::-1, ::-2],
        "broadcast": np.broadcast_to(a[:1], (4, 8)),
        "misaligned": np.frombuffer(b"x" + a.tobytes(), np.float32, offset=1).reshape(6, 8),
        "scalar": np.float32(3),
    }
    nb.save(tmp_path / "a", views)
    back = nb.load(tmp_path / "a")
    for key, value in views.items():
        assert back[key].dtype == np.float32
        np.testing.assert_array_equal(back[key], value)
        assert back[key].shape == np.shape(value)


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20), unique=True, max_size=6
    ),
    data=st.data(),
)
def test_any_names(tmp_path_factory, names, data):
    tensors = {}
    for name in names:
        fmt = data.draw(st.sampled_from([None, "int4_g8", "uint2_g8"]))
        shape = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 20)))
        tensors[name] = weight(*shape) if fmt is None else nb.quantize(weight(*shape), fmt)
    path = tmp_path_factory.mktemp("names") / "f"
    try:
        nb.save(path, tensors)
    except ValueError:
        assert "__metadata__" in names
        return
    back = nb.load(path)
    assert set(back) == set(tensors)
    for name, value in tensors.items():
        if isinstance(value, nb.QTensor):
            assert back[name] == value
        else:
            assert same_array(back[name], value)


def test_some_names_only(tmp_path):
    nb.save(tmp_path / "f", {"a": np.arange(3), "b": np.arange(4)})
    assert list(nb.load(tmp_path / "f", ["b"])) == ["b"]
    assert list(nb.load(tmp_path / "f", "a")) == ["a"]
    with pytest.raises(KeyError, match="c"):
        nb.load(tmp_path / "f", ["c"])


def test_safetensors_reads_ours(tmp_path):
    q = nb.quantize(weight(8, 64), "uint4_g32_sf32")
    arrays = {name: plain(name, (3, 5)) for name in PLAIN if hasattr(np, name)}
    nb.save(tmp_path / "f", {"q": q} | arrays)
    theirs = safetensors.numpy.load_file(tmp_path / "f")
    for name, a in arrays.items():
        if name != "complex64":
            assert same_array(theirs[name], a), name
    np.testing.assert_array_equal(theirs["q.scales"], q.scales)
    np.testing.assert_array_equal(theirs["q.zeros"], q.zeros)
    low, high = theirs["q.codes"] & 15, theirs["q.codes"] >> 4
    np.testing.assert_array_equal(np.stack([low, high], -1).reshape(8, 64), q.codes())
    with safetensors.safe_open(tmp_path / "f", "np") as f:
        assert f.metadata() == {
            "nibblas.version": "1",
            "q.format": "uint4_g32_sf32",
            "q.shape": "[8, 64]",
        }


def test_we_read_safetensors(tmp_path):
    arrays = {
        name: plain(name, (3, 5)) for name in PLAIN if hasattr(np, name) and name != "complex64"
    }
    arrays |= {
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 2), np.float32),
        "bf16": plain("bfloat16", (7,)),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "f", {"format": "np", "a.format": "x"})
    back = nb.load(tmp_path / "f")
    assert set(back) == set(arrays)
    for name, a in arrays.items():
        assert same_array(back[name], a), name


# The file stays as the first version wrote it; a later version that cannot read it is broken.
def golden() -> dict[str, "nb.QTensor | np.ndarray"]:
    steps = np.arange(6 * 40).reshape(6, 40)
    scales = (1 + np.arange(6 * 3).reshape(6, 3)) / 64
    return {
        "int4": nb.QTensor.from_parts("int4_g16", (steps % 16 - 8).astype(np.int8), scales),
        "int7": nb.QTensor.from_parts("int7_g16_sbf16", (steps % 128 - 64).astype(np.int8), scales),
        "uint3": nb.QTensor.from_parts(
            "uint3_g16", (steps % 8).astype(np.uint8), scales, steps[:, :3] % 8
        ),
        "float_zero": nb.QTensor.from_parts(
            "uint2_g16", (steps % 4).astype(np.uint8), scales, scales * 40
        ),
        "bipolar3": nb.QTensor.from_parts(
            "bipolar3", (steps % 8 * 2 - 7).astype(np.int8), scales[:, :1]
        ),
        "ternary": nb.QTensor.from_parts("ternary", (steps % 3 - 1).astype(np.int8), scales[:, :1]),
        "turned": nb.QTensor.from_parts("int2_g16", (steps % 4 - 2).astype(np.int8), scales).T,
        "plain": steps.astype(np.float16),
        "bf16": steps[0].astype(ml_dtypes.bfloat16),
    }


def test_golden_file():
    back = nb.load(GOLDEN / "v1.safetensors")
    wanted = golden()
    assert set(back) == set(wanted)
    for name, value in wanted.items():
        if isinstance(value, nb.QTensor):
            assert back[name] == value, name
            assert same_array(back[name].codes(), value.codes()), name
        else:
            assert same_array(back[name], value), name


def test_the_same_tensors_give_the_same_file(tmp_path):
    nb.save(tmp_path / "f", golden())
    assert (tmp_path / "f").read_bytes() == (GOLDEN / "v1.safetensors").read_bytes()


@pytest.mark.parametrize("path_type", [str, Path, os.fsencode])
def test_path_types(tmp_path, path_type):
    path = path_type(str(tmp_path / "ä"))
    nb.save(path, {"a": np.arange(3)})
    np.testing.assert_array_equal(nb.load(path)["a"], np.arange(3))


def test_system_errors(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        nb.load(tmp_path / "none")
    assert caught.value.filename == str(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        nb.load(tmp_path)
    with pytest.raises(IsADirectoryError):
        nb.save(tmp_path, {})
    with pytest.raises(FileNotFoundError):
        nb.save(tmp_path / "no" / "f", {})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        nb.save(tmp_path / "file" / "f", {})
    with pytest.raises(ValueError, match=r"(?i)nul"):
        nb.load("a\0b")
    with pytest.raises(OSError, match="regular"):
        nb.load(os.devnull)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="regular"):
        nb.load(tmp_path / "pipe")


def q8() -> "nb.QTensor":
    return nb.quantize(weight(2, 8), "int8")


@pytest.mark.parametrize(
    "tensors",
    [
        lambda: {"a": q8(), "a.codes": np.arange(2)},
        lambda: {"a.scales": np.arange(2), "a": q8()},
        lambda: {"a": q8(), "a.zeros": np.arange(2)},
        lambda: {"a": q8(), "a.bounds": np.arange(2)},
        lambda: {"a": q8(), "a.codes": q8()},
        lambda: {"__metadata__": np.arange(2)},
        lambda: {"n" * 65_537: np.arange(2)},
        lambda: {"a": np.zeros((1,) * 9)},
        lambda: {"\ud800": np.arange(2)},
    ],
)
def test_bad_names(tmp_path, tensors):
    with pytest.raises(ValueError, match=r".+"):
        nb.save(tmp_path / "f", tensors())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "tensors",
    [
        {1: np.arange(2)},
        {"a": "text"},
        {"a": [1, 2]},
        {"a": None},
        {"a": np.array([1, "x"], object)},
        {"a": np.array(["x"])},
        {"a": np.zeros(2, np.complex128)},
        {"a": np.zeros(2, [("x", "f4")])},
        {"a": np.zeros(2, "M8[s]")},
        {"a": np.zeros(2, ml_dtypes.int4)},
        [("a", np.arange(2))],
    ],
)
def test_bad_values(tmp_path, tensors):
    with pytest.raises(TypeError):
        nb.save(tmp_path / "f", tensors)
    assert os.listdir(tmp_path) == []


def run(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    nb.save(path, {"old": np.arange(3)})
    before = path.read_bytes()
    done = run(
        f"""
        import resource, signal
        import numpy as np, nibblas as nb
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        # A header that fits, data that do not: the failure comes after the temporary file exists.
        try:
            nb.save({str(path)!r}, {{"a": np.zeros(100), "b": np.zeros(1 << 20)}})
        except OSError as e:
            print(type(e).__name__, e.errno)
        """
    )
    assert done.stdout.split()[:1] == ["OSError"], done.stderr
    assert os.listdir(tmp_path) == ["f"]
    assert path.read_bytes() == before


def test_a_full_target_folder_that_cannot_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder = tmp_path / "ro"
    folder.mkdir()
    folder.chmod(0o500)
    with pytest.raises(PermissionError):
        nb.save(folder / "f", {})


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    nb.save(path, {"old": np.arange(3)})
    before = path.read_bytes()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                f"""
                import time
                import numpy as np
                from nibblas import io
                with io.TensorWriter({str(path)!r}, [("a", "F64", (10,))], {{}}) as w:
                    w.write("a", np.zeros(5))
                    print("half", flush=True)
                    time.sleep(60)
                """
            ),
        ],
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == before
    # The next writer is not disturbed by what the killed one left.
    nb.save(path, {"new": np.arange(4)})
    assert list(nb.load(path)) == ["new"]


def test_an_exception_while_writing_leaves_nothing(tmp_path):
    path = tmp_path / "f"

    def half(stop: bool) -> None:
        with io.TensorWriter(path, [("a", "F64", (10,))], {}) as writer:
            writer.write("a", np.zeros(5))
            assert len(os.listdir(tmp_path)) == 1
            if stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half(stop=True)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="'a' still lacks 40 bytes"):
        half(stop=False)
    assert os.listdir(tmp_path) == []


def test_a_forked_child_does_not_remove_the_parents_file(tmp_path):
    done = run(
        f"""
        import gc, os
        import numpy as np
        from nibblas import io
        w = io.TensorWriter({str(tmp_path / "f")!r}, [("a", "F64", (10,))], {{}})
        pid = os.fork()
        if pid == 0:
            del w
            gc.collect()
            os._exit(0)
        os.waitpid(pid, 0)
        with w:
            w.write("a", np.ones(10))
        print(nb_sum := float(io.load({str(tmp_path / "f")!r})["a"].sum()))
        """
    )
    assert done.stdout == "10.0\n", done.stderr


def test_loading_bfloat16_without_ml_dtypes(tmp_path):
    nb.save(
        tmp_path / "f", {"x": plain("bfloat16", (3,)), "q": nb.quantize(weight(2, 8), "int4_sbf16")}
    )
    done = run(
        f"""
        import sys
        sys.modules["ml_dtypes"] = None
        import nibblas as nb
        print(nb.load({str(tmp_path / "f")!r}, ["q"])["q"].format)
        try:
            nb.load({str(tmp_path / "f")!r})
        except ImportError as e:
            print(e)
        """
    )
    assert done.stdout.splitlines() == [
        "int4_sbf16",
        "tensor 'x' is bfloat16, which NumPy lacks: pip install ml_dtypes",
    ], done.stderr


def test_many_threads_read_one_file(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    tensors = {str(i): weight(32, 64, i) for i in range(16)}
    nb.save(tmp_path / "f", tensors)
    file = io.TensorFile(tmp_path / "f")
    with ThreadPoolExecutor(16) as pool:
        for _ in range(20):
            for name, a in zip(tensors, pool.map(file.array, tensors), strict=True):
                assert same_array(a, tensors[name])


def test_opening_takes_time_in_proportion(tmp_path):
    """Ten times the tensors take about ten times as long, not a hundred times."""
    from nibblas import _core

    def opening(count):
        path = tmp_path / str(count)
        nb.save(path, {f"{i:05}": np.zeros(1, np.uint8) for i in range(count)})
        took = []
        for _ in range(7):
            start = time.perf_counter()
            _core.SafetensorsReader(str(path))
            took.append(time.perf_counter() - start)
        return min(took)

    assert opening(12_000) < 40 * opening(1_200)


def test_metadata_is_json_text(tmp_path):
    nb.save(tmp_path / "f", {'q"\\\n\x00': nb.quantize(weight(2, 8), "int8")})
    raw = (tmp_path / "f").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"]['q"\\\n\x00.shape'] == "[2, 8]"
