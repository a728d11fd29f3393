"""Saving and loading matrices: safetensors files, written all or nothing, read with suspicion.

A quantised matrix ``NAME`` is stored as the tensors ``NAME.codes`` (uint8, one packed row per row),
``NAME.scales`` and whatever else its format lists (see ``Format.parts``), such as ``NAME.zeros``
and ``NAME.tensor_scale``, and ``NAME.bounds`` on request; the metadata entries ``NAME.format`` and
``NAME.shape`` say what they mean. Arrays are ordinary tensors, so other readers of safetensors see
a legal file.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _core
from .formats import Format, Part
from .qtensor import QTensor, _rebuild

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping
    from types import TracebackType

    from numpy.typing import NDArray

__all__ = ["load", "save"]

VERSION = "1"
_VERSION_KEY = "nibblas.version"
# Between two pieces of a long read or write, signals are honoured.
_PIECE = 16 << 20

_NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_STORED = {name: code for code, name in (_NUMPY | _ML_DTYPES).items()}
_SHAPE = re.compile(r"\[([0-9]{1,19}), ?([0-9]{1,19})\]")

Spec = tuple[str, str, tuple[int, ...]]
"""Name, element type and shape of a stored tensor."""


class Entry(NamedTuple):
    """One matrix or array of a file."""

    name: str
    """Its name."""
    format: Format | None
    """The coding; None for an ordinary array."""
    dtype: str
    """Element type in the file; of the scales, for a quantised matrix."""
    shape: tuple[int, ...]
    """Logical shape."""
    nbytes: int
    """Bytes of all its stored tensors."""
    parts: tuple[str, ...]
    """Names of its stored tensors."""
    transposed: bool = False
    """Whether the matrix is read as its transpose."""


class TensorFile:
    """An open safetensors file whose header is checked and whose data is read on demand.

    Parameters
    ----------
    path : path-like
        The file.

    Raises
    ------
    OSError
        If the system cannot read it.
    ValueError
        If it is not a well-formed file.
    """

    def __init__(self, path: str | bytes | os.PathLike[Any]) -> None:
        self.path = os.fsdecode(path)
        self._reader = _core.SafetensorsReader(self.path)
        self.metadata: dict[str, str] = dict(self._reader.metadata())
        self._stored: dict[str, tuple[str, tuple[int, ...], int]] = {
            name: (dtype, shape, nbytes) for name, dtype, shape, nbytes in self._reader.tensors()
        }
        self.entries: dict[str, Entry] = {e.name: e for e in self._read_entries()}

    def _fault(self, text: str) -> ValueError:
        return ValueError(f"{self.path}: {text}")

    def _read_entries(self) -> Iterator[Entry]:
        version = self.metadata.get(_VERSION_KEY)
        coded: dict[str, Entry] = {}
        if version is not None:
            if version != VERSION:
                raise self._fault(
                    f"file format version {_show(version)}, this nibblas reads {VERSION!r}"
                )
            for key, text in self.metadata.items():
                if key.endswith(".format"):
                    entry = self._coded_entry(key[: -len(".format")], text)
                    coded[entry.parts[0]] = entry
        taken = {part for entry in coded.values() for part in entry.parts}
        for name, (dtype, shape, nbytes) in self._stored.items():
            if name in coded:
                if coded[name].name in self._stored:
                    raise self._fault(f"{_show(coded[name].name)} is both an array and a matrix")
                yield coded[name]
            elif name not in taken:
                yield Entry(name, None, dtype, shape, nbytes, (name,))

    def _coded_entry(self, name: str, text: str) -> Entry:
        try:
            fmt = Format(text)
        except ValueError as e:
            raise self._fault(f"matrix {_show(name)}: {e}") from None
        match = _SHAPE.fullmatch(self.metadata.get(f"{name}.shape", ""))
        if match is None:
            raise self._fault(f"matrix {_show(name)}: the metadata must hold its shape as '[N, K]'")
        rows, cols = int(match[1]), int(match[2])
        try:
            wanted = {p.name: p for p in fmt.parts(rows, cols)}
        except ValueError as e:
            raise self._fault(f"matrix {_show(name)}: {e}") from None
        for other in _PARTS:
            if other not in wanted and f"{name}.{other}" in self._stored:
                raise self._fault(f"matrix {_show(name)}: {fmt} has no {other}")
        if f"{name}.bounds" in self._stored:
            wanted["bounds"] = _bounds(fmt, rows, cols)
        nbytes = 0
        for part in wanted.values():
            stored = f"{name}.{part.name}"
            found = self._stored.get(stored)
            if found is None:
                raise self._fault(f"matrix {_show(name)}: the tensor {_show(stored)} is missing")
            dtypes = [t.upper() for t in part.types]
            if found[0] not in dtypes or not part.fits(found[1]):
                raise self._fault(
                    f"tensor {_show(stored)} of a {fmt} matrix of shape {(rows, cols)} must be "
                    f"{' or '.join(dtypes)} of shape {part.shape}, "
                    f"found {found[0]} of shape {found[1]}"
                )
            nbytes += found[2]
        transposed = self.metadata.get(f"{name}.transposed", "0")
        if transposed not in ("0", "1"):
            raise self._fault(f"matrix {_show(name)}: transposed must be '0' or '1'")
        names = tuple(f"{name}.{p}" for p in wanted)
        flipped = transposed == "1"
        logical = (cols, rows) if flipped else (rows, cols)
        return Entry(name, fmt, self._stored[names[1]][0], logical, nbytes, names, flipped)

    def dtype(self, stored: str) -> str:
        """Return the element type of a stored tensor."""
        return self._stored[stored][0]

    def shape(self, stored: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor."""
        return self._stored[stored][1]

    def pieces(self, stored: str, piece: int = _PIECE) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of a stored tensor in pieces; each is overwritten by the next."""
        nbytes = self._stored[stored][2]
        buffer = np.empty(min(piece, nbytes), np.uint8)
        for start in range(0, nbytes, piece):
            part = buffer[: min(piece, nbytes - start)]
            self._reader.read_into(stored, start, part)
            yield part

    def array(self, stored: str) -> NDArray[Any]:
        """Return a stored tensor as an array."""
        code, shape, nbytes = self._stored[stored]
        dtype = _dtype(code, stored)
        if any(n > sys.maxsize for n in shape):
            raise self._fault(f"tensor {_show(stored)} is too large: shape {shape}")
        try:
            out = np.empty(shape, dtype)
        except ValueError:  # an empty array with lengths beyond NumPy's own limit
            raise self._fault(f"tensor {_show(stored)} is too large: shape {shape}") from None
        self._read_flat(stored, out, nbytes)
        if code == "BOOL" and out.size and int(out.view(np.uint8).max()) > 1:
            raise self._fault(f"tensor {_show(stored)} is BOOL but holds bytes other than 0 and 1")
        return out

    def _read_flat(self, stored: str, out: NDArray[Any], nbytes: int) -> None:
        flat = _bytes(out)
        for start in range(0, nbytes, _PIECE):
            self._reader.read_into(stored, start, flat[start : start + _PIECE])

    def floats(self, stored: str) -> NDArray[Any]:
        """Return a floating tensor in a type that NumPy has: bfloat16 becomes float32."""
        code, shape, _ = self._stored[stored]
        if code != "BF16":
            return self.array(stored)
        out = np.empty(shape, np.float32)
        words = out.reshape(-1).view(np.uint32)
        at = 0
        for piece in self.pieces(stored, 1 << 20):
            half = piece.view("<u2")
            part = words[at : at + half.size]
            part[:] = half
            part <<= 16
            at += half.size
        return out

    def qtensor(self, entry: Entry) -> QTensor:
        """Return a quantised matrix, checked down to the range of its codes."""
        arrays: dict[str, NDArray[Any]] = {}
        for stored in entry.parts:
            code, shape, nbytes = self._stored[stored]
            # bfloat16 scales are kept as their bits, which needs no ml_dtypes.
            dtype = np.dtype(np.uint16) if code == "BF16" else _dtype(code, stored)
            out = np.empty(shape, dtype)
            self._read_flat(stored, out, nbytes)
            arrays[stored[len(entry.name) + 1 :]] = out
        bounds = arrays.pop("bounds", None)
        if bounds is not None and not (np.isfinite(bounds) & (bounds >= 0)).all():
            raise self._fault(
                f"tensor {_show(entry.name + '.bounds')} holds negative or non-finite bounds"
            )
        rows, cols = entry.shape[::-1] if entry.transposed else entry.shape
        fmt = str(entry.format)
        try:
            return _rebuild(fmt, rows, cols, arrays, bounds, entry.transposed)
        except ValueError as e:
            raise self._fault(f"matrix {_show(entry.name)}: {e}") from None

    def read(self, name: str) -> QTensor | NDArray[Any]:
        """Return a matrix or an array by its name."""
        entry = self.entries[name]
        return self.array(name) if entry.format is None else self.qtensor(entry)


class TensorWriter:
    """A safetensors file in the making; leaving the ``with`` block normally gives it its name.

    Parameters
    ----------
    path : path-like
        The target: replaced whole, or not touched.
    specs : iterable of (name, type, shape)
        Every tensor that will be written.
    metadata : mapping of str to str
        Entries of the header.
    """

    def __init__(
        self,
        path: str | bytes | os.PathLike[Any],
        specs: Iterable[Spec],
        metadata: Mapping[str, str],
    ) -> None:
        self._writer = _core.SafetensorsWriter(
            os.fsdecode(path), list(specs), list(metadata.items())
        )

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._writer.finish()
        else:
            self._writer.abort()

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Append the bytes of a little-endian array to a tensor."""
        flat = _bytes(array)
        for start in range(0, len(flat), _PIECE):
            self._writer.append(name, flat[start : start + _PIECE])

    def write_qtensor(self, name: str, q: QTensor) -> None:
        """Write the parts of a quantised matrix that were announced by :func:`matrix_specs`."""
        for part, array in q._storage.arrays().items():
            self.write(f"{name}.{part}", array)


