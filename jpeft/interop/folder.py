"""A PEFT adapter's folder: its two files, checked; written whole or not at all."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.errors import JpeftError
from jpeft.models.config import read_json
from jpeft.models.tensors import SafetensorsFile, TensorInfo, write_safetensors, write_whole

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TRAINING = "jpeft_training.safetensors"  # what serves training only, which PEFT throws away and does not read


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """The configuration of the adapter in `folder`."""
    _check_folder(folder)
    if not (folder / name).is_file():
        raise JpeftError(f"load_peft: {folder} has no {name}, so it is no PEFT adapter; it holds {_holds(folder)}")
    return read_json(folder / name)


def read_weights(folder: Path, name: str = WEIGHTS) -> SafetensorsFile:
    """The tensors of the adapter in `folder`."""
    path = folder / name
    if path.is_file():
        return SafetensorsFile(path)
    pickles = [entry for entry in _holds(folder) if entry.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickles:
        raise JpeftError(
            f"load_peft: {folder} holds its weights in {pickles}. A pickle can run code and is not read; "
            "load it with PEFT where you trust it, and save_pretrained writes safetensors"
        )
    raise JpeftError(f"load_peft: {folder} has no {name}; it holds {_holds(folder)}")


def read_tensor(file: SafetensorsFile, name: str) -> np.ndarray:
    """One tensor. Raises JpeftError if a value is not finite."""
    tensor = file.read(name)
    if not np.all(np.isfinite(tensor.astype(np.float32))):
        raise JpeftError(f"{file.where}: {name} holds values that are not finite")
    return tensor


def _check_folder(folder: Path) -> None:
    try:
        if folder.is_dir():
            return
    except (OSError, ValueError) as error:
        raise JpeftError(f"load_peft: {str(folder)!r} cannot be used: {error}") from None
    raise JpeftError(
        f"load_peft: there is no folder {str(folder)!r}; an adapter of a hub is downloaded first "
        "(huggingface_hub.snapshot_download returns its folder)"
    )


def _holds(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())[:10]
    except OSError as error:
        raise JpeftError(f"{folder}: cannot be read: {error.strerror or error}") from error


def target(path: str | Path, *, overwrite: bool) -> Path:
    """The folder to write. Raises JpeftError if it exists, unless an adapter is there that may be overwritten."""
    try:
        folder = Path(path).expanduser().absolute()
        exists = folder.exists()
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        raise JpeftError(f"save_peft: {path!r} cannot be used as a folder: {error}") from None
    if exists and not overwrite:
        raise JpeftError(f"save_peft: {str(folder)!r} exists; choose another folder or pass overwrite=True")
    if exists and not (folder / CONFIG).is_file():
        raise JpeftError(f"save_peft: {str(folder)!r} exists and is no PEFT adapter; it is not overwritten")
    return folder


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    training: tuple[Mapping[str, np.ndarray], Mapping[str, str]] | None = None,
) -> None:
    """Writes an adapter beside `folder` and renames it into place, so that nobody sees a part of it.

    training: (tensors, metadata) of the file of what serves training only.
    """
    mark = uuid.uuid4().hex[:8]
    made = folder.with_name(f".{folder.name}.{mark}.part")
    old = folder.with_name(f".{folder.name}.{mark}.old")
    try:
        made.mkdir(parents=True)
        _write_tensors(made / WEIGHTS, tensors, {"format": "pt"})
        if training is not None:
            _write_tensors(made / TRAINING, *training)
        write_whole(made / CONFIG, [json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"])
        if folder.exists():
            folder.rename(old)
        made.rename(folder)
    except OSError as error:
        raise JpeftError(f"save_peft: {str(folder)!r} cannot be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for rest in (made, old):
            shutil.rmtree(rest, ignore_errors=True)


def _write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in tensors.items()}
    write_safetensors(path, infos, lambda name: tensors[name], metadata)
