"""The shardings of a model's arrays and of its optimizer's, and models placed by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft import paths, surgery
from jpeft.partition import value_of, variables
from jpeft.sharding.mesh import batch_sharding
from jpeft.sharding.rules import Resolver, Rules
from jpeft.variables import AdapterBuffer, AdapterIds, DropoutKey, Trainable


class Shardings(NamedTuple):
    """{canonical key: NamedSharding} for each part of `jpeft.partition`."""

    adapter: dict[str, NamedSharding]
    buffers: dict[str, NamedSharding]
    frozen: dict[str, NamedSharding]


def shardings(model: nnx.Module, mesh: Mesh, rules: Rules | None = None) -> Shardings:
    """Where each array of `model` belongs on `mesh`; the model may be abstract (`nnx.eval_shape`).

    rules: {entry: PartitionSpec}, entries as in targets, the spec that of a layer's weight (in, out), before the rules
    that the model declares as `sharding_rules`. A layer's bias follows its output. What a method adds follows the layer
    it adapts: LoRA's a its input, b its output.

    Raises JpeftError for a base array that a rule cannot cut evenly, and for a rule that matches nothing.
    """
    found = {path: NamedSharding(mesh, spec) for path, spec in specs(model, mesh, rules).items()}
    parts = Shardings({}, {}, {})
    for key, path, variable in variables(model):
        if not isinstance(variable, DropoutKey | AdapterIds):
            kind = 0 if isinstance(variable, Trainable) else 1 if isinstance(variable, AdapterBuffer) else 2
            parts[kind][key] = found[path]
    return parts


def specs(model: nnx.Module, mesh: Mesh, rules: Rules | None = None) -> dict[surgery.Path, PartitionSpec]:
    """The spec of every array of `model`, by its path in the NNX state."""
    resolver = Resolver(model, mesh, rules)
    nodes = {node.path: node for node in paths.nodes(model)}
    made = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        at = path[:-1]
        module = surgery.get(model, at)
        while at not in nodes and at and at[-1] in ("base", "layer"):  # a wrapper, or a Stack, is the same place
            at = at[:-1]
        shape = getattr(value_of(variable), "shape", None)
        if shape is None or at not in nodes or not isinstance(module, nnx.Module):
            made[path] = PartitionSpec()
        else:
            made[path] = resolver.spec(nodes[at], module, str(path[-1]), variable, shape)
    resolver.check()
    return made


def shard(model: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """A copy of `model` with its arrays placed on `mesh`, as `shardings` says, whose arguments and errors these are.

    Of an abstract model the arrays become abstract arrays with their sharding, with which `jax.jit(...).lower` compiles
    for a mesh that is not there.

    A module that defines `on_mesh(rows, own)` is told how the rows of a batch lie (a NamedSharding) and its own
    variables ({name: PartitionSpec}), so that it can constrain what it computes; the models and the quantised layers
    of this library do.
    """
    where = specs(model, mesh, rules)
    graphdef, state = nnx.split(model)
    placed = []
    for path, variable in nnx.to_flat_state(state):
        value = placed_value(value_of(variable), NamedSharding(mesh, where[path]))
        placed.append((path, variable.replace(value) if isinstance(variable, nnx.Variable) else value))
    made = nnx.merge(graphdef, nnx.from_flat_state(placed))
    tell(made, mesh, where)
    return made


def tell(model: nnx.Module, mesh: Mesh, where: Mapping[surgery.Path, PartitionSpec]) -> None:
    """Tells each module that defines `on_mesh(rows, own)` how the rows of a batch lie, and its own variables.

    where: as from `specs`. Modules use this to say how what they compute lies, which the compiler cannot know.
    """
    own: dict[surgery.Path, dict[str, PartitionSpec]] = {}
    for path, spec in where.items():
        own.setdefault(path[:-1], {})[str(path[-1])] = spec
    for path, module in surgery.modules(model):
        tellable: Any = module
        if hasattr(type(module), "on_mesh"):  # of its own: a wrapper passes on what its base has
            tellable.on_mesh(batch_sharding(mesh), own.get(path, {}))


def placed_value(value: Any, sharding: NamedSharding) -> Any:
    """An array, or an abstract one, with this sharding."""
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if not isinstance(value, jax.Array) or value.is_fully_addressable:  # each process has it whole, and the same
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = placed_value(jax.random.key_data(value), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
        return jax.make_array_from_callback(value.shape, sharding, np.asarray(value).__getitem__)
    return value if value.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(value)


def optimizer_shardings(
    optimizer: optax.GradientTransformation, adapter: Mapping[str, Any], where: Mapping[str, NamedSharding]
) -> Any:
    """The shardings of `optimizer.init(adapter)`: what has the shape of an array lies as that array, all else whole.

    where: the sharding of each array of `adapter`, as in `shardings(...).adapter`. For
    `jax.jit(optimizer.init, out_shardings=...)`, which would otherwise put everything on every device, and for a step.
    """
    whole = NamedSharding(next(iter(where.values())).mesh, PartitionSpec())
    abstract = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in adapter.items()}

    def follow(path: tuple[Any, ...], moment: Any) -> NamedSharding:
        # By the key it stands under: of groups with rules of their own (`optax.partition`) each state lacks some keys.
        key = next((entry.key for entry in path if getattr(entry, "key", None) in abstract), None)
        return where[key] if key is not None and moment.shape == abstract[key].shape else whole

    return jax.tree_util.tree_map_with_path(follow, jax.eval_shape(optimizer.init, abstract))
