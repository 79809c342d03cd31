"""The GGUF container: metadata and tensors of an untrusted file, every length checked against the file's size.

The `gguf` package knows the quantised formats and takes the blocks apart; the header is read here, since that package's
own reader believes what the header says (a lying array length makes it allocate without end).

Layout, little-endian: magic, version, number of tensors, number of metadata entries; the entries (key, type, value);
the tensors' descriptions (name, dimensions from the innermost outwards, type, offset); padding; the tensors.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jpeft.errors import JpeftError

VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "u1"])) | {10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL = 7
_FLOATS: dict[str, Any] = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "F64": "<f8"}
# Kinds of blocks of 32 values that are kept as they are: how many float16 numbers and bytes of codes each has.
PACKED = {"Q4_0": (1, 16), "Q4_1": (2, 16), "Q8_0": (1, 32)}
# The fewest bytes an entry and a tensor's description can take: counts beyond these are lies.
_LEAST_ENTRY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies. shape: as in torch, outermost first. kind: the `gguf` package's quantisation type."""

    shape: tuple[int, ...]
    kind: Any
    offset: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in which `read` gives it."""
        return np.dtype(_FLOATS.get(self.kind.name, np.float32))


class _Cursor:
    """Reads values one after another; running off the end is an error that says where."""

    def __init__(self, data: mmap.mmap, where: str):
        self.data, self.where, self.at = data, where, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise JpeftError(
                f"{self.where}: {what} at byte {self.at} would take {count} bytes, but {self.left} are left: "
                "the file is truncated or damaged; download it again"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, form: str, what: str) -> int:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.integer("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise JpeftError(f"{self.where}: {what} before byte {self.at} is not UTF-8: {error}") from error

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(what)
        return self.numbers(kind, 1, what)[0]

    def numbers(self, kind: int, count: int, what: str) -> list[Any]:
        if kind not in _SCALARS:
            raise JpeftError(f"{self.where}: {what} has the unknown value type {kind}")
        form = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(form.itemsize * count, what), form)
        return (values != 0).tolist() if kind == _BOOL else values.tolist()

    def array(self, what: str) -> list[Any]:
        kind, count = self.integer("I", what), self.integer("Q", what)
        if kind == _ARRAY:
            raise JpeftError(f"{self.where}: {what} is an array of arrays, which no model here has")
        if kind != _STRING:
            return self.numbers(kind, count, what)
        if count * 8 > self.left:
            raise JpeftError(f"{self.where}: {what} claims {count} strings, but {self.left} bytes are left in the file")
        return [self.text(what) for _ in range(count)]


class GGUFFile:
    """An open GGUF file: `metadata` as Python values, `tensors` by name, `read(name)` for one tensor as an array.

    Raises JpeftError where the file is not GGUF or contradicts itself. Nothing is read of a tensor before `read`.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise JpeftError(f"{self.path}: not a GGUF file (it does not begin with the letters GGUF)")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise JpeftError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        cursor = _Cursor(self._data, str(self.path))
        cursor.at = 4
        version = cursor.integer("I", "the version")
        if version not in VERSIONS:
            swapped = " (the file is big-endian)" if version & 0xFFFF == 0 else ""
            raise JpeftError(f"{self.path}: GGUF version {version}{swapped}; versions {list(VERSIONS)} are read here")
        count = cursor.integer("Q", "the number of tensors")
        entries = cursor.integer("Q", "the number of metadata entries")
        if entries * _LEAST_ENTRY + count * _LEAST_TENSOR > cursor.left:
            raise JpeftError(
                f"{self.path}: the header claims {count} tensors and {entries} metadata entries, "
                f"more than the {cursor.left} bytes of the file can hold"
            )
        self.metadata = self._read_metadata(cursor, entries)
        self.tensors = self._read_tensors(cursor, count)

    def _read_metadata(self, cursor: _Cursor, entries: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.text("a metadata key")
            if key in metadata:
                raise JpeftError(f"{self.path}: the metadata key {key!r} stands twice")
            metadata[key] = cursor.value(cursor.integer("I", f"the type of {key!r}"), f"the metadata {key!r}")
        return metadata

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, GGUFTensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        found = []
        for _ in range(count):
            name = cursor.text("a tensor's name")
            dimensions = cursor.integer("I", f"the rank of {name!r}")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise JpeftError(f"{self.path}: the tensor {name!r} claims {dimensions} dimensions")
            shape = tuple(reversed([cursor.integer("Q", f"the shape of {name!r}") for _ in range(dimensions)]))
            number = cursor.integer("I", f"the type of {name!r}")
            offset = cursor.integer("Q", f"the offset of {name!r}")
            found.append((name, shape, number, offset))
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise JpeftError(f"{self.path}: general.alignment = {align!r}: expected a power of two")
        start = -(-cursor.at // align) * align
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in found:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError as error:
                raise JpeftError(f"{self.path}: the tensor {name!r} has the unknown type {number}") from error
            block, width = GGML_QUANT_SIZES[kind]
            elements = 1
            for size in shape:
                elements *= size
            if name in tensors:
                raise JpeftError(f"{self.path}: the tensor {name!r} stands twice")
            if not elements or shape[-1] % block:
                raise JpeftError(
                    f"{self.path}: the tensor {name!r} of shape {list(shape)} cannot consist of {kind.name} "
                    f"blocks of {block} values"
                )
            nbytes = elements // block * width
            if start + offset + nbytes > len(self._data):
                raise JpeftError(
                    f"{self.path}: the tensor {name!r} of shape {list(shape)} ({kind.name}) would end at byte "
                    f"{start + offset + nbytes}, but the file has {len(self._data)}: it is truncated; download it again"
                )
            tensors[name] = GGUFTensor(shape, kind, start + offset, nbytes)
        return tensors

    def read_packed(self, name: str) -> dict[str, np.ndarray]:
        """The matrix `name`, of one of the kinds in `PACKED`, as `jpeft.quant` stores such blocks, row by row."""
        tensor = self.tensors[name]
        header, width = PACKED[tensor.kind.name]
        raw = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        blocks = raw.reshape(tensor.shape[0], -1, 2 * header + width)  # [out, blocks, bytes]
        floats = np.ascontiguousarray(blocks[..., : 2 * header]).view("<f2")
        arrays = {name: floats[..., i].copy() for i, name in enumerate(("scales", "minima")[:header])}
        codes = blocks[..., 2 * header :]
        if width == 32:
            return arrays | {"codes": np.ascontiguousarray(codes).view(np.int8).reshape(tensor.shape)}
        # A byte holds values i and i + 16 of its block there, and neighbours here.
        spread = np.concatenate([codes & 15, codes >> 4], axis=-1)
        return arrays | {"codes": ((spread[..., 0::2] << 4) | spread[..., 1::2]).reshape(tensor.shape[0], -1)}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` in its own float type, as a view of the file, or dequantised to float32."""
        from gguf import dequantize

        tensor = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        if tensor.kind.name in _FLOATS:
            return raw.view(_FLOATS[tensor.kind.name]).reshape(tensor.shape)
        try:
            return dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise JpeftError(
                f"{self.path}: the tensor {name!r} is stored as {tensor.kind.name}, which the gguf package does not "
                "dequantise; convert the file to F16 or Q8_0"
            ) from error
