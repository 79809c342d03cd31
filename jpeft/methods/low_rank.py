"""The low-rank update on each kind of layer: how it is applied, and the change of the weight it stands for.

Shapes are of one layer; inside a `Stack` every variable has the layer axis in front.

| kind          | weight                     | a                     | b               |
|---------------|----------------------------|-----------------------|-----------------|
| Linear        | [in, out]                  | [in, r]               | [r, out]        |
| LinearGeneral | [*in, *out]                | [*in, r]              | [r, *out]       |
| Einsum        | axes by the einsum string  | [batch, contracted, r]| [batch, r, kept]|
| Conv          | [*window, in / groups, out]| [*window, in / groups, r] | [r / groups, out] |
| Embed         | [vocabulary, features]     | [vocabulary, r]       | [r, features]   |
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from jpeft import kinds
from jpeft.dropout import Dropout
from jpeft.errors import JpeftError
from jpeft.methods.starts import FROM_THE_WEIGHT, from_noise, from_weight
from jpeft.variables import AdapterBuffer, Trainable
from jpeft.wrapper import NotMergeable, Wrapper, innermost, of_tasks

if TYPE_CHECKING:
    from jpeft.methods.adalora import AdaLoRA
    from jpeft.methods.lora import LoRA

_HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_vjp
def low_rank(
    x: Float[Array, "*batch in"], a: Float[Array, "in r"], b: Float[Array, "r out"], scale: Float[Array, "r"]
) -> Float[Array, "*batch out"]:
    """((x a) * scale) b, with a backward pass that contracts over all tokens at once.

    Left to itself, autodiff transposes the large output cotangent to form b's gradient; folding batch and time into one
    contracted axis avoids that copy.
    """
    return _plain(x, a, b, scale)


def _plain(x: Array, a: Array, b: Array, scale: Array) -> Array:
    return ((x @ a) * scale) @ b


def _forward(x: Array, a: Array, b: Array, scale: Array) -> tuple[Array, tuple[Array, ...]]:
    h = x @ a
    return (h * scale) @ b, (x, h, a, b, scale)


def _backward(residuals: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    x, h, a, b, scale = residuals
    rows = (((0,), (0,)), ((), ()))
    flat_x, flat_h, flat_dy = (t.reshape(-1, t.shape[-1]) for t in (x, h, dy))
    dhs = jax.lax.dot_general(flat_dy, b, (((1,), (1,)), ((), ())))
    dh = dhs * scale
    # [r, in] and then turned: the long axis stays contiguous in the product.
    da = jax.lax.dot_general(dh, flat_x, rows, preferred_element_type=jnp.float32).T
    db = jax.lax.dot_general(flat_h * scale, flat_dy, rows, preferred_element_type=jnp.float32)
    dx = jax.lax.dot_general(dh, a, (((1,), (1,)), ((), ()))).reshape(x.shape)
    dscale = jnp.sum(dhs * flat_h, axis=0)
    return dx.astype(x.dtype), da.astype(a.dtype), db.astype(b.dtype), dscale.astype(scale.dtype)


low_rank.defvjp(_forward, _backward)


@jax.custom_vjp
def low_rank_fixed(x: Array, a: Array, b: Array, scale: Array) -> Array:
    """`low_rank` with an `a` that does not train: the backward pass needs x a, which is small, and not x."""
    return _plain(x, a, b, scale)


def _forward_fixed(x: Array, a: Array, b: Array, scale: Array) -> tuple[Array, tuple[Array, ...]]:
    h = x @ a
    return (h * scale) @ b, (h, a, b, scale)


def _backward_fixed(residuals: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    h, a, b, scale = residuals
    flat_h, flat_dy = (t.reshape(-1, t.shape[-1]) for t in (h, dy))
    dhs = jax.lax.dot_general(flat_dy, b, (((1,), (1,)), ((), ())))
    db = jax.lax.dot_general(flat_h * scale, flat_dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    dx = jax.lax.dot_general(dhs * scale, a, (((1,), (1,)), ((), ()))).reshape(*h.shape[:-1], a.shape[0])
    return dx.astype(h.dtype), None, db.astype(b.dtype), jnp.sum(dhs * flat_h, axis=0).astype(scale.dtype)


low_rank_fixed.defvjp(_forward_fixed, _backward_fixed)


def product(x: Array, a: Array, b: Array, scale: Array, *, fixed: bool = False) -> Array:
    """`low_rank`, or its plain form where types of arrays name mesh axes, for which autodiff knows the collectives.

    fixed: whether `a` does not train.
    """
    typed = jax.typeof(x)
    named = any(kind != AxisType.Auto for kind in typed.sharding.mesh.axis_types)
    if named or getattr(typed, "vma", None):
        return _plain(x, a, b, scale)
    return (low_rank_fixed if fixed else low_rank)(x, a, b, scale)


class LoRAWrapper(Wrapper):
    """A layer with a low-rank update; subclasses say how for one kind of layer.

    a, b: `Trainable`, lead + the shapes of the module's table (a is an
    `AdapterBuffer` where the method keeps it fixed).
    scale: `AdapterBuffer`, lead + [r]: alpha / rank for the slots in use, 0 for those that only pad a smaller rank.
    a0, b0: `AdapterBuffer`, what a and b started as, where they start from the weight (`jpeft.methods.starts`).
    """

    takes_many = True

    def __init__(
        self,
        base: nnx.Module,
        *,
        method: LoRA | AdaLoRA,
        rank: int,
        lead: tuple[int, ...],
        keys: jax.Array,
        scale: jax.Array,
        layers: tuple[int, ...] | None,
    ):
        super().__init__(base, name=method.name, layers=layers)
        shape_a, shape_b = self.shapes(rank)

        def start(key: jax.Array) -> tuple[Array, Array]:
            return self.start(key, shape_a, shape_b, method.init)

        for _ in lead:
            start = jax.vmap(start)
        from_weight = method.init in FROM_THE_WEIGHT
        a, b = self._from_weight(scale, shape_a, shape_b, method.init) if from_weight else start(keys)
        a, b = a.astype(method.dtype), b.astype(method.dtype)
        self.trains_a = method.trains_a
        self.a = Trainable(a, group="lora_a") if self.trains_a else AdapterBuffer(a)
        self.b = Trainable(b, group="lora_b")
        self.a0, self.b0 = (nnx.data(AdapterBuffer(jnp.array(v)) if from_weight else None) for v in (a, b))
        self.scale = AdapterBuffer(scale)
        self.dropout = Dropout(float(method.dropout), lead)
        self.leading = len(lead)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a and b for one layer."""
        raise NotImplementedError(f"{type(self).__name__} defines no shapes")

    @staticmethod
    def delta(a: Array, b: Array, spec: Any) -> Array:
        """The change of one layer's weight, in float32; `a` is scaled already. spec: what `spec` returned."""
        raise NotImplementedError("a LoRAWrapper defines delta")

    def spec(self) -> Hashable:
        """What `delta` depends on beside its arrays."""
        return None

    @staticmethod
    def start(
        key: jax.Array, shape_a: tuple[int, ...], shape_b: tuple[int, ...], init: str
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Initial a and b of one layer, in float32."""
        return from_noise(key, shape_a, shape_b, init)

    def _from_weight(
        self, scale: Array, shape_a: tuple[int, ...], shape_b: tuple[int, ...], init: str
    ) -> tuple[Array, Array]:
        if not isinstance(self, LoRALinear | LoRALinearGeneral | LoRAEmbed):
            kind = type(innermost(self.base)).__name__
            raise JpeftError(f"init={init!r} starts from the weight of linear and embedding layers, not of a {kind}")
        lead, rank = scale.shape[:-1], shape_a[-1]
        sizes = math.prod(shape_a[:-1]), math.prod(shape_b[1:])
        if rank > min(sizes):
            raise JpeftError(f"init={init!r}: rank {rank} is more than the {min(sizes)} components of this weight")
        weight = kinds.dense_weight(self.base, self.layers).reshape(*lead, *sizes)
        a, b = from_weight(weight, scale, init)
        return a.reshape(*lead, *shape_a), b.reshape(*lead, *shape_b)

    def factors(self) -> tuple[Array, Array, Array]:
        """a, b and scale of the whole update, the start taken off."""
        a, b, scale = self.a[...], self.b[...], self.scale[...]
        if self.a0 is None or self.b0 is None:
            return a, b, scale
        axis = -len(self.shapes(1)[1])  # the rank's axis in b
        return (
            jnp.concatenate([a, self.a0[...]], axis=-1),
            jnp.concatenate([b, self.b0[...]], axis=axis),
            jnp.concatenate([scale, -scale], axis=-1),
        )

    def factors_in(self, dtype: Any) -> tuple[Array, Array, Array]:
        """The factors in the dtype that the layer computes in."""
        a, b, scale = (factor.astype(dtype) for factor in self.factors())
        return a, b, scale

    def variable_axes(self) -> Mapping[str, tuple[str | None, ...]]:
        return {"a": ("in", None), "b": (None, "out"), "a0": ("in", None), "b0": (None, "out")}

    def column_gain(self) -> Array | None:
        """What the columns of weight and update together are multiplied by, lead + [*out]; None for nothing."""
        return None

    def product(self, x: Array, a: Array, b: Array, scale: Array) -> Array:
        """((x a) * scale) b."""
        return product(x, a, b, scale, fixed=not self.trains_a)

    def updated(self, y: Array, update: Callable[..., Array], x: Array, *, by_row: bool = True) -> Array:
        """y + update(x, a, b, scale), all in y's dtype; with several adapters, each row of the batch uses its own.

        by_row: whether the first axis of x and y is the batch, which then has to be.
        """
        a, b, scale = self.factors_in(y.dtype)
        if self.adapter_ids is None:
            return y + update(x, a, b, scale).reshape(y.shape)
        if not by_row:
            kind, shape = type(innermost(self.base)).__name__, list(kinds.own_shape(self.base))
            raise JpeftError(
                f"adapter_ids: a {kind} with weight {shape} works on the batch axis itself, so its rows cannot have "
                "adapters of their own; exclude it from the targets"
            )
        ids = self.tasks_of(y)
        own = jnp.where(ids[:, None] < 0, 0, of_tasks(scale, ids))  # the base alone is an update of scale 0
        # Gathered here, inside the scan over layers: the base's product stays one product over the whole batch.
        mine = of_tasks(a, ids), of_tasks(b, ids), own
        rows = jax.vmap(lambda x, a, b, scale: update(x[None], a, b, scale)[0])(x, *mine)
        return y + rows.reshape(y.shape)

    def fold(self, base: nnx.Module) -> nnx.Module:
        """`base` with the update added to its weight: float32 arithmetic, one layer at a time, cast last."""
        if self.adapter_ids is not None:
            raise NotMergeable(
                "it holds several adapters, and one weight can hold only one; merge the tasks one by one"
            )
        kind = kinds.kind_of(base)
        if kind is not None and type(base).__call__ is not kind.__call__:
            raise NotMergeable(
                f"{type(base).__name__} computes something else than the {kind.__name__} it derives from"
            )
        if kind is None or isinstance(base, Wrapper):
            raise NotMergeable(f"{type(base).__name__} under it has no plain weight to add the update to")
        weight = kinds.weight(base)
        value = weight.get_value()

        chosen = value if self.layers is None else value[jnp.array(self.layers)]
        gain = self.column_gain()
        made = _added(type(self), self.spec(), len(kinds.lead(base)), chosen, *self.factors(), gain)
        whole_made = made if self.layers is None else value.at[jnp.array(self.layers)].set(made)
        # A new Variable: the old one may be shared with another module, which has no adapter or another one.
        setattr(base, kinds.KINDS[kind][0], weight.replace(whole_made))
        return base


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _added(
    form: type[LoRAWrapper],
    spec: Hashable,
    lead: int,
    weight: Array,
    a: Array,
    b: Array,
    scale: Array,
    gain: Array | None,
) -> Array:
    def add(rows: tuple[Array, Array, Array, Array, Array | None]) -> Array:
        weight, a, b, scale, gain = rows
        delta = form.delta(a.astype(jnp.float32) * scale, b.astype(jnp.float32), spec)
        made = weight.astype(jnp.float32) + delta
        return (made if gain is None else made * gain).astype(weight.dtype)

    for _ in range(lead):  # one layer after the other: the float32 temporaries are of one layer, not of the stack
        add = functools.partial(jax.lax.map, add)
    return add((weight, a, b, scale, gain))


class LoRALinear(LoRAWrapper):
    """On `nnx.Linear`."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features_in, features_out = kinds.own_shape(self.base)
        return (features_in, rank), (rank, features_out)

    def __call__(self, x: Float[Array, "*batch in"], *args: Any, **kwargs: Any) -> Float[Array, "*batch out"]:
        y = self.base(x, *args, **kwargs)
        return self.updated(y, self.update, self.dropout(x.astype(y.dtype)))

    def update(self, x: Array, a: Array, b: Array, scale: Array) -> Array:
        """The update of x."""
        return self.product(x, a, b, scale)

    @staticmethod
    def delta(a: Array, b: Array, spec: Any) -> Array:
        return jnp.matmul(a, b, precision=_HIGHEST)


class LoRALinearGeneral(LoRAWrapper):
    """On `nnx.LinearGeneral`, whose input and output may each be several axes."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        base = innermost(self.base)
        if base.batch_axis:
            raise JpeftError(
                f"LoRA: LinearGeneral with batch_axis={dict(base.batch_axis)} cannot be adapted; exclude it"
            )
        return (*base.in_features, rank), (rank, *base.out_features)

    def __call__(self, x: Float[Array, "..."], *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        y = self.base(x, *args, **kwargs)
        by_row = 0 not in {axis % x.ndim for axis in innermost(self.base).axis}
        return self.updated(y, self.update, self.contracted(self.dropout(x.astype(y.dtype))), by_row=by_row)

    def contracted(self, x: Array) -> Array:
        """x with the axes that the layer contracts last, as one."""
        axes = sorted(axis % x.ndim for axis in innermost(self.base).axis)  # Flax contracts them in this order
        rest = [axis for axis in range(x.ndim) if axis not in axes]
        moved = jnp.transpose(x, (*rest, *axes))
        return moved.reshape(*moved.shape[: len(rest)], -1)

    def update(self, x: Array, a: Array, b: Array, scale: Array) -> Array:
        """The update of `contracted` input, its output axes as one."""
        rank = scale.shape[-1]
        return self.product(x, a.reshape(-1, rank), b.reshape(rank, -1), scale)

    @staticmethod
    def delta(a: Array, b: Array, spec: Any) -> Array:
        return jnp.tensordot(a, b, axes=1, precision=_HIGHEST)


class LoRAEinsum(LoRAWrapper):
    """On `nnx.Einsum`: the contracted axes go into a, the axes the kernel adds go into b, shared axes into both."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        base = innermost(self.base)
        _, kernel, _ = _einsum_axes(base.einsum_str)
        size = dict(zip(kernel, kinds.own_shape(base), strict=True))
        size["rank"] = rank
        _, axes_a, axes_b = self._equations(base.einsum_str)
        return tuple(size[axis] for axis in axes_a), tuple(size[axis] for axis in axes_b)

    def _equations(self, einsum: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The axes of the intermediate, of a and of b; the rank is the axis called `rank`."""
        inputs, kernel, outputs = _einsum_axes(einsum)
        both = tuple(axis for axis in kernel if axis in inputs and axis in outputs)
        contracted = tuple(axis for axis in kernel if axis in inputs and axis not in outputs)
        added = tuple(axis for axis in kernel if axis not in inputs and axis in outputs)
        if len(both) + len(contracted) + len(added) != len(kernel) or not contracted:
            raise JpeftError(f"LoRA: Einsum {einsum!r} contracts no axis of its input with the kernel; exclude it")
        middle = (*(axis for axis in outputs if axis not in added), "rank")
        return middle, (*both, *contracted, "rank"), (*both, "rank", *added)

    def __call__(self, x: Float[Array, "..."], einsum_str: str | None = None, **kwargs: Any) -> Float[Array, "..."]:
        y = self.base(x, einsum_str, **kwargs)
        einsum = innermost(self.base).einsum_str
        if einsum_str is not None and einsum_str.replace(" ", "") != einsum:
            raise JpeftError(
                f"LoRA: an Einsum made as {einsum!r} is called as {einsum_str!r}; exclude it from the targets"
            )
        inputs, _, outputs = _einsum_axes(einsum)
        middle, axes_a, axes_b = self._equations(einsum)

        def update(x: Array, a: Array, b: Array, scale: Array) -> Array:
            h = jnp.einsum(_equation(inputs, axes_a, middle), x, a) * scale
            return jnp.einsum(_equation(middle, axes_b, outputs), h, b)

        by_row = inputs[0] == outputs[0] and inputs[0] not in _einsum_axes(einsum)[1]
        return self.updated(y, update, self.dropout(x.astype(y.dtype)), by_row=by_row)

    def spec(self) -> str:
        einsum = innermost(self.base).einsum_str
        _, axes_a, axes_b = self._equations(einsum)
        return _equation(axes_a, axes_b, _einsum_axes(einsum)[1])

    @staticmethod
    def delta(a: Array, b: Array, spec: str) -> Array:
        return jnp.einsum(spec, a, b, precision=_HIGHEST)


def _einsum_axes(einsum: str | None) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    if not einsum:
        raise JpeftError("LoRA: an Einsum that gets its string at call time cannot be adapted; exclude it")
    operands, output = einsum.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    if "." in kernel:
        raise JpeftError(f"LoRA: Einsum {einsum!r} has an ellipsis in its kernel and cannot be adapted; exclude it")
    axes = [tuple(part.replace("...", ".")) for part in (inputs, kernel, output)]
    return axes[0], axes[1], axes[2]


def _equation(left: tuple[str, ...], right: tuple[str, ...], out: tuple[str, ...]) -> str:
    used = {axis for axis in (*left, *right, *out) if len(axis) == 1}
    free = next(letter for letter in "rzyxwvutsqponmlkjihgfedcba" if letter not in used)

    def written(axes: tuple[str, ...]) -> str:
        return "".join("..." if axis == "." else free if axis == "rank" else axis for axis in axes)

    return f"{written(left)},{written(right)}->{written(out)}"


class LoRAConv(LoRAWrapper):
    """On `nnx.Conv`: a convolution like the base's to r channels, then a 1x1 convolution; both grouped as the base."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        groups = innermost(self.base).feature_group_count
        if innermost(self.base).mask is not None:
            raise JpeftError("LoRA: a convolution with a mask cannot be adapted; exclude it from the targets")
        if rank % groups:
            raise JpeftError(f"LoRA: rank={rank} is no multiple of the convolution's feature_group_count={groups}")
        *window, features_in, features_out = kinds.own_shape(self.base)
        return (*window, features_in, rank), (rank // groups, features_out)

    def __call__(self, x: Float[Array, "..."], *args: Any, **kwargs: Any) -> Float[Array, "..."]:
        y = self.base(x, *args, **kwargs)

        def update(x: Array, a: Array, b: Array, scale: Array) -> Array:
            # The base's own code with another kernel: padding modes, strides and dilations stay exactly its own.
            down = nnx.clone(innermost(self.base))
            down.kernel, down.bias, down.use_bias = nnx.Variable(a), None, False
            down.out_features = a.shape[-1]
            h = down(x) * scale
            groups = down.feature_group_count
            made = jnp.einsum(
                "...gr,rgo->...go", h.reshape(*h.shape[:-1], groups, -1), b.reshape(b.shape[0], groups, -1)
            )
            return made.reshape(*h.shape[:-1], -1)

        return self.updated(y, update, self.dropout(x.astype(y.dtype)))

    def spec(self) -> int:
        return innermost(self.base).feature_group_count

    @staticmethod
    def delta(a: Array, b: Array, spec: int) -> Array:
        split_a = a.reshape(*a.shape[:-1], spec, -1)
        split_b = b.reshape(b.shape[0], spec, -1)
        made = jnp.einsum("...gr,rgo->...go", split_a, split_b, precision=_HIGHEST)
        return made.reshape(*a.shape[:-1], -1)


class LoRAEmbed(LoRAWrapper):
    """On `nnx.Embed`, looked up and, for a tied head, attended to: the same update serves both."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        vocabulary, features = kinds.own_shape(self.base)
        return (vocabulary, rank), (rank, features)

    @staticmethod
    def start(
        key: jax.Array, shape_a: tuple[int, ...], shape_b: tuple[int, ...], init: str
    ) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        return jnp.zeros(shape_a), jax.random.normal(key, shape_b)

    def __call__(self, ids: Int[Array, "..."], **kwargs: Any) -> Float[Array, "... features"]:
        y = self.base(ids, **kwargs)
        if innermost(self.base).num_embeddings == 1:
            ids = jnp.zeros_like(ids)  # Flax takes the one row whatever the id
        return self.updated(y, lambda ids, a, b, scale: (jnp.take(a, ids, axis=0) * scale) @ b, ids)

    def attend(self, query: Float[Array, "... features"], **kwargs: Any) -> Float[Array, "... vocabulary"]:
        """Inner products with the adapted embedding, as `nnx.Embed.attend`."""
        y = self.base.attend(query, **kwargs)
        return self.updated(y, lambda x, a, b, scale: product(x, b.T, a.T, scale), query.astype(y.dtype))

    @staticmethod
    def delta(a: Array, b: Array, spec: Any) -> Array:
        return jnp.matmul(a, b, precision=_HIGHEST)


FORMS: dict[type[nnx.Module], type[LoRAWrapper]] = {
    nnx.Linear: LoRALinear,
    nnx.LinearGeneral: LoRALinearGeneral,
    nnx.Einsum: LoRAEinsum,
    nnx.Conv: LoRAConv,
    nnx.Embed: LoRAEmbed,
}
