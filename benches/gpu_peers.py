"""What PyTorch's users have on a GPU, timed as `gpu.py` times its own rows.

A package that is not there, or that refuses a shape, is left out and says so once on stderr.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

BYTES = 320 << 20
_said: set[str] = set()


def _say(name: str, why: object) -> None:
    text = f"{name} is left out: {str(why).splitlines()[0] if str(why) else type(why).__name__}"
    if text not in _said:
        _said.add(text)
        print(text, file=sys.stderr, flush=True)


def graph_time(calls: list[Callable[[], Any]], least: float = 3000.0) -> float:
    """Median microseconds of one call, the calls taking turns inside a captured graph."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for c in calls:
            c()
    torch.cuda.synchronize()

    def graph(turns: int) -> Any:
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g, stream=stream):
            for _ in range(turns):
                for c in calls:
                    c()
        return g

    def once(g: Any) -> float:
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        g.replay()
        b.record()
        torch.cuda.synchronize()
        return float(a.elapsed_time(b)) * 1000

    g = graph(1)
    once(g)
    turns = int(min(max(1, least / max(once(g), 1.0)), max(1, 400 // len(calls))))
    g = graph(turns)
    once(g)
    return statistics.median([once(g) for _ in range(7)]) / (turns * len(calls))


def _copies(nbytes: float) -> range:
    return range(max(2, -(-BYTES // int(nbytes))))


def cublas(n: int, k: int, m: int) -> float:
    """Float16 through cuBLAS."""
    import torch

    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    y = torch.empty(m, n, device="cuda", dtype=torch.float16)
    ws = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in _copies(2 * n * k)]
    return graph_time([lambda w=w: torch.matmul(x, w.T, out=y) for w in ws])


def int_mm(n: int, k: int, m: int) -> float:
    """Time int8 through cuBLAS, without scales and without quantising."""
    import torch

    x = torch.randint(-127, 128, (max(m, 24), k), device="cuda", dtype=torch.int8)
    ws = [torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8) for _ in _copies(n * k)]
    return graph_time([lambda w=w: torch._int_mm(x, w.T) for w in ws])


def scaled_mm(n: int, k: int, m: int) -> float:
    """Time fp8 (e4m3) through cuBLAS, scales of the tensors, without quantising."""
    import torch

    def random(rows: int) -> Any:
        return torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn)

    one = torch.ones((), device="cuda")
    x, ws = random(max(m, 16)), [random(n) for _ in _copies(n * k)]

    def call(w: Any) -> Any:
        return torch._scaled_mm(
            x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return graph_time([lambda w=w: call(w) for w in ws])


def tinygemm(n: int, k: int, m: int) -> float:
    """int4 with groups of 128, bfloat16 activations."""
    import torch

    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    sz = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    packs = [torch._convert_weight_to_int4pack(codes, 8) for _ in _copies(n * k / 2)]
    return graph_time([lambda p=p: torch._weight_int4pack_mm(x, p, 128, sz) for p in packs])


def bitsandbytes_nf4(n: int, k: int, m: int) -> float:
    """nf4 with blocks of 64."""
    import bitsandbytes as bnb
    import torch

    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    w = torch.randn(n, k, device="cuda", dtype=torch.float16)
    packs = [
        bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4") for _ in _copies(n * k / 2)
    ]
    return graph_time([lambda p=p: bnb.matmul_4bit(x, p[0].t(), quant_state=p[1]) for p in packs])


def humming(n: int, k: int, m: int) -> float:
    """int4 with groups of 128, float16 activations."""
    import torch
    from humming.layer import HummingLayer

    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    y = torch.empty(m, n, device="cuda", dtype=torch.float16)
    w = torch.randn(n, k, device="cuda", dtype=torch.float16)
    layers = []
    for _ in _copies(n * k / 2):
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config={"dtype": "int4", "group_size": 128},
            torch_dtype=torch.float16,
        ).cuda()
        layer.load_from_unquantized(w)
        layer.transform()
        layers.append(layer)
    return graph_time([lambda f=f: f(x, outputs=y) for f in layers])


PEERS: dict[str, tuple[Callable[[int, int, int], float], tuple[int, ...]]] = {
    "torch _int_mm": (int_mm, (1, 16, 1024, 4096)),
    "torch _scaled_mm fp8": (scaled_mm, (1, 16, 64, 1024, 4096)),
    "torch tinygemm int4_g128": (tinygemm, (1, 16)),
    "bitsandbytes nf4_g64": (bitsandbytes_nf4, (1, 16)),
    "humming int4_g128": (humming, (1, 16, 64, 1024)),
}


def peers(n: int, k: int, m: int) -> dict[str, float]:
    """Return the microseconds of every peer that takes part at this number of rows."""
    import torch

    found: dict[str, float] = {}
    for name, (time, where) in PEERS.items():
        if m not in where or name in _said:
            continue
        try:
            found[name] = time(n, k, m)
        except ImportError as e:
            _said.add(name)  # not asked again
            _say(name, e)
        except Exception as e:
            _say(f"{name} at {n}x{k}, M={m}", e)
        torch.cuda.empty_cache()
    return found