_PARTS = _core.part_names()
"""Names that the parts of a matrix may have."""


def _bounds(fmt: Format, rows: int, cols: int) -> Part:
    return Part("bounds", ("f32",), (rows, fmt.groups(cols)), "groups")


def matrix_specs(
    name: str,
    fmt: Format,
    rows: int,
    cols: int,
    *,
    float_zeros: bool = False,
    kept: int | None = None,
) -> list[Spec]:
    """Return the stored tensors of a matrix, which may still have to be quantised.

    Of sparse matrices the bytes of the kept codes must be known.
    """
    if fmt.structure is not None and kept is None:
        raise ValueError(f"how much {fmt} stores is not known before: quantise, then save")
    return [
        (
            f"{name}.{p.name}",
            p.types[-1 if float_zeros and p.name == "zeros" else 0].upper(),
            p.shape if p.along != "kept" or kept is None else (kept,),
        )
        for p in fmt.parts(rows, cols)
    ]


def matrix_metadata(
    name: str, fmt: Format, rows: int, cols: int, *, transposed: bool = False
) -> dict[str, str]:
    """Return the metadata entries of a matrix."""
    entries = {f"{name}.format": str(fmt), f"{name}.shape": f"[{rows}, {cols}]"}
    return entries | ({f"{name}.transposed": "1"} if transposed else {})


