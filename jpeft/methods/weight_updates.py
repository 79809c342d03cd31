"""Other forms of a linear layer's update than LoRA's: few numbers that stand for a change of the whole weight.

    VeRA  Kopiczko et al. 2024, arXiv:2310.11454   two random projections for all layers, trained vectors between them
    LoHa  Nam et al. 2022, arXiv:2108.06098        the product, element by element, of two low-rank matrices (FedPara)
    LoKr  Yeh et al. 2024, arXiv:2309.14859        the Kronecker product of two small matrices (LyCORIS)
    OFT   Qiu et al. 2023, arXiv:2306.07280        the inputs turned by block-diagonal rotations

All of them work on `nnx.Linear` (quantised, too), start as the base and merge.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jpeft import kinds, surgery
from jpeft.dropout import Dropout
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.method import refuse_second
from jpeft.methods.targeted import Targeted, lead_of
from jpeft.paths import Node
from jpeft.targets import ALL_LINEAR, Layers
from jpeft.variables import AdapterBuffer, Trainable
from jpeft.wrapper import NotMergeable, Wrapper

_HIGHEST = jax.lax.Precision.HIGHEST


class LinearUpdate(Wrapper):
    """A linear layer with another weight. Subclasses say what becomes of it and how it is applied.

    Variables of one layer have no leading axes; inside a `Stack` all but those marked `shared` have the layer axis.
    """

    def __init__(self, base: Any, *, name: str, lead: tuple[int, ...], layers: Layers, dropout: float = 0.0):
        super().__init__(base, name=name, layers=layers)
        self.leading = len(lead)
        self.dropout = Dropout(float(dropout), lead)

    def __call__(self, x: Float[Array, "*batch in"], *args: Any, **kwargs: Any) -> Float[Array, "*batch out"]:
        y = self.base(x, *args, **kwargs)
        return y + self.update(self.dropout(x.astype(y.dtype))).astype(y.dtype)

    def update(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """What is added to the layer's output, in x's dtype."""
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    def changed(self, weight: Float[Array, "*lead in out"]) -> Float[Array, "*lead in out"]:
        """The weight of the covered layers, in float32, with the change."""
        raise NotImplementedError(f"{type(self).__name__} defines no changed")

    def fold(self, base: Any) -> nnx.Module:
        """`base` with the change in its weight: float32 arithmetic, cast last."""
        if type(base) is not nnx.Linear:
            raise NotMergeable(f"{type(base).__name__} under it has no plain weight to change")
        variable = kinds.weight(base)
        value = variable.get_value()
        rows = value if self.layers is None else value[jnp.array(self.layers)]
        made = self.changed(rows.astype(jnp.float32)).astype(value.dtype)
        whole = made if self.layers is None else value.at[jnp.array(self.layers)].set(made)
        setattr(base, kinds.KINDS[nnx.Linear][0], type(variable)(whole, **variable.get_metadata()))
        return base

    def _typed(self, x: Array, *variables: Any) -> tuple[Array, ...]:
        return tuple(variable[...].astype(x.dtype) for variable in variables)


class VeRAUpdate(LinearUpdate):
    """y + b * (d * (x down)) up. down [in, r], up [r, out]: `AdapterBuffer`, shared; d [r], b [out]: `Trainable`."""

    def __init__(self, base: Any, *, down: Array, up: Array, initial: float, **settings: Any):
        super().__init__(base, **settings)
        lead = settings["lead"]
        self.down, self.up = AdapterBuffer(down, shared=True), AdapterBuffer(up, shared=True)
        self.d = Trainable(jnp.full((*lead, down.shape[1]), initial, jnp.float32), group="vera")
        self.b = Trainable(jnp.zeros((*lead, up.shape[1])), group="vera")

    def update(self, x: Array) -> Array:
        down, up, d, b = self._typed(x, self.down, self.up, self.d, self.b)
        return ((x @ down * d) @ up) * b

    def changed(self, weight: Array) -> Array:
        down, up, d, b = (v.get_value() for v in (self.down, self.up, self.d, self.b))
        return weight + jnp.einsum("ir,...r,ro,...o->...io", down, d, up, b, precision=_HIGHEST)


class LoHaUpdate(LinearUpdate):
    """y + s x ((a1 b1) * (a2 b2)). a1, a2 [in, r], b1, b2 [r, out]: `Trainable`.

    The product element by element of two matrices of rank r is one matrix of rank r^2, whose factors are all products
    of a column of a1 with one of a2, and of a row of b1 with one of b2. With few of them the change is never formed.
    """

    def __init__(self, base: Any, *, key: jax.Array, rank: int, scale: float, **settings: Any):
        super().__init__(base, **settings)
        inputs, outputs = kinds.own_shape(base)
        shapes = {"a1": (inputs, rank), "b1": (rank, outputs), "a2": (inputs, rank), "b2": (rank, outputs)}
        # Torch's default for each factor as it is stored there; one of the four is zero.
        bounds = {"a1": 1 / math.sqrt(inputs), "b1": 1 / math.sqrt(rank), "a2": 0.0, "b2": 1 / math.sqrt(rank)}
        for own, value in _uniform(key, shapes, bounds, settings["lead"]).items():
            setattr(self, own, Trainable(value, group="loha"))
        self.scaling = scale

    def update(self, x: Array) -> Array:
        a1, b1, a2, b2 = self._typed(x, self.a1, self.b1, self.a2, self.b2)
        (inputs, rank), outputs = a1.shape, b1.shape[1]
        if rank**2 * (inputs + outputs) >= inputs * outputs:
            return x @ (self.scaling * (a1 @ b1) * (a2 @ b2))
        columns = (a1[:, :, None] * a2[:, None, :]).reshape(inputs, rank**2)
        rows = (b1[:, None, :] * b2[None, :, :]).reshape(rank**2, outputs)
        return (x @ columns) @ (self.scaling * rows)

    def changed(self, weight: Array) -> Array:
        a1, b1, a2, b2 = (vars(self)[name].get_value() for name in ("a1", "b1", "a2", "b2"))
        first, second = jnp.matmul(a1, b1, precision=_HIGHEST), jnp.matmul(a2, b2, precision=_HIGHEST)
        return weight + self.scaling * first * second


class LoKrUpdate(LinearUpdate):
    """y + s x (w1 kron w2). w1 [i1, o1]; w2 [i2, o2], or its factors a [i2, r] and b [r, o2]: `Trainable`."""

    def __init__(self, base: Any, *, key: jax.Array, rank: int, scale: float, factor: int, **settings: Any):
        super().__init__(base, **settings)
        (i1, i2), (o1, o2) = (split(size, factor) for size in kinds.own_shape(base))
        shapes, bounds = {"w1": (i1, o1)}, {"w1": 0.0}
        if rank < max(i2, o2) / 2:
            shapes |= {"a": (i2, rank), "b": (rank, o2)}
            bounds |= {"a": 1 / math.sqrt(i2), "b": 1 / math.sqrt(rank)}
        else:
            shapes["w2"], bounds["w2"] = (i2, o2), 1 / math.sqrt(i2)
        for own, value in _uniform(key, shapes, bounds, settings["lead"]).items():
            setattr(self, own, Trainable(value, group="lokr"))
        self.parts, self.sizes, self.scaling = tuple(shapes), ((i1, i2), (o1, o2)), scale

    def update(self, x: Array) -> Array:
        (i1, i2), (o1, o2) = self.sizes
        own = dict(zip(self.parts, self._typed(x, *(vars(self)[part] for part in self.parts)), strict=True))
        split_x = x.reshape(*x.shape[:-1], i1, i2)
        inner = split_x @ own["w2"] if "w2" in own else split_x @ own["a"] @ own["b"]
        made = jnp.einsum("...iq,ip->...pq", inner, own["w1"])
        return self.scaling * made.reshape(*x.shape[:-1], o1 * o2)

    def changed(self, weight: Array) -> Array:
        own = {part: vars(self)[part].get_value() for part in self.parts}
        second = own["w2"] if "w2" in own else jnp.matmul(own["a"], own["b"], precision=_HIGHEST)
        return weight + self.scaling * jnp.einsum("...ip,...jq->...ijpq", own["w1"], second).reshape(weight.shape)


class OFTUpdate(LinearUpdate):
    """The layer at x R. skew [blocks, b (b - 1) / 2]: `Trainable`, upper triangles of the skew-symmetric blocks Q.

    R = I + 2 Q + ... + 2 Q^(n-2) + Q^(n-1), the first n terms of the Cayley transform (I + Q)(I - Q)^-1; or, with no
    terms, the transform itself, of -Q.
    """

    def __init__(self, base: Any, *, block: int, terms: int | None, **settings: Any):
        super().__init__(base, **settings)
        inputs = kinds.own_shape(base)[0]
        if inputs % block:
            raise JpeftError(f"OFT: block_size={block} does not divide the {inputs} inputs of this layer")
        self.block, self.terms = block, terms
        count = block * (block - 1) // 2
        self.skew = Trainable(jnp.zeros((*settings["lead"], inputs // block, count)), group="oft")

    def __call__(self, x: Float[Array, "*batch in"], *args: Any, **kwargs: Any) -> Float[Array, "*batch out"]:
        turn = self._rotations(self.skew[...]).astype(x.dtype)
        blocks = x.reshape(*x.shape[:-1], -1, self.block)
        return self.base(jnp.einsum("...kb,kbc->...kc", blocks, turn).reshape(x.shape), *args, **kwargs)

    def _rotations(self, skew: Float[Array, "*lead blocks n"]) -> Float[Array, "*lead blocks b b"]:
        rows, columns = np.triu_indices(self.block, 1)
        upper = jnp.zeros((*skew.shape[:-1], self.block, self.block)).at[..., rows, columns].set(skew)
        q, eye = upper - upper.swapaxes(-1, -2), jnp.eye(self.block)
        if self.terms is None:  # (I - Q)(I + Q)^-1, by its transpose
            return jnp.linalg.solve((eye + q).swapaxes(-1, -2), (eye - q).swapaxes(-1, -2)).swapaxes(-1, -2)
        made, power = eye + 2 * q, q
        for _ in range(self.terms - 3):
            power = jnp.matmul(power, q, precision=_HIGHEST)
            made = made + 2 * power
        return made + jnp.matmul(power, q, precision=_HIGHEST)

    def changed(self, weight: Array) -> Array:
        turn = self._rotations(self.skew.get_value())
        blocks = weight.reshape(*turn.shape[:-2], self.block, -1)
        return jnp.matmul(turn, blocks, precision=_HIGHEST).reshape(weight.shape)


def _uniform(
    key: jax.Array, shapes: Mapping[str, tuple[int, ...]], bounds: Mapping[str, float], lead: tuple[int, ...]
) -> dict[str, Array]:
    """Values uniform within each bound, for every key of `key`, [*lead]."""

    def draw(key: jax.Array) -> dict[str, Array]:
        keys = jax.random.split(key, len(shapes))
        return {
            own: jax.random.uniform(one, shape, minval=-bounds[own], maxval=bounds[own])
            if bounds[own]
            else jnp.zeros(shape)
            for one, (own, shape) in zip(keys, shapes.items(), strict=True)
        }

    for _ in lead:
        draw = jax.vmap(draw)
    return draw(key)


def split(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `size`, the first not above the second: with `factor` if that divides it, else near its root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor < 1 else factor
    first = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= most)
    return first, size // first


class _Updates(Targeted):
    """What the methods of this page share."""

    wraps: ClassVar[tuple[type[nnx.Module], ...]] = (nnx.Linear,)

    def _settings(self, node: Node, layers: Layers) -> dict[str, Any]:
        lead = lead_of(node, layers)
        return {"name": self.name, "lead": lead, "layers": layers, "dropout": getattr(self, "dropout", 0.0)}


@dataclasses.dataclass(frozen=True)
class VeRA(_Updates):
    """VeRA (arXiv:2310.11454): `y + b * (d * (x A)) B`, A and B random, frozen and the same for all layers.

    rank: of A and B. initial: what d starts from; b starts at zero. Learning rates are about ten times LoRA's.
    A and B are saved with the adapter. name: `<module path>/<name>/d` and `/b`, and the projections `/down`, `/up`.
    """

    kind: ClassVar[str] = "vera"

    rank: int = 256
    initial: float = 0.1
    dropout: float = 0.0
    targets: Any = ALL_LINEAR
    exclude: Any = ()
    layers: Any = None
    name: str = "vera"

    def __post_init__(self) -> None:
        self.settle_targets()
        fields.settle(
            self, rank=fields.whole(self.rank), initial=fields.real(self.initial), dropout=fields.real(self.dropout)
        )
        fields.check_whole(self, "rank", self.rank, least=1)
        fields.check_finite(self, "initial", self.initial)
        fields.check_rate(self, "dropout", self.dropout)

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        found = self.resolve(model)
        sizes = [kinds.own_shape(node.module) for node, _ in found]
        inputs, outputs = (max(size[axis] for size in sizes) for axis in (0, 1))
        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(self.name.encode())))

        def drawn(key: jax.Array, shape: tuple[int, int]) -> Array:
            bound = math.sqrt(6 / shape[0])
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        down, up = drawn(keys[0], (inputs, self.rank)), drawn(keys[1], (self.rank, outputs))
        replacements: dict[surgery.Path, Callable[[Any], Any]] = {}
        for node, layers in found:
            refuse_second(node.module, self.name, node.name)
            replacements[node.path] = self._placed(node, layers, key, down, up)
        return surgery.replace(model, replacements)

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array, *projections: Array) -> VeRAUpdate:
        (down, up), (inputs, outputs) = projections, kinds.own_shape(base)
        cut = {"down": down[:inputs], "up": up[:, :outputs]}
        return VeRAUpdate(base, **cut, initial=self.initial, **self._settings(node, layers))


@dataclasses.dataclass(frozen=True)
class LoHa(_Updates):
    """LoHa (arXiv:2108.06098): `W + alpha / rank * (A1 B1) * (A2 B2)`, element by element: of rank up to rank^2.

    A step costs what LoRA of rank^2 would; where rank^2 (in + out) is not below in * out, it makes the change of one
    layer's weight in full. name: `<module path>/<name>/a1`, `/b1`, `/a2`, `/b2`.
    """

    kind: ClassVar[str] = "loha"

    rank: int = 8
    alpha: float | None = None
    targets: Any = ALL_LINEAR
    exclude: Any = ()
    layers: Any = None
    name: str = "loha"

    def __post_init__(self) -> None:
        self.settle_targets()
        fields.settle(self, rank=fields.whole(self.rank), alpha=fields.real(self.alpha))
        fields.check_whole(self, "rank", self.rank, least=1)
        if self.alpha is not None:
            fields.check_finite(self, "alpha", self.alpha)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return float(self.rank if self.alpha is None else self.alpha) / self.rank

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> LinearUpdate:
        keys = node.keys(key, self.name, lead_of(node, layers), layers)
        return LoHaUpdate(base, key=keys, rank=self.rank, scale=self.scale, **self._settings(node, layers))


@dataclasses.dataclass(frozen=True)
class LoKr(LoHa):
    """LoKr (arXiv:2309.14859): `W + alpha / rank * (w1 kron w2)`; the product is never formed.

    factor: of in and out features, the size of w1; -1 for the divisor nearest to the root. rank: of w2, where that
    saves anything. name: `<module path>/<name>/w1`, and `/w2` or `/a`, `/b`.
    """

    kind: ClassVar[str] = "lokr"

    factor: int = -1
    name: str = "lokr"

    def __post_init__(self) -> None:
        super().__post_init__()
        fields.settle(self, factor=fields.whole(self.factor))
        if self.factor != -1:
            fields.check_whole(self, "factor", self.factor, least=1)

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> LinearUpdate:
        keys, rest = node.keys(key, self.name, lead_of(node, layers), layers), self._settings(node, layers)
        return LoKrUpdate(base, key=keys, rank=self.rank, scale=self.scale, factor=self.factor, **rest)


@dataclasses.dataclass(frozen=True)
class OFT(_Updates):
    """OFT (arXiv:2306.07280, with the terms of OFTv2, arXiv:2506.19847): inputs turned block by block.

    block_size: features that are turned together; it has to divide the layer's inputs. terms: of the Cayley transform's
    series, at least 3; None for the transform itself, whose rotation is the other way round, as in the peer's files.
    name: `<module path>/<name>/skew`.
    """

    kind: ClassVar[str] = "oft"

    block_size: int = 32
    terms: int | None = 5
    targets: Any = ALL_LINEAR
    exclude: Any = ()
    layers: Any = None
    name: str = "oft"

    def __post_init__(self) -> None:
        self.settle_targets()
        fields.settle(self, block_size=fields.whole(self.block_size), terms=fields.whole(self.terms))
        fields.check_whole(self, "block_size", self.block_size, least=2)
        if self.terms is not None:
            fields.check_whole(self, "terms", self.terms, least=3)

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> LinearUpdate:
        return OFTUpdate(base, block=self.block_size, terms=self.terms, **self._settings(node, layers))
