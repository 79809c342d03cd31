"""Tensors in files: the protocol that a source of weights follows, and safetensors, read and written.

The reader checks a file's header against the file before anything is read, maps it and hands out one tensor at a time.
Only safetensors is read: a pickle can run code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jpeft.errors import JpeftError
from jpeft.models.config import parse_json, read_json

MAX_HEADER_BYTES = 100 * 10**6  # the limit of the safetensors library
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor as its source will give it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class TensorSource(Protocol):
    """Where weights come from, under the checkpoint's names and in torch's layout. `where` names it in errors."""

    where: str

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, without reading any."""

    def read(self, name: str) -> np.ndarray:
        """One tensor; it may be a view of the file."""


@dataclasses.dataclass(frozen=True)
class _Span:
    info: TensorInfo
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file as a `TensorSource`. `metadata` is what its writer noted, strings by name."""

    def __init__(self, path: Path):
        self.where = str(path)
        self.path = path
        self.metadata, self._spans = _read_header(path)
        self._data: np.ndarray | None = None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor in the file."""
        return {name: span.info for name, span in self._spans.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only view of the mapped file."""
        span = self._spans[name]
        if span.start == span.stop:
            return np.zeros(span.info.shape, span.info.dtype)
        if self._data is None:
            self._data = np.memmap(self.path, np.uint8, mode="r")
        return self._data[span.start : span.stop].view(span.info.dtype).reshape(span.info.shape)


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, _Span]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise JpeftError(
                    f"{path}: not a safetensors file, or a truncated one: it has {size} bytes and its first 8 announce "
                    f"a header of {length}; download it again"
                )
            raw = parse_json(file.read(length), f"{path}: header")
    except OSError as error:
        raise JpeftError(f"{path}: cannot be read: {error.strerror or error}") from error
    metadata = raw.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise JpeftError(f"{path}: the metadata in the header is no object of strings")
    start = 8 + length
    spans = {name: _span(f"{path}: tensor {name!r}", entry, start, size) for name, entry in raw.items()}
    last, before = start, ""
    for name, span in sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop)):
        if span.start < last:
            raise JpeftError(f"{path}: tensors {before!r} and {name!r} overlap; the file is damaged, get it again")
        last, before = span.stop, name
    return metadata, spans


def _span(where: str, entry: Any, start: int, size: int) -> _Span:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise JpeftError(f"{where}: the header has no dtype, shape and data_offsets for it")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise JpeftError(f"{where}: dtype {dtype!r} is not one of {sorted(_DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise JpeftError(f"{where}: shape {shape!r} or data_offsets {offsets!r} are not lists of natural numbers")
    info = TensorInfo(tuple(shape), np.dtype(_DTYPES[dtype]))
    first, stop = (start + offset for offset in offsets)
    needed = math.prod(info.shape) * info.dtype.itemsize
    if stop - first != needed or stop > size:
        raise JpeftError(
            f"{where}: {dtype}{shape} takes {needed} bytes, the header places it at bytes {first} to {stop} of a file "
            f"of {size}; it is truncated or damaged, get it again"
        )
    return _Span(info, first, stop)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < 2**63 for entry in value
    )


class SafetensorsFolder:
    """The weights in a folder, one file or several with an index, as one `TensorSource`."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        self._files: dict[str, SafetensorsFile] = {}
        for path in _weight_files(folder):
            file = SafetensorsFile(path)
            for name in file.tensors:
                if name in self._files:
                    raise JpeftError(
                        f"{folder}: tensor {name!r} stands in {self._files[name].path.name} and {path.name}"
                    )
                self._files[name] = file
        for name, shard in _index(folder).items():
            if name not in self._files or self._files[name].path.name != shard:
                raise JpeftError(f"{folder / INDEX}: tensor {name!r} is not in {shard!r}; get the files again")

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor in the folder's files."""
        files = {id(file): file for file in self._files.values()}
        return {name: info for file in files.values() for name, info in file.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, mapped."""
        return self._files[name].read(name)


def _index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if (folder / WEIGHTS).is_file() or not path.is_file():
        return {}
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise JpeftError(f"{path}: weight_map is not an object from tensor names to file names")
    for name in set(table.values()):
        # A plain file name cannot lead out of the folder. Links may: huggingface_hub's cache is made of them.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise JpeftError(
                f"{path}: weight_map points to {name!r}: expected the name of a .safetensors file beside it"
            )
        if not (folder / name).is_file():
            raise JpeftError(f"{path}: the file {name!r} is missing; get the checkpoint again")
    return table


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_index(folder).values()))]
    present = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in present if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
        raise JpeftError(
            f"{folder}: only {pickles} hold weights here. They are pickles, which can run code, and are not read; "
            "convert them to safetensors where you trust them (save_pretrained in transformers)"
        )
    raise JpeftError(f"{folder}: neither {WEIGHTS} nor {INDEX} is there; found {present[:10]}")


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes tensors one at a time: `read(name)` gives each in turn. The file appears whole or not at all."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    # Wide types first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        info = tensors[name]
        stop = offset + math.prod(info.shape) * info.dtype.itemsize
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_whole(
        path, (chunk for part in ([struct.pack("<Q", len(text)), text], _chunks(order, read)) for chunk in part)
    )


def _chunks(order: Iterable[str], read: Callable[[str], np.ndarray]) -> Iterable[bytes | memoryview]:
    for name in order:
        array = np.ascontiguousarray(read(name))
        yield array.reshape(-1).view(np.uint8).data


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file beside `path` and renames it into place, so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise JpeftError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
