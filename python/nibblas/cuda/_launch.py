"""Loading and launching: a struct by value, one driver call."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from typing import Any

from ._compile import cubin

__all__ = ["Kernel", "arch", "device_properties", "has_wgmma", "kernel", "tensor_map", "workspace"]

_lock = threading.RLock()
_workspaces: dict[tuple[int, int, str], Any] = {}


@functools.cache
def _capability(device: int) -> int:
    import cupy

    text = cupy.cuda.Device(device).compute_capability
    number = int(text)
    if number < 80:
        raise RuntimeError(
            f"cuda:{device} has compute capability {text[:-1]}.{text[-1]}; nibblas needs 8.0 or "
            f"newer"
        )
    return number


def arch(device: int) -> str:
    """Return the architecture that kernels are compiled for on a device."""
    number = _capability(device)
    return "sm_90a" if number == 90 else f"sm_{number}"


@functools.cache
def has_wgmma(device: int) -> bool:
    """Whether the loop nests of sm_90a are used; ``NIBBLAS_CUDA_ARCH=sm80`` leaves them out."""
    asked = os.environ.get("NIBBLAS_CUDA_ARCH", "")
    if asked not in ("", "sm80", "sm89", "sm90a"):
        raise RuntimeError(f"NIBBLAS_CUDA_ARCH={asked!r}: expected sm80, sm89 or sm90a")
    return _capability(device) == 90 and asked in ("", "sm90a")


@functools.cache
def device_properties(device: int) -> tuple[int, int]:
    """Return the multiprocessors of a device and the shared memory of one, in bytes."""
    import cupy

    a = cupy.cuda.Device(device).attributes
    return int(a["MultiProcessorCount"]), int(a["MaxSharedMemoryPerBlockOptin"])


class _Attribute(ctypes.Structure):
    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    ]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_EARLY = _Attribute(6, 0, 1)


@functools.lru_cache(4096)
def _config(grid: tuple[int, int], threads: int, shared: int, stream: int) -> _Config:
    return _Config((*grid, 1), (threads, 1, 1), shared, stream, ctypes.addressof(_EARLY), 1)


@functools.cache
def _early_launch(device: int) -> Any:
    """Return the driver's call that lets kernels overlap; None where there is none.

    Graphs keep what it says from CUDA 12.3 on.
    """
    import cupy

    if _capability(device) < 90 or cupy.cuda.runtime.driverGetVersion() < 12030:
        return None
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.restype = ctypes.c_int
    launch.argtypes = [ctypes.c_void_p] * 4
    return launch


class Kernel:
    """A function on one device."""

    __slots__ = ("early_launch", "function", "module")

    def __init__(self, module: int, function: int, early_launch: Any = None) -> None:
        self.module = module
        self.function = function
        self.early_launch = early_launch

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        stream: int,
        args: ctypes.Structure,
        *maps: Any,
        early: bool = False,
    ) -> None:
        """Launch on a stream; the parameters are a struct and perhaps tensor maps.

        An `early` kernel may begin before those before it have ended, where the device can; what it
        may do until then is said in ``base.cuh``.
        """
        from cupy_backends.cuda.api import driver

        pointers = (ctypes.c_void_p * 4)(
            ctypes.addressof(args), *(ctypes.addressof(m) for m in maps)
        )
        if early and self.early_launch is not None:
            config = _config(grid, threads, shared, stream)
            at = ctypes.addressof(config)
            driver.check_status(self.early_launch(at, self.function, pointers, None))
            return
        driver.launchKernel(
            self.function,
            grid[0],
            grid[1],
            1,
            threads,
            1,
            1,
            shared,
            stream,
            ctypes.addressof(pointers),
            0,
        )


@functools.cache
def _encoder() -> Any:
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    encode.restype = ctypes.c_int
    return encode


@functools.lru_cache(256)
def tensor_map(
    pointer: int, rows: int, row_bytes: int, stride: int, box_rows: int, item: int
) -> ctypes.Array[ctypes.c_uint64]:
    """Describe a matrix to the copy engine.

    Boxes are `box_rows` by 128 bytes, in the order that wgmma reads; `item` is the size of an
    element: 1, 2 or 4.
    """
    room = (ctypes.c_uint64 * 32)()
    # The driver wants 64-byte alignment.
    offset = -ctypes.addressof(room) % 64
    held = (ctypes.c_uint64 * 16).from_buffer(room, offset)
    status = _encoder()(
        ctypes.byref(held),
        ctypes.c_int({1: 0, 2: 1, 4: 2}[item]),
        ctypes.c_uint32(2),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 2)(row_bytes // item, rows),
        (ctypes.c_uint64 * 1)(stride),
        (ctypes.c_uint32 * 2)(128 // item, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),  # not interleaved
        ctypes.c_int(3),  # 128-byte exchange
        ctypes.c_int(2),  # 128 bytes at a time into L2
        ctypes.c_int(0),  # zeros outside
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed with code {status}")
    return held


@functools.cache
def _module(device: int, source: str, target: str, defines: tuple[tuple[str, int], ...]) -> int:
    from cupy_backends.cuda.api import driver

    return int(driver.moduleLoadData(cubin(source, target, defines)))


@functools.cache
def _kernel(device: int, source: str, name: str, defines: tuple[tuple[str, int], ...]) -> Kernel:
    from cupy_backends.cuda.api import driver

    module = _module(device, source, arch(device), defines)
    function = int(driver.moduleGetFunction(module, name))
    static = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
    driver.funcSetAttribute(
        function,
        driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        device_properties(device)[1] - static,
    )
    return Kernel(module, function, _early_launch(device))


def kernel(
    device: int, source: str, name: str, defines: tuple[tuple[str, int], ...] = ()
) -> Kernel:
    """Return a function of a loop nest on the current device, compiled on first use."""
    with _lock:
        return _kernel(device, source, name, defines)


def workspace(device: int, stream: int, use: str, nbytes: int) -> int:
    """Return zeroed memory that a stream keeps to itself.

    It is kept for as long as the process runs: captured graphs hold its address.
    """
    import cupy

    with _lock:
        key = (device, stream, use)
        held = _workspaces.setdefault(key, [])
        if not held or held[-1].nbytes < nbytes:
            size = max(nbytes, 1 << 20, 2 * held[-1].nbytes if held else 0)
            # Older blocks stay: a captured graph may use them.
            memory = cupy.cuda.alloc(size)
            array = cupy.ndarray((size,), cupy.uint8, memory)
            array.fill(0)
            held.append(array)
        return int(held[-1].data.ptr)
