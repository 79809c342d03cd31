"""AdapterFusion: attention over adapters of several tasks, for one more task. Pfeiffer et al. 2021, arXiv:2005.00247.

Stage 1 trains adapters, one task each. Stage 2 freezes them side by side in one model and trains only an attention that
asks, with each sublayer's output, which of them to listen to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.bottleneck import Houlsby, Pfeiffer, width_of
from jpeft.methods.fusion_wrappers import NETWORK, FusedAdapters
from jpeft.methods.method import Method, refuse_second
from jpeft.methods.targeted import lead_of, replaced
from jpeft.paths import Node
from jpeft.targets import Layers
from jpeft.wrapper import innermost

_STAGE_ONE: dict[str, type[Houlsby] | type[Pfeiffer]] = {Houlsby.kind: Houlsby, Pfeiffer.kind: Pfeiffer}

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AdapterFusion(Method):
    """Attention over the adapters of several tasks, all frozen but the attention (arXiv:2005.00247, section 3).

    adapters: folders of saved adapters (`runs/first/adapter`), all of one method: `Pfeiffer`, or `Houlsby` without
        trained norms. Heads that were trained with them are left behind. `jpeft.fuse` takes adapters from memory.
    adapter, tasks: that method and the number of adapters, once they are there; for a file.
    regularization: of the penalty |V - I|^2, which `jpeft.penalty` returns.
    dropout: of the attention's weights while training.
    name: keyed `<module path>/<name>/query`, `/query_bias`, `/key`, `/value`. `jpeft.observe` returns the weights, one
        for each adapter, `<module path>/<name>/attention`.
    """

    kind: ClassVar[str] = "adapter_fusion"

    adapters: tuple[str, ...] = ()
    adapter: Any = None
    tasks: int = 0
    regularization: float = 0.01
    dropout: float = 0.0
    dtype: str = "float32"
    name: str = "fusion"

    def __post_init__(self) -> None:
        given = self.adapters if isinstance(self.adapters, list | tuple) else [self.adapters]
        config = self.adapter.to_dict() if isinstance(self.adapter, Method) else self.adapter
        if not all(isinstance(folder, str | Path) for folder in given):
            raise JpeftError(f"AdapterFusion: adapters={self.adapters!r}; give the folders of saved adapters")
        if not (config is None or isinstance(config, Mapping)):
            raise JpeftError(f"AdapterFusion: adapter={config!r}; give a method, or its settings as a mapping")
        fields.settle(
            self,
            adapters=tuple(str(folder) for folder in given),
            adapter=_hashable(dict(config or {})),
            tasks=fields.whole(self.tasks),
            regularization=fields.real(self.regularization),
            dropout=fields.real(self.dropout),
            dtype=str(self.dtype),
        )
        fields.check_finite(self, "regularization", self.regularization)
        fields.check_rate(self, "dropout", self.dropout)
        fields.check_choice(self, "dtype", self.dtype, fields.DTYPES)
        fields.check_name(self)
        if self.adapters:
            if self.adapter or self.tasks:
                raise JpeftError("AdapterFusion: give adapters= (folders), or adapter= and tasks=, not both")
            return
        if not self.adapter:
            raise JpeftError("AdapterFusion: give adapters=, the folders of saved adapters")
        fields.check_whole(self, "tasks", self.tasks, least=1, most=1000)
        assert self.stage_one

    @property
    def stage_one(self) -> Houlsby | Pfeiffer:
        """The method of the adapters."""
        kind = self.adapter.get("method")
        if kind not in _STAGE_ONE:
            raise JpeftError(f"AdapterFusion: adapter={dict(self.adapter)!r}; its method is not {list(_STAGE_ONE)}")
        return one_of([_STAGE_ONE[kind].from_dict(dict(self.adapter))], "adapter=")

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        if self.adapters:
            method, arrays = self._read(model)
        else:
            method, arrays = self.stage_one, None
        replacements: dict[surgery.Path, Callable[[Any], Any]] = {}
        for node, layers in method.resolve(model):
            refuse_second(node.module, self.name, node.name)
            replacements[node.path] = self._maker(node, layers, key, method, arrays)
        return surgery.replace(model, replacements)

    def recorded(self, model: nnx.Module) -> tuple[Method, ...]:
        if not self.adapters:
            return (self,)
        method, arrays = self._read(model)
        return (replaced(self, adapters=(), adapter=method, tasks=len(arrays)),)

    def _read(self, model: nnx.Module) -> tuple[Houlsby | Pfeiffer, list[Arrays]]:
        from jpeft.checkpoint import read_adapter  # which knows all methods, this one too

        found = [(folder, *read_adapter(folder, model)) for folder in self.adapters]
        first = one_of(found[0][1], self.adapters[0])
        for folder, methods, _ in found[1:]:
            if (other := one_of(methods, folder)) != first:
                raise JpeftError(f"AdapterFusion: {folder!r} holds {other!r}, but {self.adapters[0]!r} {first!r}")
        return first, [arrays for _, _, arrays in found]

    def _maker(
        self, node: Node, layers: Layers, key: jax.Array, method: Houlsby | Pfeiffer, tasks: Sequence[Arrays] | None
    ) -> Callable[[Any], FusedAdapters]:
        width, lead = width_of(innermost(node.module), "out_features"), lead_of(node, layers)
        if tasks is None:
            each = [method.values(node, layers, jax.random.fold_in(key, n), width, width) for n in range(self.tasks)]
            network = {name: jnp.stack([own[name] for own in each], axis=len(lead)) for name in NETWORK}
        else:
            network = {name: stacked(tasks, f"{node.name}/{method.name}/{name}", name) for name in NETWORK}

        def drawn(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            query, key_ = (0.02 * jax.random.normal(one, (width, width)) for one in jax.random.split(key))
            return query, key_

        for _ in lead:
            drawn = jax.vmap(drawn)
        query, key_ = drawn(node.keys(key, self.name, lead, layers))
        identity = jnp.where(jnp.eye(width, dtype=bool), 1.0, 1e-6)  # nearly: each adapter says what it says
        attention = {
            "query": query,
            "query_bias": jnp.zeros((*lead, width)),
            "key": key_,
            "value": jnp.broadcast_to(identity, (*lead, width, width)),
        }
        return lambda base: FusedAdapters(
            base,
            name=self.name,
            network=network,
            attention={name: value.astype(self.dtype) for name, value in attention.items()},
            activation=method.activation,
            dropout=float(self.dropout),
            regularization=float(self.regularization),
            layers=layers,
        )


def one_of(methods: Sequence[Method], where: str) -> Houlsby | Pfeiffer:
    """The one method of adapters that fusion can take, as it is after training. Raises JpeftError for anything else."""
    (method, *more) = methods or (None,)
    if more or not isinstance(method, Houlsby | Pfeiffer):
        raise JpeftError(
            f"AdapterFusion: {where!r} holds {list(methods)!r}; it fuses Pfeiffer or Houlsby adapters alone"
        )
    if isinstance(method, Houlsby) and method.train_norms:
        raise JpeftError(
            f"AdapterFusion: {where!r} has norms of its own, which cannot be fused; train it with train_norms=False"
        )
    return replaced(method, drop=0, dropout=0.0)


def stacked(tasks: Sequence[Arrays], key: str, name: str) -> jax.Array:
    """The tasks' arrays under `key`, side by side behind the layer axes. Raises JpeftError if their shapes differ."""
    for number, task in enumerate(tasks):
        if key not in task or task[key].shape != tasks[0][key].shape:
            found = f"has shape {tuple(task[key].shape)}" if key in task else "is missing"
            raise JpeftError(f"AdapterFusion: {key!r} {found} in task {number}; all tasks need adapters of one shape")
    return jnp.stack([task[key] for task in tasks], axis=tasks[0][key].ndim - NETWORK[name])


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict({name: _hashable(item) for name, item in value.items()})
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value
