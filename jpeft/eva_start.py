"""`eva`: LoRA that starts from the data. Paischer et al. 2024, arXiv:2410.07170.

A of every layer starts as the principal components of the layer's inputs, over batches of the task's data, and ranks
move to where more of the inputs' variance is left to explain. B starts at zero: the model starts as the base.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict
from jaxtyping import Array, Float

from jpeft import kinds, surgery
from jpeft.errors import JpeftError
from jpeft.methods.lora import LoRA
from jpeft.methods.targeted import lead_of
from jpeft.partition import combine, partition
from jpeft.paths import Node
from jpeft.targets import Pattern, prefix_of
from jpeft.wrapper import Wrapper, at, innermost, observing

_LABELS = ("labels", "label")


def eva(
    model: nnx.Module,
    method: LoRA,
    batches: Iterable[Any],
    *,
    rho: float = 2.0,
    whiten: bool = False,
    adjust_scale: bool = True,
    call: Callable[[Any, Any], Any] | None = None,
    rngs: nnx.Rngs | jax.Array | int,
) -> Any:
    """`model` with `method` on it, whose A starts as the principal components of each layer's inputs.

    method: a `LoRA`, `LoRAPlus`, `LoRAFA` or `DoRA` of linear layers. batches: what the model is called with, each used
    once, all of one shape; a mapping is given as keyword arguments, without its labels, and tokens that its
    "attention_mask" [B, T] leaves out do not count. call(model, batch): for models that are called otherwise.
    rho: a layer may get up to rho times its rank, others less, the sum staying the same; 1 leaves ranks as they are.
    whiten: divides each component by the root of its singular value. adjust_scale: keeps alpha / rank where a rank
    changes, by another alpha.

    The components are found in one pass, batch by batch, in float32, so that no more than one batch of inputs is held.
    Ranks and alphas of the result are in its `rank_pattern` and `alpha_pattern`, by layer, and `init` is the default: a
    saved adapter loads without the data.
    Raises JpeftError for other methods and layers, and where there are fewer tokens than components to find.
    """
    _check(method, rho)
    plain = dataclasses.replace(method, init="kaiming")
    everything = list(_slots(model, plain))
    slots = [slot for slot in everything if slot.rank]
    most = [min(round(slot.rank * rho), slot.features) for slot in slots]
    found = _components(model, slots, most, batches, call or _called)
    ranks = {**dict.fromkeys(everything, 0), **_distributed(slots, most, found)}
    started = dataclasses.replace(
        plain,
        rank_pattern=FrozenDict({slot.pattern: rank for slot, rank in ranks.items()}),
        alpha_pattern=FrozenDict(
            {
                slot.pattern: slot.alpha * (_root(plain, rank) / _root(plain, slot.rank) if adjust_scale else 1)
                for slot, rank in ranks.items()
                if rank
            }
        ),
    )
    components = {slot: _rows(state, ranks[slot], whiten) for slot, state in zip(slots, found, strict=True)}
    adapted = started(model, rngs=rngs)
    parts = partition(adapted)
    adapter, buffers = dict(parts.adapter), dict(parts.buffers)
    for key in {f"{slot.node.name}/{plain.name}/a" for slot in slots}:
        for held in (adapter, buffers):  # A is a buffer where the method keeps it fixed
            if key in held:
                held[key] = _filled(adapted, held[key], key, components, plain.name)
    return combine(parts.graphdef, adapter, buffers, parts.frozen)


@dataclasses.dataclass(frozen=True, eq=False)
class _Slot:
    """One layer to start: its node and number, rank and alpha by the method, the number of its input's features."""

    node: Node
    member: int | None
    rank: int
    alpha: float
    features: int

    @property
    def name(self) -> str:
        """`layers.3.self_attn.q_proj`."""
        return self.node.expanded(self.member)

    @property
    def pattern(self) -> str:
        """A key of `rank_pattern` that means this layer alone."""
        return f"^{re.escape(self.name)}$"