def check_collision(name: str, logical: Container[str], stored: Container[str]) -> None:
    """Refuse a matrix if its name, or one that its parts could have, is taken.

    Parameters
    ----------
    name : str
        Of the matrix.
    logical : container of str
        Names of all matrices and arrays.
    stored : container of str
        Names of all stored tensors.
    """
    for part in (*_PARTS, "bounds"):
        if f"{name}.{part}" in logical:
            other = f"{name}.{part}"
            raise ValueError(
                f"the name {_show(other)} is taken by a part of the matrix {_show(name)}"
            )
    if name in stored:
        raise ValueError(f"the name {_show(name)} is taken by a part of another matrix")


def _show(name: str) -> str:
    """Quote a name from a file, printable and of bounded length."""
    return repr(name if len(name) <= 80 else name[:80] + "...")


def _dtype(code: str, stored: str) -> np.dtype[Any]:
    if code in _NUMPY:
        return np.dtype(_NUMPY[code])
    if code in _ML_DTYPES:
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(
                f"tensor {_show(stored)} is {_ML_DTYPES[code]}, which NumPy lacks: "
                "pip install ml_dtypes"
            ) from None
        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML_DTYPES[code]))
        return found
    raise ValueError(f"tensor {_show(stored)} is {code}, which has no NumPy type")


