"""What is trained as a whole beside an adapter: `modules_to_save` (heads, embeddings) and biases.

PEFT's file has such a tensor under its own name, `base_model.model.classifier.weight`. Ours is the head itself, where
it is new and so `Trainable`, or a copy that `FullTuning` or, for biases, `BitFit` trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from jpeft import paths
from jpeft.errors import JpeftError
from jpeft.interop.config import Settings
from jpeft.interop.links import Link, turned, whole
from jpeft.interop.lora import check_tie, check_tied
from jpeft.interop.names import Place, in_task, model_and_family, places, tensor_name, tied_embedding, tied_head
from jpeft.interop.selection import CLASSIFIERS, modules_to_save, shortest, targets_for
from jpeft.merge import strip
from jpeft.methods import BitFit, FullTuning, Method, NormTuning
from jpeft.methods.retrained import Retrained
from jpeft.models.families import Slot, slots
from jpeft.models.model import Model
from jpeft.paths import Node
from jpeft.variables import Trainable
from jpeft.wrapper import Wrapper

# Where PEFT's own wrappers keep what is the base's, and what it writes a second time with bias="all".
_TWICE = ".modules_to_save."
_INSIDE = (".base_layer.", ".original_module.", _TWICE)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of the base model: its name in transformers, and its value as a checkpoint has it."""

    module: str
    kind: str  # our name of the variable: "kernel", "bias", ...
    name: str
    place: tuple[str, int | None]
    trains: bool
    value: Callable[[], np.ndarray]
    means: str = ""  # of an output head tied to the embedding: the embedding's module


def stored(model: Model) -> list[Stored]:
    """Every tensor of the base under `model`, layer by layer."""
    base, found = model_and_family(strip(model), "peft")
    variables = dict(nnx.to_flat_state(nnx.state(base)))
    made = []
    for slot in slots(base, found):
        owner, _, kind = slot.key.rpartition("/")
        for layer, stored_name in enumerate(slot.names):
            name = in_task(base, stored_name)
            member = layer if slot.stacked else None
            value = _reader(slot, variables[slot.path], member)
            trains = isinstance(variables[slot.path], Trainable)
            made.append(Stored(name.rpartition(".")[0], kind, name, (owner, member), trains, value))
    embedding = next((one for one in made if one.module == tied_embedding(base, found)), None)
    if embedding is not None:
        head = tied_head(found)
        made.append(dataclasses.replace(embedding, module=head, name=f"{head}.weight", means=embedding.module))
    return made


def _reader(slot: Slot, variable: Any, layer: int | None) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        value = variable.get_value()
        array = np.asarray(value if layer is None else value[layer])
        return array.T if slot.transpose else array

    return read


@dataclasses.dataclass(frozen=True)
class Saved:
    """methods: those that train what the file has as a whole. accounted: its tensors that equal the base's."""

    methods: tuple[Method, ...]
    accounted: tuple[str, ...]


def read(
    settings: Settings, model: Model, before: str, names: Collection[str], tensor: Callable[[str], np.ndarray]
) -> Saved:
    """What a file trains beside the adapter.

    before: what stands before transformers' names in the file. names: of its tensors; tensor: reads one.
    """
    entries = modules_to_save(settings)
    bias = settings.choice("bias", "none", ("none", "all", "lora_only"))
    everything = {(place.node.name, place.member): place for place in places(model)}
    entire: dict[Place, bool] = {}  # whether it differs from the base
    biased: list[Place] = []
    accounted, changed = [], []
    for one in stored(model):
        place = everything[one.place]
        wanted = any(_ends(part, entry) for part in _around(one.means or one.module) for entry in entries)
        if wanted and not (one.means or one.trains) and before + one.name not in names:
            entire[place] = True  # it is then found to be missing
        for name in _spellings(before, one.name):
            if name not in names:
                continue
            plain = name == before + one.name
            if _TWICE in name and before + one.name in names and _same(tensor(name), tensor(before + one.name)):
                accounted.append(name)
            elif wanted and plain:
                if not one.trains:
                    entire[place] = entire.get(place, False) or not _same(tensor(name), one.value())
            elif bias != "none" and one.kind == "bias" and not wanted:
                biased.append(place)
            elif _same(tensor(name), one.value()):
                accounted.append(name)
            else:
                changed.append(name)
    if changed:
        raise JpeftError(
            f"{settings.where}: the file changes weights of the base model that are not in modules_to_save: "
            f"{', '.join(changed[:5])}; it belongs to another base model or one with another vocabulary"
        )
    check_tied(settings, model, [place.name for place in entire])
    differing = [place for place, differs in entire.items() if differs]
    for one in stored(model):
        if everything[one.place] in entire and everything[one.place] not in differing:
            accounted.append(before + one.name)
    methods: list[Method] = []
    if differing:
        methods.append(FullTuning(targets=targets_for(differing, list(everything.values()))))
    if biased:
        methods.append(BitFit(targets=targets_for(biased, list(everything.values()))))
    return Saved(tuple(methods), tuple(accounted))