@dataclasses.dataclass
class _State:
    """Incremental PCA of rows that come batch by batch (Ross et al. 2008): what it knows after some of them.

    components [k, in], values [k]: right singular vectors and singular values of the centred rows so far. mean [in].
    spread []: the sum of squared distances from the mean. count []: of rows.
    """

    components: Float[Array, "k in"]
    values: Float[Array, "k"]
    mean: Float[Array, "in"]
    spread: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def empty(cls, k: int, features: int) -> _State:
        """Nothing known yet."""
        zero = jnp.zeros(())
        return cls(jnp.zeros((k, features)), jnp.zeros((k,)), jnp.zeros((features,)), zero, zero)


jax.tree_util.register_dataclass(_State)


def _check(method: Any, rho: Any) -> None:
    if not isinstance(method, LoRA):
        raise JpeftError(f"eva starts a LoRA, LoRAPlus, LoRAFA or DoRA, not a {type(method).__name__}")
    if method.init not in ("kaiming", "eva"):
        raise JpeftError(f"eva: the method starts by init={method.init!r}; leave init out, or say 'eva'")
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not (rho >= 1 and math.isfinite(rho)):
        raise JpeftError(f"eva: rho={rho!r} is not a number of at least 1")


def _root(method: LoRA, rank: int) -> float:
    """What alpha is divided by at this rank."""
    return math.sqrt(rank) if method.use_rslora else rank


def _slots(model: nnx.Module, method: LoRA) -> Iterable[_Slot]:
    prefix = prefix_of(model)
    ranks = Pattern(method.rank_pattern, field="rank_pattern", method="eva")
    alphas = Pattern(method.alpha_pattern, field="alpha_pattern", method="eva")
    default = float(method.rank if method.alpha is None else method.alpha)
    for node, layers in method.resolve(model):
        if kinds.kind_of(node.module) is not nnx.Linear or len(lead_of(node, None)) > (node.stack is not None):
            raise JpeftError(
                f"eva: {node.name!r} is a {type(innermost(node.module)).__name__}; only linear layers (nnx.Linear) "
                "start from their inputs, so exclude it"
            )
        features = kinds.own_shape(node.module)[0]
        for member in node.members if layers is None else layers:
            rank, alpha = ranks(node, member, prefix, method.rank), alphas(node, member, prefix, default)
            yield _Slot(node, member, rank, float(alpha), features)
    ranks.check()
    alphas.check()


class _Listening(Wrapper):
    """Shows the input of a layer."""

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        self.observed("", x)
        return self.base(x, *args, **kwargs)


