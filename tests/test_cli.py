"""The command line: results, JSON, exit codes, and what an interrupted command leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import nibblas as nb
from nibblas.cli import _measure, _out, main

ENV = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}


def weight(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


@pytest.fixture
def model(tmp_path):
    """A checkpoint with every kind of tensor that must be kept or quantised."""
    tensors = {
        "layer.0.weight": weight(48, 64),
        "layer.1.weight": weight(32, 100, 1).astype(np.float16),
        "layer.2.weight": weight(16, 64, 2).astype(ml_dtypes.bfloat16),
        "layer.3.weight": weight(8, 8, 3).astype(np.float64),
        "layer.0.bias": weight(1, 48)[0],
        "conv": weight(4, 6).reshape(2, 2, 3, 2),
        "ids": np.arange(12).reshape(3, 4),
        "empty": np.zeros((0, 5), np.float32),
        "codes8": np.ones((4, 4), np.int8),
    }
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, path, {"format": "pt", "x.shape": "foreign"})
    return path, tensors


def run(capsys, *args):
    code = main([str(a) for a in args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def result(capsys, *args):
    code, out, err = run(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


def command(*args, **kwargs):
    kwargs = {"capture_output": True, "text": True, "timeout": 120, "env": ENV} | kwargs
    return subprocess.run(
        [sys.executable, "-m", "nibblas.cli", *map(str, args)], check=False, **kwargs
    )


def test_quantize(capsys, model, tmp_path):
    path, tensors = model
    out = tmp_path / "out.safetensors"
    found = result(capsys, "quantize", path, "--format", "int4_g32", "--out", out)
    back = nb.load(out)
    assert set(back) == set(tensors)
    rows = {r["name"]: r for r in found["tensors"]}
    for name, value in tensors.items():
        if name.endswith("weight"):
            w = value.astype(np.float32)
            assert back[name] == nb.quantize(w, "int4_g32"), name
            ideal = np.linalg.norm(w - back[name].dequantize()) / np.linalg.norm(w)
            assert rows[name]["relative_error"] == pytest.approx(ideal, rel=1e-5)
            assert rows[name]["bytes_out"] == back[name].nbytes
            assert rows[name]["format"] == "int4_g32"
        else:
            assert back[name].dtype == value.dtype
            assert back[name].tobytes() == value.tobytes()
            assert rows[name]["format"] is None
        assert rows[name]["bytes_in"] == value.nbytes
    assert found["bytes_out"] == sum(r["bytes_out"] for r in found["tensors"])
    with safetensors.safe_open(out, "np") as f:
        metadata = f.metadata()
    assert metadata["format"] == "pt"
    assert metadata["layer.3.weight.shape"] == "[8, 8]"
    assert "x.shape" not in metadata


@pytest.mark.parametrize(
    ("fmt", "density", "pattern"),
    [
        ("int8_bitmap", 0.25, "unstructured"),
        ("int4_g32_bsr32", 0.5, "group32"),
        ("f32_block16x32", 0.5, "block16x32"),
        ("int8_2of4", None, "2:4"),
        ("mxfp4_2of4", 0.5, "2:4"),
    ],
)
def test_quantize_prunes_for_sparse_formats(capsys, model, tmp_path, fmt, density, pattern):
    path, tensors = model
    out = tmp_path / "o"
    args = ["quantize", path, "-f", fmt, *(["--density", density] if density else [])]
    planned = result(capsys, *args, "--dry-run")
    assert not out.exists()
    found = result(capsys, *args, "-o", out)
    assert found["density"] == density
    back = nb.load(out)
    for row in found["tensors"]:
        value = tensors[row["name"]]
        if row["format"] is None:
            assert back[row["name"]].tobytes() == value.tobytes()
            continue
        w = value.astype(np.float32)
        want = nb.quantize(nb.prune(w, pattern, density or 0.5), fmt)
        assert back[row["name"]] == want
        assert row["bytes_out"] == want.nbytes
        ideal = np.linalg.norm(w - want.dequantize()) / np.linalg.norm(w)
        assert row["relative_error"] == pytest.approx(ideal, rel=1e-5)
    assert planned["bytes_out"] == found["bytes_out"]


def test_quantize_keeps_the_zeros_that_a_matrix_has(capsys, tmp_path):
    w = nb.prune(weight(20, 64), "group16", 0.5)
    nb.save(tmp_path / "in", {"w": w})
    result(capsys, "quantize", tmp_path / "in", "-f", "int8_bsr16", "-o", tmp_path / "o")
    assert nb.load(tmp_path / "o")["w"] == nb.quantize(w, "int8_bsr16")


@pytest.mark.parametrize(
    ("fmt", "density", "match"),
    [
        ("int8", "0.5", "sparse formats"),
        ("int8_2of4", "0.25", "half"),
        ("int8_bitmap", "0", "above 0"),
        ("int8_bitmap", "1.5", "at most 1"),
        ("int8_bitmap", "nan", "at most 1"),
        ("int8_bitmap", "half", "at most 1"),
    ],
)
def test_quantize_refuses_a_density(capsys, model, tmp_path, fmt, density, match):
    args = ["quantize", model[0], "-f", fmt, "--density", density, "-o", tmp_path / "o"]
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert match in err
    assert not (tmp_path / "o").exists()


def test_quantize_again_keeps_what_is_quantised(capsys, model, tmp_path):
    path, tensors = model
    first, second = tmp_path / "a", tmp_path / "b"
    result(capsys, "quantize", path, "-f", "uint4_g32", "-o", first, "--include", "layer.0*")
    result(capsys, "quantize", first, "-f", "int8", "-o", second)
    back = nb.load(second)
    assert back["layer.0.weight"] == nb.quantize(tensors["layer.0.weight"], "uint4_g32")
    assert back["layer.1.weight"].format == "int8"


def test_include_and_exclude(capsys, model, tmp_path):
    path, _ = model
    out = tmp_path / "o"
    args = ["quantize", path, "-f", "int8", "-o", out]
    found = result(capsys, *args, "--include", "layer.[012].*", "--exclude", "*.1.*")
    done = {r["name"] for r in found["tensors"] if r["format"]}
    assert done == {"layer.0.weight", "layer.2.weight"}


def test_method_is_used(capsys, tmp_path):
    w = weight(16, 64)
    nb.save(tmp_path / "f", {"w": w})
    result(
        capsys,
        "quantize",
        tmp_path / "f",
        "-f",
        "int3_g32",
        "-o",
        tmp_path / "o",
        "--method",
        "mse",
    )
    assert nb.load(tmp_path / "o")["w"] == nb.quantize(w, "int3_g32", method="mse")


def test_dry_run_writes_nothing(capsys, model, tmp_path):
    path, _ = model
    before = sorted(os.listdir(tmp_path))
    planned = result(capsys, "quantize", path, "-f", "int4_g32", "--dry-run")
    assert sorted(os.listdir(tmp_path)) == before
    done = result(capsys, "quantize", path, "-f", "int4_g32", "-o", tmp_path / "o")
    assert [r["bytes_out"] for r in planned["tensors"]] == [r["bytes_out"] for r in done["tensors"]]
    assert planned["output"] is None


def test_output_may_be_the_input(capsys, model):
    path, tensors = model
    result(capsys, "quantize", path, "-f", "int8", "-o", path)
    assert nb.load(path)["layer.0.weight"] == nb.quantize(tensors["layer.0.weight"], "int8")


def test_text_and_progress(capsys, model, tmp_path):
    path, _ = model
    code, out, err = run(capsys, "quantize", path, "-f", "int4_g32", "-o", tmp_path / "o")
    assert code == 0
    assert re.search(r"layer\.0\.weight +48x64 +F32 +int4_g32 +12\.0 KiB +1\.7 KiB +0\.\d+", out)
    assert "4 of 9 tensors to int4_g32" in out
    assert "layer.0.weight 48x64" in err


@pytest.mark.parametrize(
    ("tensors", "args", "match"),
    [
        ({"w": np.full((2, 8), np.nan, np.float32)}, [], "'w'"),
        ({"w": np.zeros(3)}, [], "no 2-D floating tensor"),
        ({"w": weight(2, 8)}, ["--exclude", "*"], "no 2-D floating tensor"),
        ({"w": weight(2, 8), "w.zeros": np.zeros(3)}, [], "'w.zeros'"),
        ({"w": weight(2, 8), "w.codes": weight(2, 8)}, [], "'w.codes'"),
        ({"w": np.full((2, 8), 1e30, np.float32)}, ["-f", "int4_g8"], "'w'"),
        ({"w": np.full((2, 8), np.nan, np.float32)}, ["-f", "int8_2of4"], "'w'"),
        ({"w": np.full((2, 8), np.inf, np.float32)}, ["-f", "int8_bitmap"], "'w'"),
    ],
)
def test_quantize_failures(capsys, tmp_path, tensors, args, match):
    nb.save(tmp_path / "in", tensors)
    (tmp_path / "out").write_bytes(b"before")
    code, out, err = run(
        capsys, "quantize", tmp_path / "in", "-f", "int8", "-o", tmp_path / "out", *args
    )
    assert code == 1
    assert match in err.splitlines()[-1]
    assert "Traceback" not in out + err
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert (tmp_path / "out").read_bytes() == b"before"


def big(path, count, dtype=np.float32):
    rng = np.random.default_rng(0)
    block = (rng.standard_normal((1024, 1024)) / 8).astype(dtype)
    nb.save(path, {f"w{i:03}": block for i in range(count)})


def quantize_process(tmp_path, *args):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "nibblas.cli", "quantize", str(tmp_path / "in")),
            *("-f", "int4_g32", "-o", str(tmp_path / "out"), "--method", "mse", *args),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )


@pytest.mark.parametrize(
    ("number", "code", "left"),
    [
        (signal.SIGKILL, -signal.SIGKILL, ["in", "out"]),
        (signal.SIGTERM, 143, ["in", "out"]),
        (signal.SIGINT, 130, ["in", "out"]),
    ],
)
def test_interrupted_midway(tmp_path, number, code, left):
    big(tmp_path / "in", 40)
    (tmp_path / "out").write_bytes(b"before")
    with quantize_process(tmp_path) as process:
        for line in process.stderr:
            if "w003" in line:
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (tmp_path / "out").read_bytes() == b"before"
    assert "Traceback" not in err
    files = sorted(f for f in os.listdir(tmp_path) if number != signal.SIGKILL or "tmp" not in f)
    assert files == left


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_memory_is_that_of_one_tensor(tmp_path, dtype):
    """Peak memory stays below three times the largest tensor, whatever the size of the file."""
    side = 4096 if np.dtype(dtype).itemsize == 2 else 2048
    values = (np.random.default_rng(0).standard_normal((4, side)) / 8).astype(dtype)
    tensors = {f"w{i}": np.tile(values, (1024, 1)) for i in range(6)}
    largest = tensors["w0"].nbytes
    nb.save(tmp_path / "in", tensors | {"kept": np.zeros(largest, np.uint8)})
    del tensors
    code = f"""
        import numpy as np
        import nibblas as nb
        from nibblas.cli import main
        def peak():
            with open("/proc/self/status") as f:
                return next(int(l.split()[1]) for l in f if l.startswith("VmHWM")) << 10
        nb.save({str(tmp_path / "s")!r}, {{"w": np.ones((64, 64), np.float32)}})
        args = ["--format", "int4_g128", "--json", "--out", {str(tmp_path / "o")!r}]
        assert main(["quantize", {str(tmp_path / "s")!r}, *args]) == 0
        before = peak()
        assert main(["quantize", {str(tmp_path / "in")!r}, *args]) == 0
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=ENV,
    )
    assert int(done.stdout.split()[-1]) < 3 * largest