def _spellings(before: str, name: str) -> Iterator[str]:
    module, _, last = name.rpartition(".")
    yield before + name
    for part in _INSIDE:
        yield f"{before}{module}{part}{last}"


def _around(module: str) -> Iterator[str]:
    """A module's name and those of the modules around it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _ends(name: str, entry: str) -> bool:
    return name.endswith(entry)  # as PEFT has it: also within a segment


def _same(tensor: np.ndarray, value: np.ndarray) -> bool:
    return tensor.shape == value.shape and bool(np.array_equal(tensor.astype(value.dtype), value))


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A variable trained as a whole, of one layer. group: of what trains it."""

    node: Node
    member: int | None
    row: int | None
    kind: str
    key: str
    group: str | None
    shape: tuple[int, ...]


def _trained(model: Model) -> Iterator[_Trained]:
    for node in paths.nodes(model):
        module = node.module
        while isinstance(module, Wrapper):
            if isinstance(module, Retrained) and _group(vars(module)[module.copied[0]]) != NormTuning.group:
                for kind in module.copied:
                    yield from _rows(node, module.layers, kind, f"{node.name}/{module.name}/{kind}", vars(module)[kind])
            module = module.base
        for kind, variable in vars(module).items() if isinstance(module, nnx.Module) else ():
            if isinstance(variable, Trainable):
                yield from _rows(node, None, kind, f"{node.name}/{kind}", variable)


def _rows(node: Node, layers: Any, kind: str, key: str, variable: Any) -> Iterator[_Trained]:
    shape, group = tuple(variable.shape), _group(variable)
    for row, member in enumerate(node.members if layers is None else layers):
        own = shape if member is None else shape[1:]
        yield _Trained(node, member, None if member is None else row, kind, key, group, own)


def _group(variable: Any) -> str | None:
    return variable.get_metadata().get("group")


def links(model: Model, before: str, targeted: Collection[str]) -> list[Link]:
    """Where each variable that is trained as a whole stands. targeted: names in the file of modules with an adapter."""
    found = model_and_family(model, "peft")[1]
    made = []
    for entry in _trained(model):
        name = before + tensor_name(model, found, f"{entry.node.expanded(entry.member)}.{entry.kind}")
        owner, _, last = name.rpartition(".")
        if entry.group == BitFit.group and owner in targeted:
            name = f"{owner}.base_layer.{last}"
        stored_turned = entry.kind == "kernel" and entry.node.parts[-1] not in found.untransposed
        shape = entry.shape[::-1] if stored_turned else entry.shape
        made.append(Link(entry.key, entry.row, name, shape, ours=turned if stored_turned else whole))
        if owner == f"{before}{tied_embedding(model, found)}":
            made.append(Link(entry.key, entry.row, f"{before}{tied_head(found)}.weight", shape, copy=True))
    return made


def write(model: Model, before: str, targeted: Collection[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of adapter_config.json, and the tensors that PEFT wants although nothing trains them.

    Raises JpeftError for biases that PEFT has no name for.
    """
    found = model_and_family(model, "save_peft")[1]
    entries = list(_trained(model))
    by_place = {(place.node.name, place.member): place.name for place in places(model)}
    entire = {by_place[e.node.name, e.member] for e in entries if e.group != BitFit.group}
    biased = {by_place[e.node.name, e.member] for e in entries if e.group == BitFit.group}
    heads = CLASSIFIERS if model.task in ("sequence-classification", "token-classification") else ()
    base = stored(model)
    tensors = {
        before + one.name: one.value()
        for one in base
        if one.module.split(".", maxsplit=1)[0] in heads and one.module not in entire
    }
    rest = {name for name in entire if name.split(".", maxsplit=1)[0] not in heads}
    fields: dict[str, Any] = {}
    if entire or heads:
        fields["modules_to_save"] = [*shortest(rest, list(by_place.values())), *heads]
    tied = tied_embedding(model, found)
    if tied in entire:
        check_tie(model, str(tied), "save_peft")
        fields["ensure_weight_tying"] = True
    if biased:
        fields["bias"] = _bias(base, biased, entire, before, targeted)
    return fields, tensors


def _bias(base: Sequence[Stored], biased: set[str], whole: set[str], before: str, targeted: Collection[str]) -> str:
    having = {one.module for one in base if one.kind == "bias"} - whole
    if biased == {name for name in having if before + name in targeted}:
        return "lora_only"
    if biased == having:
        return "all"
    raise JpeftError(
        "save_peft: PEFT trains the biases of the adapted modules (bias='lora_only') or all of the model's ('all'), "
        f"and BitFit here trains others: {', '.join(sorted(biased)[:4])}; choose such targets, or jpeft.save_adapter"
    )