def _bytes(a: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the memory of a C-contiguous array."""
    if sys.byteorder == "big" and a.dtype.itemsize > 1:
        raise NotImplementedError("files are little-endian; this machine is not")
    return a.reshape(-1).view(np.uint8)


def _array(name: str, value: Any) -> tuple[str, NDArray[Any]]:
    """Return the stored type and the native, contiguous form of what is to be saved."""
    if not isinstance(value, (np.ndarray, np.generic)) and not hasattr(value, "__array__"):
        raise TypeError(
            f"{_show(name)}: expected a QTensor or an array, got {type(value).__name__}"
        )
    a = np.asarray(value)
    code = _STORED.get(a.dtype.name) if a.dtype.names is None else None
    if code is None:
        raise TypeError(f"{_show(name)}: arrays of {a.dtype} cannot be saved")
    if not a.dtype.isnative:
        a = a.astype(a.dtype.newbyteorder("="))
    # A plain ascontiguousarray would turn a scalar array into one of one dimension.
    return code, a if a.flags.c_contiguous else np.ascontiguousarray(a)


def save(
    path: str | bytes | os.PathLike[Any],
    tensors: Mapping[str, QTensor | NDArray[Any]],
    *,
    bounds: bool = False,
) -> None:
    """Save matrices and arrays to a safetensors file, all or nothing.

    The file is written beside ``path`` and renamed over it when it is complete and flushed to the
    disk: ``path`` holds the old or the new file at any moment, whatever happens.

    Parameters
    ----------
    path : path-like
        The file.
    tensors : mapping of str to QTensor or ndarray
        What to save, by name.
    bounds : bool, default False
        Whether to save :attr:`QTensor.error_bound` too.

    Raises
    ------
    ValueError
        If two names collide, one is too long, or there are too many.
    TypeError
        If a value is not a QTensor nor an array of numbers.
    OSError
        If the system cannot write.
    """
    if not hasattr(tensors, "items"):
        raise TypeError(f"tensors must be a mapping of names, got {type(tensors).__name__}")
    specs: list[Spec] = []
    metadata: dict[str, str] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"names must be strings, got {type(name).__name__}")
        if isinstance(value, QTensor):
            s = value._storage
            flipped = value._transposed
            float_zeros = s.zeros is not None and s.zeros.dtype.kind == "f"
            kept = s.codes.size if s.format.structure is not None else None
            new = matrix_specs(name, s.format, s.rows, s.cols, float_zeros=float_zeros, kept=kept)
            metadata |= matrix_metadata(name, s.format, s.rows, s.cols, transposed=flipped)
            present = list(s.arrays().values())
            if bounds and s.bounds is not None:
                new.append((f"{name}.bounds", "F32", s.bounds.shape))
                present.append(s.bounds)
        else:
            code, a = _array(name, value)
            new, present = [(name, code, a.shape)], [a]
        for spec, a in zip(new, present, strict=True):
            if spec[0] in arrays:
                raise ValueError(f"the stored name {_show(spec[0])} is needed twice")
            arrays[spec[0]] = a
        specs += new
    for name, value in tensors.items():
        if isinstance(value, QTensor):
            check_collision(name, tensors, arrays)
    with TensorWriter(path, specs, {_VERSION_KEY: VERSION} | metadata) as writer:
        for name, a in arrays.items():
            writer.write(name, a)


def load(
    path: str | bytes | os.PathLike[Any], names: Iterable[str] | None = None
) -> dict[str, QTensor | NDArray[Any]]:
    """Load matrices and arrays from a safetensors file.

    Any safetensors file will do; from those that :func:`save` or ``nibblas quantize`` wrote,
    matrices come back as :class:`QTensor`. Nothing in the file is believed unchecked.

    Parameters
    ----------
    path : path-like
        The file.
    names : iterable of str, optional
        What to load; everything by default.

    Returns
    -------
    dict of str to QTensor or ndarray

    Raises
    ------
    FileNotFoundError, OSError
        If the system cannot read it.
    ValueError
        If the file is not well formed, or holds codes, scales or zero points that are not legal.
    KeyError
        If a name is not in the file.
    ImportError
        If an array has a type that needs ml_dtypes, which is missing.
    """
    file = TensorFile(path)
    if names is None:
        chosen: Iterable[str] = file.entries
    else:
        chosen = [names] if isinstance(names, str) else list(names)
        for name in chosen:
            if name not in file.entries:
                raise KeyError(name)
    return {name: file.read(name) for name in chosen}