def test_inspect(capsys, model, tmp_path):
    path, tensors = model
    out = tmp_path / "o"
    result(capsys, "quantize", path, "-f", "uint4_g32", "-o", out)
    found = result(capsys, "inspect", out, "--check")
    rows = {r["name"]: r for r in found["tensors"]}
    assert set(rows) == set(tensors)
    q = nb.load(out)["layer.0.weight"]
    assert rows["layer.0.weight"]["bits_per_weight"] == pytest.approx(q.bits_per_weight)
    assert rows["layer.0.weight"]["format"] == "uint4_g32"
    assert rows["ids"]["dtype"] == "I64"
    assert rows["ids"]["bits_per_weight"] == 64
    assert rows["empty"]["bits_per_weight"] is None
    assert found["bytes"] == sum(r["bytes"] for r in found["tensors"])
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0
    assert "9 tensors, 4 of them quantised" in text


def test_names_cannot_drive_the_terminal(capsys, tmp_path):
    nb.save(tmp_path / "f", {"a\x1b[31m\nb": np.zeros((2, 2), np.float32)})
    _, out, _ = run(capsys, "inspect", tmp_path / "f")
    assert "\x1b" not in out
    assert r"a\x1b[31m\nb" in out


def test_inspect_refuses_bad_files(capsys, tmp_path):
    (tmp_path / "f").write_bytes(b"\xff" * 100)
    code, out, err = run(capsys, "inspect", tmp_path / "f")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    code, _, err = run(capsys, "inspect", tmp_path / "none")
    assert code == 1
    assert err == f"nibblas inspect: {tmp_path / 'none'}: No such file or directory\n"
    assert run(capsys, "inspect", tmp_path)[0] == 1


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["unknown"],
        ["quantize"],
        ["quantize", "in", "-f", "int9", "-o", "out"],
        ["quantize", "in", "-f", "int4_g0", "-o", "out"],
        ["quantize", "in", "-f", "int4_gx", "-o", "out"],
        ["quantize", "in", "-f", "int4"],
        ["quantize", "in", "-f", "int4", "-o", "out", "--threads", "0"],
        ["quantize", "in", "-f", "int4", "-o", "out", "--method", "guess"],
        ["bench", "--shapes", "4096"],
        ["bench", "--shapes", "0x4"],
        ["bench", "--m", "1,,2"],
        ["demo", "--shape", "axb"],
        ["inspect"],
        ["explain", "--m", "-1"],
        ["verify", "--threads", "none"],
    ],
)
def test_wrong_usage(capsys, args):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_help_and_version(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in ("info", "quantize", "inspect", "explain", "bench", "verify", "demo"):
        assert re.search(rf"^    {name} ", out, re.MULTILINE)
        assert run(capsys, name, "--help")[0] == 0
    assert run(capsys, "--version")[1] == f"nibblas {nb.__version__}\n"


def test_info(capsys):
    assert result(capsys, "info") == json.loads(json.dumps(nb.info()))
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert nb.info()["isa"]["active"] in out


def test_a_reader_that_goes_away(tmp_path):
    nb.save(tmp_path / "f", {f"{i:05}": np.zeros(1, np.uint8) for i in range(20_000)})
    with subprocess.Popen(
        [sys.executable, "-m", "nibblas.cli", "inspect", str(tmp_path / "f")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENV,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert err == b""


def test_rich_and_colours(tmp_path):
    pytest.importorskip("rich")
    nb.save(tmp_path / "f", {"w": weight(8, 8)})
    plain = command("inspect", tmp_path / "f")
    rich = command("inspect", tmp_path / "f", env=ENV | {"FORCE_COLOR": "1"})
    none = command("inspect", tmp_path / "f", env=ENV | {"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert "\x1b" not in plain.stdout
    assert "\x1b[" in rich.stdout
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38)[0-9;]*m", none.stdout)
    for done in (plain, rich, none):
        assert done.returncode == 0
        assert "8x8" in done.stdout
    bars = command(
        *("quantize", tmp_path / "f", "-f", "int8", "-o", tmp_path / "o"),
        env=ENV | {"FORCE_COLOR": "1"},
    )
    assert bars.returncode == 0, bars.stderr
    assert "wrote" in bars.stdout


def test_a_narrow_terminal_encoding(tmp_path):
    nb.save(tmp_path / "f", {"größe": weight(8, 8)})
    done = command("inspect", tmp_path / "f", env=ENV | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert r"gr\xf6\xdfe" in done.stdout


def test_numbers():
    assert _out.number(None) == "-"
    assert _out.number(float("nan")) == "-"
    assert _out.number(0.0) == "0"
    assert _out.number(0.012345) == "0.0123"
    assert _out.number(123456.0) == "123456"
    assert _out.number(9.999) == "10.00"
    assert _out.number(0.00886) == "0.00886"
    assert _out.number(1e-9) == "1.00e-09"
    assert _out.number(1e12) == "1.00e+12"
    assert _out.size(0) == "0 B"
    assert _out.size(1536) == "1.5 KiB"


def test_the_demo_matrix_has_what_it_says():
    w = _measure.transformer_weight(256, 1024)
    assert w.dtype == np.float32
    np.testing.assert_array_equal(w, _measure.transformer_weight(256, 1024))
    channels = _measure.outlier_channels(1024)
    assert len(channels) == 4
    rms = np.sqrt((w**2).mean(0))
    others = np.delete(rms, channels)
    assert rms[channels].min() > 4 * others.max()
    rest = np.delete(w, channels, 1) / np.sqrt((np.delete(w, channels, 1) ** 2).mean(1))[:, None]
    assert 3.5 < (rest**4).mean() < 6  # a normal distribution has 3


def test_medians_take_turns():
    calls = []
    took = _measure.medians(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.01, samples=3
    )
    assert set(took) == {"a", "b"}
    assert all(t > 0 for t in took.values())
    assert set(calls) == {"a", "b"}


def test_demo(capsys):
    args = ["demo", "--shape", "16x256"]
    found = result(capsys, *args)
    names = [e.name if e.group else f"{e.name}_g128" for e in nb.formats.table()]
    assert [r["format"] for r in found["results"]] == names
    w = _measure.transformer_weight(16, 256)
    for r in found["results"]:
        q = nb.quantize(w, r["format"])
        assert r["bits_per_weight"] == q.bits_per_weight
        ideal = np.linalg.norm(w - q.dequantize()) / np.linalg.norm(w)
        assert r["relative_error"] == pytest.approx(ideal, rel=1e-5)
        measured = {(s["compute"], s["m"]): s for s in r["speed"]}
        assert set(measured) <= {(c, m) for c in ("f32", "int8") for m in (1, 16, 256)}
        for s in measured.values():
            assert s["ratio"] == pytest.approx(s["numpy_seconds"] / s["seconds"])
    assert any(len(r["speed"]) == 6 for r in found["results"])
    code, out, _ = run(capsys, *args, "--formats", "int4_g32,ternary")
    assert code == 0
    assert re.search(r"^int4_g32 +4\.500 +0\.\d+ +\S+x ", out, re.MULTILINE)


def test_bench(capsys):
    found = result(
        capsys,
        *("bench", "--shapes", "32x64,64x32", "--formats", "int4_g32,uint2", "--m", "1,3"),
        *("--compute", "f32,int8", "--threads", "1,2", "--seconds", "1"),
    )["results"]
    assert len(found) == 32
    assert (
        len({(tuple(r["shape"]), r["format"], r["compute"], r["threads"], r["m"]) for r in found})
        == 32
    )
    for r in found:
        assert r["ratio"] == pytest.approx(r["numpy_seconds"] / r["nibblas_seconds"])
        ops = 2 * r["m"] * r["shape"][0] * r["shape"][1]
        assert r["gops"] == pytest.approx(ops / r["nibblas_seconds"] / 1e9)
        assert r["numpy_threads"] in (None, r["threads"])
    code, out, err = run(capsys, "bench", "--shapes", "32x64", "--formats", "int4", "--m", "2")
    assert code == 0
    assert re.search(r"^int4 +f32 +32x64 ", out, re.MULTILINE)
    code, _, err = run(capsys, "bench", "--shapes", "32x64", "--compute", "nonsense")
    assert code == 1
    assert "nonsense" in err.splitlines()[-1]


def test_plots(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    png = b"\x89PNG\r\n"
    file = tmp_path / "demo.png"
    args = ["--formats", "int4_g32,int8,ternary", "--plot", file]
    assert result(capsys, "demo", "--shape", "32x64", *args)["plot"] == str(file)
    assert file.read_bytes().startswith(png)
    file = tmp_path / "bench.png"
    args = ["--shapes", "32x64", "--m", "1,2", "--plot", file]
    assert result(capsys, "bench", *args)["plot"] == str(file)
    assert file.read_bytes().startswith(png)


def test_numpy_alone(tmp_path):
    """The whole command line, with everything optional missing."""
    nb.save(tmp_path / "f", {"w": weight(16, 64)})
    f, o = str(tmp_path / "f"), str(tmp_path / "o")
    commands = [
        ["info"],
        ["quantize", f, "-f", "int4_g32", "-o", o],
        ["inspect", o],
        ["explain", "--shape", "64x64"],
        ["bench", "--shapes", "32x64", "--m", "1", "--formats", "int4"],
        ["demo", "--shape", "32x64", "--formats", "int4"],
    ]
    code = f"""
        import sys
        for name in ("rich", "matplotlib", "ml_dtypes", "threadpoolctl"):
            sys.modules[name] = None
        from nibblas.cli import main
        for command in {commands!r}:
            assert main(command) == 0, command
            assert main([*command, "--json"]) == 0, command
        sys.exit(main(["demo", "--plot", {str(tmp_path / "x.png")!r}]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=ENV,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "nibblas demo: --plot needs matplotlib: pip install matplotlib"
    )
    assert sorted(os.listdir(tmp_path)) == ["f", "o"]


def test_explain(capsys):
    args = ["explain", "--shape", "256x512", "-f", "int4_g128", "-m", "1,64", "--compute", "int8"]
    found = result(capsys, *args)
    assert [p["m"] for p in found["plans"]] == [1, 64]
    q = nb.quantize(np.zeros((256, 512), np.float32), "int4_g128")
    plan = nb.explain(np.zeros((64, 512), np.float32), q.T, compute="int8")
    assert found["plans"][1]["kernel"] == plan.fields()["kernel"]
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert plan.fields()["kernel"] in out
    code, _, err = run(capsys, "explain", "--compute", "nonsense")
    assert code == 1
    assert "nonsense" in err


def test_verify(capsys):
    report = result(capsys, "verify")
    code, out, _ = run(capsys, "verify")
    assert code == 0
    assert re.search(r"^scalar +ok +ok ", out, re.MULTILINE)
    assert "wrong" not in out
    assert report["ok"]
    assert report["cases"] > 100
    assert len(set(report["levels"].values())) == 1
    assert "scalar" in report["levels"]


def test_verify_fails_when_a_result_is_wrong(capsys, monkeypatch):
    wrong = nb.testing.Report(
        levels={"scalar": "aa", "avx2": "bb"}, cases=7, failures=["avx2 int4-int8-deep: 1"]
    )
    monkeypatch.setattr("nibblas.cli._verify.self_test", lambda threads: wrong)
    code, out, _ = run(capsys, "verify")
    assert code == 1
    assert "FAILED: 7 products" in out
    assert re.search(r"^avx2 +ok .* 1 wrong .* bb", out, re.MULTILINE)
