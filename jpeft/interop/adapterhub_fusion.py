"""AdapterFusion as AdapterHub's `adapters` 1.3.0 saves it with `use_safetensors=True`: read onto a model.

    bert.encoder.layer.0.output.adapter_fusion_layer.A,B.query.weight    [D, D]
    bert.encoder.layer.0.output.adapter_fusion_layer.A,B.query.bias      [D]
    ...key.weight, key.bias, value.weight

The adapters that are fused stand in folders of their own. A bias of the keys shifts the scores of all adapters alike,
which the softmax does not see; it is checked and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jpeft.errors import JpeftError
from jpeft.fusing import fuse
from jpeft.interop import folder
from jpeft.interop.adapterhub_bottleneck import holder, load_bottleneck
from jpeft.interop.config import Schema, Settings
from jpeft.interop.links import Link, check, filled, turned
from jpeft.interop.names import places
from jpeft.methods import applied
from jpeft.methods.fusion_wrappers import FusedAdapters
from jpeft.partition import combine, partition
from jpeft.wrapper import Wrapper

CONFIG = "adapter_fusion_config.json"
WEIGHTS = "model_adapter_fusion.safetensors"
_USED = ("dropout_prob", "key", "query", "query_before_ln", "regularization", "value", "value_before_softmax")
# The value matrix starts as told by value_initialized; temperature cools while it trains.
_SCHEMA = Schema(used=dict.fromkeys((*_USED, "value_initialized")), refused={"residual_before": False})
_MATRICES = ("query.weight", "key.weight", "value.weight")


def load_fusion(model: Any, where: Path, given: Sequence[str | Path]) -> Any:
    """`model` with the fusion saved in the folder `where`; see `load_adapterhub`.

    given: folders of the fused adapters.
    """
    raw = folder.read_config(where, CONFIG)
    said = str(where / CONFIG)
    names = raw.get("adapter_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise JpeftError(f"{said}: adapter_names = {str(names)[:60]!r}: expected the names of the fused adapters")
    config = raw.get("config")
    if not isinstance(config, dict):
        raise JpeftError(f"{said}: expected the fields of a fusion under 'config', found {str(config)[:60]!r}")
    settings = Settings({"peft_type": "fusion", **{k: v for k, v in config.items() if k != "peft_type"}}, said)
    settings.conform(_SCHEMA)
    without = [name for name in ("query", "key", "value") if not settings.flag(name, True)]
    if without:
        raise JpeftError(f"{said}: {', '.join(without)} = false; here a fusion has query, key and value")
    dropout = settings.rate("dropout_prob") if config.get("dropout_prob") is not None else 0.0

    folders = _folders(where, names, given)
    each = [load_bottleneck(model, folders[name]) for name in names]
    first = applied(each[0])
    for name, one in zip(names, each, strict=True):
        if applied(one) != first:
            raise JpeftError(
                f"{said}: {folders[name]} holds {applied(one)[-1]!r}, but {folders[names[0]]} {first[-1]!r}; here "
                "fused adapters are of one kind and size"
            )
    tasks = [(parts.adapter, parts.buffers) for parts in map(partition, each)]
    regularization = 0.01 if settings.flag("regularization", True) else 0.0
    fused = fuse(each[0], tasks, rngs=0, dropout=dropout, regularization=regularization)

    graphdef, adapter, buffers, frozen = partition(fused)
    links, ignored = _links(fused, ",".join(names))
    file = folder.read_weights(where, WEIGHTS)
    check(links, file.tensors, ignored, file.where)
    values = filled(links, adapter, lambda tensor: folder.read_tensor(file, tensor))
    return combine(graphdef, {**adapter, **values}, buffers, frozen)


def _folders(where: Path, names: Sequence[str], given: Sequence[str | Path]) -> dict[str, Path]:
    """The folder of each adapter: of those given the one that holds it, else in the fusion's folder or beside it."""
    if given:
        held = {}
        for path in map(Path, given):
            held[str(folder.read_config(path).get("name"))] = path
        missing = [name for name in names if name not in held]
        if missing:
            raise JpeftError(
                f"{where / CONFIG}: fuses {names}; of these {missing} are not in adapters=, which hold {sorted(held)}"
            )
        return held
    found = {}
    for name in names:
        plain = Path(name).name == name  # a name from a file must not lead elsewhere
        beside = [place / name for place in (where, where.parent) if plain and (place / name / folder.CONFIG).is_file()]
        if not beside:
            raise JpeftError(
                f"{where / CONFIG}: the adapter {name!r} is not in {where} nor beside it; give the folders of all as "
                "load_adapterhub(model, path, adapters=[...])"
            )
        found[name] = beside[0]
    return found


def _links(model: Any, name: str) -> tuple[list[Link], list[str]]:
    """The links of a fusion's arrays, and the tensors that the output does not depend on."""
    made, ignored = [], []
    for place in places(model):
        module = place.node.module
        while isinstance(module, Wrapper):
            if isinstance(module, FusedAdapters):
                before = f"{holder(model, place)}.adapter_fusion_layer.{name}."
                if module.layers is not None and place.member not in module.layers:  # there is nothing to attend to
                    ignored += [before + part for part in (*_MATRICES, "query.bias", "key.bias")]
                else:
                    ignored.append(before + "key.bias")
                    row = place.member if module.layers is None else module.layers.index(place.member)
                    key, width = f"{place.node.name}/{module.name}/", module.query.shape[-1]
                    made += [
                        Link(key + part.removesuffix(".weight"), row, before + part, (width, width), turned)
                        for part in _MATRICES
                    ]
                    made.append(Link(key + "query_bias", row, before + "query.bias", (width,)))
            module = module.base
    return made, ignored