def _called(model: Any, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        return model(batch)
    return model(**{name: value for name, value in batch.items() if name not in _LABELS})


def _components(
    model: nnx.Module, slots: list[_Slot], most: list[int], batches: Iterable[Any], call: Callable[[Any, Any], Any]
) -> list[_State]:
    """What is known of every slot's inputs after all batches."""

    def listen(node: Node) -> Callable[[Any], Any]:
        def wrap(base: Any) -> _Listening:
            listening = _Listening(base, name="eva_input")
            cut = len(node.parts) if node.stack is None else node.stack[0]
            listening.place = ("/".join(node.parts[:cut]), "/".join(node.parts[cut:]))
            return listening

        return wrap

    nodes = {slot.node.path: slot.node for slot in slots}
    parts = partition(surgery.replace(model, {path: listen(node) for path, node in nodes.items()}))

    @jax.jit
    def step(states: list[_State], arrays: Any, batch: Any) -> list[_State]:
        with observing() as seen:
            call(combine(parts.graphdef, *arrays), batch)
        made: dict[int, _State] = {}
        new = []
        for slot, state in zip(slots, states, strict=True):
            rows = seen.get(slot.name.replace(".", "/"))
            if rows is None:
                raise JpeftError(f"eva: {slot.name!r} is not called; exclude it from the targets")
            # Layers that are given the same array (query, key, value) are given the same tracer.
            if id(rows) not in made:
                made[id(rows)] = _updated(state, rows, _mask(batch, rows))
            new.append(made[id(rows)])
        return new

    width = {slot.features: 0 for slot in slots}
    for slot, k in zip(slots, most, strict=True):  # one number for all that may share an input
        width[slot.features] = max(width[slot.features], k)
    states = [_State.empty(width[slot.features], slot.features) for slot in slots]
    for batch in batches:
        states = step(states, parts[1:], jax.tree.map(jnp.asarray, batch))
    for slot, state, k in zip(slots, states, most, strict=True):
        if state.count < k:
            raise JpeftError(
                f"eva: {int(state.count)} tokens cannot tell {k} components (rank times rho) of the input of "
                f"{slot.name!r}; give more batches, or a smaller rank or rho"
            )
    return states


def _mask(batch: Any, rows: Array) -> Array | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or mask.shape != rows.shape[:-1] else mask.reshape(-1) != 0


def _updated(state: _State, x: Float[Array, "*batch in"], mask: Array | None) -> _State:
    """`state` with the rows of x that the mask keeps."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    weight = jnp.ones(len(rows)) if mask is None else mask.astype(jnp.float32)
    count = jnp.sum(weight)
    mean = weight @ rows / jnp.maximum(count, 1)
    centred = (rows - mean) * weight[:, None]
    total, gap = state.count + count, state.mean - mean
    between = state.count * count / jnp.maximum(total, 1)
    known = state.values[:, None] * state.components
    stacked = jnp.concatenate([known, centred, (jnp.sqrt(between) * gap)[None]])
    _, values, components = jnp.linalg.svd(stacked, full_matrices=False)
    # The sign of a component is arbitrary: its largest element is made positive.
    largest = jnp.take_along_axis(components, jnp.argmax(jnp.abs(components), axis=1)[:, None], axis=1)
    components = components * jnp.where(largest < 0, -1, 1)
    k = len(state.values)
    return _State(
        components[:k],
        values[:k],
        mean + gap * state.count / jnp.maximum(total, 1),
        state.spread + jnp.sum(centred**2) + between * jnp.sum(gap**2),
        total,
    )


def _distributed(slots: list[_Slot], most: list[int], found: list[_State]) -> dict[_Slot, int]:
    """The ranks: the components that explain most of their layer's variance, as many as the ranks of all slots."""
    shares = [
        np.asarray(state.values[:k] ** 2 / jnp.maximum(state.spread, 1e-30))
        for state, k in zip(found, most, strict=True)
    ]
    owners = [slot for slot, k in zip(slots, most, strict=True) for _ in range(k)]
    order = np.argsort(-np.concatenate(shares), kind="stable")[: sum(slot.rank for slot in slots)]
    ranks = dict.fromkeys(slots, 0)
    for position in order:
        ranks[owners[position]] += 1
    return ranks


def _rows(state: _State, rank: int, whiten: bool) -> Float[np.ndarray, "rank in"]:
    rows = np.asarray(state.components[:rank])
    return rows / np.sqrt(np.asarray(state.values[:rank]))[:, None] if whiten else rows


def _filled(adapted: nnx.Module, like: Array, key: str, components: Mapping[_Slot, np.ndarray], name: str) -> Array:
    """The array a under `key`, [*lead, in, r], with the components of its layers; slots beyond a rank are zero."""
    made = np.zeros(like.shape, np.float32)
    for slot, rows in components.items():
        if f"{slot.node.name}/{name}/a" == key and len(rows):
            layers = at(surgery.get(adapted, slot.node.path), name).layers
            row = slot.member if layers is None or slot.member is None else layers.index(slot.member)
            (made if row is None else made[row])[:, : len(rows)] = rows.T
    return jnp.asarray(made, like.dtype)
