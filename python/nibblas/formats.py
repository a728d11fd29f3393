"""Formats: how a weight is coded.

The table lives in the Rust core; this module gives it a Python face. A format is named by a string
with the grammar ``<element>[_g<n>][_s<f32|f16|bf16|i8>][_<mode>][_<structure>]``, for example
``int4_g128``. The structure of a sparse format is ``bitmap``, ``2of4``, ``bsr<g>`` or
``block<r>x<c>``: in which units entries are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core

__all__ = ["Element", "Format", "Part", "table"]


class Part(NamedTuple):
    """One array of a matrix in the portable layout."""

    name: str
    """Its name."""
    types: tuple[str, ...]
    """The types it may have, the usual one first, such as ``"u8"``; bfloat16 is kept as bits."""
    shape: tuple[int, ...]
    """Its shape."""
    along: str
    """How it is cut with the matrix: ``"codes"`` by rows and packed bytes, ``"groups"`` by rows and
    groups, ``"rows"``, ``"whole"`` not at all; ``"kept"`` has one dimension, at most that long, and
    only the kept entries of what it is cut from."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of that shape may be this part; kept entries are counted elsewhere."""
        if self.along == "kept":
            return len(shape) == 1 and shape[0] <= self.shape[0]
        return shape == self.shape


class Element(NamedTuple):
    """One row of the format table."""

    name: str
    """Name without group or scale suffix, such as ``int4``."""
    bits: int
    """Bits of one stored code."""
    minimum: int
    """Smallest code value that may be stored."""
    maximum: int
    """Largest code value that may be stored."""
    levels: int
    """Number of legal codes."""
    zeros: bool
    """Whether groups carry a zero point."""
    computes: tuple[str, ...]
    """The values of ``compute=`` it has."""
    group: int | None
    """Group length that names leave out; None for one group per row."""
    scales: tuple[str, ...]
    """Types that scales may have."""
    linear: bool
    """Whether codes are the integers that scales multiply, rather than places in a table."""
    nan: bool
    """Whether a group may be NaN: weights that are not finite make it so."""
    rounding: float
    """How far an integer of integer products is from the value it stands for, before the scale."""

    shared: bool
    """Whether all groups of a matrix have one scale: either axis may then be contracted."""
    span: int
    """How many codes at most are made and read together, from the start of a group on."""

    @property
    def tensor_scale(self) -> bool:
        """Whether it has formats where a float32 of the whole tensor multiplies every scale."""
        return "e4m3" in self.scales

    @property
    def values(self) -> NDArray[np.float32]:
        """What each stored code is worth before zero point and scale, in order of the codes.

        NaN where that depends on its neighbours, or on the table that the matrix brings.
        """
        return np.array(_core.code_values(self.name), np.float32)


class Format(str):
    """A format by its canonical name: a string that knows what it means.

    Parameters
    ----------
    name : str
        A format name, such as ``"int4_g128"``; defaults written out are dropped.

    Raises
    ------
    ValueError
        If the name does not parse; the message names the part at fault.
    """

    __slots__ = ("_computes", "_element", "_group", "_scale", "_structure")
    _computes: tuple[str, ...]
    _element: Element
    _group: int | None
    _scale: str
    _structure: str | None

    def __new__(cls, name: str) -> Format:  # noqa: D102 - the class says it
        if type(name) is cls:
            return name
        if not isinstance(name, str):
            raise TypeError(f"a format is named by a string, got {type(name).__name__}")
        canonical, element, group, scale, computes, structure = _core.parse_format(name)
        self = super().__new__(cls, canonical)
        self._element = Element(*element)
        self._group = group
        self._scale = scale
        self._computes = computes
        self._structure = structure
        return self

    def __repr__(self) -> str:
        return f"Format({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Format, (str(self),)

    @property
    def name(self) -> str:
        """The canonical name."""
        return str(self)

    @property
    def element(self) -> Element:
        """The table row: the coding of one value."""
        return self._element

    @property
    def bits(self) -> int:
        """Bits of one stored code."""
        return self._element.bits

    @property
    def group(self) -> int | None:
        """Group length along K; ``None`` for one group per row."""
        return self._group

    @property
    def scale(self) -> str:
        """Type of the stored scales, such as ``"f16"``.

        ``"f32"``, ``"f16"``, ``"bf16"``; powers of two, ``"e8m0"``; small floats within a scale of
        the tensor, ``"e4m3"``; integers within a scale of the row, ``"i8"``.
        """
        return self._scale

    @property
    def structure(self) -> str | None:
        """In which units entries are kept, such as ``"bitmap"``; None where all are."""
        return self._structure

    @property
    def dense(self) -> Format:
        """The format of the same codes with all entries kept."""
        s = self._structure
        return self if s is None else Format(str(self)[: -len(s) - 1])

    @property
    def is_plain(self) -> bool:
        """Whether numbers are stored as they are: ``f32``, ``f16``, ``bf16``."""
        return self._element.name in ("f32", "f16", "bf16")

    @property
    def has_zeros(self) -> bool:
        """Whether groups carry a zero point."""
        return self._element.zeros

    @property
    def computes(self) -> tuple[str, ...]:
        """The values of ``compute=`` that the format has.

        Those of its element, less activation groups that do not nest with the weight groups.
        """
        return self._computes

    def groups(self, cols: int) -> int:
        """Return the number of groups in a row of ``cols`` values."""
        if self._group is None:
            return int(cols > 0)
        return -(-cols // self._group)

    def parts(self, rows: int, cols: int) -> tuple[Part, ...]:
        """Return the arrays of a matrix of that shape, codes and scales first."""
        return tuple(Part(*p) for p in _core.format_parts(self, rows, cols))

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of the packed codes of a row of ``cols`` values."""
        return (cols * self._element.bits + 7) // 8


def table() -> tuple[Element, ...]:
    """Return the format table, one row per element.

    Returns
    -------
    tuple of Element
    """
    return tuple(Element(*row) for row in _core.format_table())
