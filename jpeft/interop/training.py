"""What serves training only: encoders and MLPs whose result PEFT's files hold, kept in a file of their own beside it.

PEFT throws them away and does not look at the file. It holds our arrays under their canonical keys, and the method in
its metadata; read back, training goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.baking import bake
from jpeft.errors import JpeftError
from jpeft.interop import folder
from jpeft.interop.links import Link, filled, gathered
from jpeft.interop.links import check as check_links
from jpeft.methods import METHODS, Method, from_dict
from jpeft.models.config import parse_json
from jpeft.models.tensors import SafetensorsFile
from jpeft.partition import Partition, partition

_TOLERANCE = 1e-4  # of the largest value: a prompt made anew from its encoder, on any machine


def contents(model: Any, method: Method, others: Collection[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, metadata) of the file for `method`; others: keys that the PEFT file has."""
    _, adapter, buffers, _ = partition(model)
    arrays = {key: np.asarray(value) for key, value in {**adapter, **buffers}.items() if key not in others}
    return arrays, {"format": "jpeft", "method": json.dumps(method.to_dict())}


def read(where: Path) -> tuple[Method, SafetensorsFile] | None:
    """The method and the tensors of the file in a PEFT folder, if there is one."""
    path = where / folder.TRAINING
    if not path.is_file():
        return None
    file = folder.read_weights(where, folder.TRAINING)
    raw = file.metadata.get("method")
    if file.metadata.get("format") != "jpeft" or raw is None:
        raise JpeftError(
            f"{path}: is not as save_peft writes it (it tells no method); delete it to read what PEFT reads"
        )
    config = parse_json(raw.encode(), f"{path}: method")
    if config.get("method") not in METHODS:
        raise JpeftError(f"{path}: method {config.get('method')!r} is not known; delete it to read what PEFT reads")
    try:
        return from_dict(config), file
    except (TypeError, ValueError, OverflowError) as error:
        raise JpeftError(f"{path}: {error}") from error


def values(
    file: SafetensorsFile, shapes: Mapping[str, Any], base: Partition, others: Collection[str]
) -> dict[str, np.ndarray]:
    """Our arrays, as the file has them. shapes: of all arrays of the adapted model; others: keys of the PEFT file."""
    wanted = shapes.keys() - base.adapter.keys() - base.buffers.keys() - set(others)
    links = [Link(key, None, key, tuple(shapes[key].shape)) for key in sorted(wanted)]
    check_links(links, file.tensors, (), file.where)
    return filled(links, shapes, lambda name: folder.read_tensor(file, name))


def check(model: Any, links: Callable[[Any], Sequence[Link]], read: Callable[[str], np.ndarray], where: Path) -> None:
    """Raises JpeftError unless what `model` makes is what the PEFT file holds. links: of the baked model."""
    baked = bake(model)
    _, adapter, buffers, _ = partition(baked)
    for name, made in gathered(links(baked), {**adapter, **buffers}).items():
        stored = read(name)
        if np.abs(made - stored).max() > _TOLERANCE * max(np.abs(stored).max(), 1e-9):
            raise JpeftError(
                f"{where / folder.TRAINING} does not make the {name} in {folder.WEIGHTS}, which another program has "
                "changed since; delete the former to read the latter"
            )
