"""`QuantizedLinear`: a linear layer that keeps codes and scales and dequantises where it multiplies.

Neither the forward nor the backward pass keeps a dequantised weight: what the backward pass needs of a layer are its
codes and scales. Inside a `Stack` one layer's weight exists at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jpeft import kinds, surgery
from jpeft.errors import JpeftError
from jpeft.platforms import platform_of
from jpeft.quant import fused
from jpeft.quant.formats import Format, QuantizedKernel
from jpeft.targets import resolve
from jpeft.variables import Quantized
from jpeft.wrapper import Wrapper

Layout: TypeAlias = tuple[tuple[str, NamedSharding], ...]  # of arrays of a kernel, by name


def _laid_out(kernel: QuantizedKernel, layout: Layout) -> QuantizedKernel:
    laid = {name: jax.lax.with_sharding_constraint(kernel.arrays[name], at) for name, at in layout}
    return dataclasses.replace(kernel, arrays={**kernel.arrays, **laid})


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def matmul(
    x: Float[Array, "*batch in"],
    kernel: QuantizedKernel,
    precision: Any = None,
    turned: bool = False,
    gathered: Layout = (),
) -> Float[Array, "*batch out"]:
    """x times the dequantised kernel, in x's dtype; with `turned`, times its transpose ([*batch, out] to [*batch, in]).

    gathered: how codes and scales lie on a mesh where they are dequantised. Differentiable in x, to any order in
    reverse mode. The kernel is frozen: it gets no gradient.
    """
    platform = platform_of(gathered[0][1] if gathered else None)
    rows = math.prod(x.shape[:-1])
    if platform == "tpu" and not (turned or gathered or precision) and fused.takes(rows, x.dtype, kernel):
        return fused.product(x, kernel)
    weight = _laid_out(kernel, gathered).weight(platform).astype(kernel.dtype).astype(x.dtype)  # [out, in]
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (0 if turned else 1,)), ((), ())), precision=precision)


def _forward(
    x: Array, kernel: QuantizedKernel, precision: Any, turned: bool, gathered: Layout
) -> tuple[Array, QuantizedKernel]:
    return matmul(x, kernel, precision, turned, gathered), kernel


def _backward(precision: Any, turned: bool, gathered: Layout, kernel: QuantizedKernel, dy: Array) -> tuple[Array, None]:
    # Dequantised once more: without the barrier the compiler of an accelerator would find, where layers are not in a
    # Stack, that it has been done already, and keep the result of the forward pass. (That of CPUs ignores barriers.)
    _, kernel = jax.lax.optimization_barrier((jax.lax.stop_gradient(dy), kernel))
    return matmul(dy, kernel, precision, not turned, gathered), None


matmul.defvjp(_forward, _backward)


class QuantizedLinear(kinds.Packed):
    """In the place of an `nnx.Linear` [in, out]: `y = x dequantised(codes, scales) + bias`.

    Its arrays are `Quantized` variables named as in `format`, with the layer axes in front; the bias stays as it was.
    weight_dtype: to which dequantised values are rounded, that of the kernel it was made from. dtype: of the product;
    None for what input and weight promote to, as in `nnx.Linear`.
    """

    stands_for: ClassVar[type[nnx.Module]] = nnx.Linear

    def __init__(self, kernel: QuantizedKernel, bias: nnx.Variable | None, *, dtype: Any = None, precision: Any = None):
        self.in_features, self.out_features = kernel.shape
        self.format = kernel.format
        self.weight_dtype = kernel.dtype
        self.arrays = tuple(sorted(kernel.arrays))
        for name in self.arrays:
            setattr(self, name, Quantized(kernel.arrays[name]))
        self.bias = nnx.data(bias)
        self.use_bias = bias is not None
        self.dtype = dtype
        self.precision = precision
        self.stored: Layout = ()
        self.gathered: Layout = ()

    def on_mesh(self, rows: NamedSharding, own: Mapping[str, PartitionSpec]) -> None:
        """Told by `jpeft.shard` how its variables lie: codes and scales are to be gathered, and not the weight.

        The compiler would dequantise each shard and gather the result, which is many times as large. What is cut along
        axes over which the rows of a batch are dealt out is gathered where it is used; along others it stays cut.
        """
        batch = set(rows.spec[0]) if rows.spec else set()
        lead = len(self.weight_shape()) - 2

        def kept(entry: Any) -> Any:
            axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
            return tuple(axis for axis in axes if axis not in batch) or None

        cut = {name: own[name][lead:] for name in self.arrays if not name.startswith("scale_")}
        cut.setdefault("scales", cut["codes"])  # of doubly quantised ones, `unfolded`
        self.stored = tuple((name, NamedSharding(rows.mesh, PartitionSpec(*spec))) for name, spec in cut.items())
        self.gathered = tuple(
            (name, NamedSharding(rows.mesh, PartitionSpec(*map(kept, spec)))) for name, spec in cut.items()
        )

    @property
    def quantized(self) -> QuantizedKernel:
        """The kernel in packed form."""
        arrays = {name: getattr(self, name).get_value() for name in self.arrays}
        return QuantizedKernel(arrays, self.format, (self.in_features, self.out_features), self.weight_dtype)

    def __call__(self, inputs: Float[Array, "*batch in"], out_sharding: Any = None) -> Float[Array, "*batch out"]:
        if out_sharding is not None:
            raise JpeftError("a QuantizedLinear takes no out_sharding; constrain its output instead")
        bias = None if self.bias is None else self.bias[...]
        dtype = self.dtype or jnp.result_type(inputs, jnp.dtype(self.weight_dtype), *([] if bias is None else [bias]))
        y = matmul(inputs.astype(dtype), self._unfolded(), self.precision, False, self.gathered)
        return y if bias is None else y + bias.astype(dtype)

    def _unfolded(self) -> QuantizedKernel:
        kernel = self.quantized
        if not self.stored or kernel.unfolded() is kernel:
            return kernel.unfolded()
        # The 8-bit groups of the scales run across the shards: as bytes all scales are small.
        whole = NamedSharding(self.stored[0][1].mesh, PartitionSpec())
        return _laid_out(_laid_out(kernel, (("scale_codes", whole),)).unfolded(), self.stored)

    def weight_shape(self) -> tuple[int, ...]:
        """Lead + [in, out]."""
        shape = (self.in_features, self.out_features)
        codes: tuple[int, ...] = getattr(self, "codes").shape  # noqa: B009
        return (*codes[: len(codes) - (2 if self.format.rowwise(shape) else 1)], *shape)

    def dense_weight(self, layers: tuple[int, ...] | None = None) -> Float[Array, "..."]:
        """The dequantised kernel in float32, rounded to `weight_dtype` as the forward pass rounds it."""
        kernel = self.quantized
        if layers is not None:
            kernel = jax.tree.map(lambda array: array[jnp.array(layers)], kernel)
        return kernel.dequantize().astype(jnp.float32)

    def plain(self) -> nnx.Linear:
        """An `nnx.Linear` with the dequantised kernel in `weight_dtype` and the same bias."""
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": jnp.dtype(self.weight_dtype)}
        rest: dict[str, Any] = {"use_bias": self.use_bias, "precision": self.precision}
        made: Any = nnx.eval_shape(
            lambda: nnx.Linear(self.in_features, self.out_features, **dtypes, **rest, rngs=nnx.Rngs(0))
        )
        made.kernel, made.bias = nnx.Param(self.quantized.dequantize()), nnx.data(self.bias)
        return made

    def storage(self) -> dict[str, Any]:
        """The format, without what says where it applies."""
        return self.format.to_dict()

    def packed_again(self, plain: nnx.Linear) -> QuantizedLinear:
        """The weight and bias of `plain` in this layer's format."""
        kernel = self.format.quantize(plain.kernel.get_value())
        return QuantizedLinear(kernel, plain.bias, dtype=self.dtype, precision=self.precision)


def quantize_layers(model: Any, form: Format) -> Any:
    """A copy of `model` with the linear layers that `form` targets quantised; see `Format.__call__`."""
    if not isinstance(model, nnx.Module):
        raise JpeftError(
            f"{type(form).__name__} quantises the linear layers of an nnx.Module, not a {type(model).__name__}"
        )
    chosen = targeted(model, form)
    return surgery.replace(model, {path: functools.partial(_quantized, form, name) for path, name in chosen.items()})


def targeted(model: nnx.Module, form: Format) -> dict[surgery.Path, str]:
    """Where the linear layers stand that `form` targets, under their wrappers, with their canonical paths."""
    name = type(form).__name__
    chosen = {}
    for node, _ in resolve(model, targets=form.targets, exclude=form.exclude, kinds=(nnx.Linear,), method=name):
        path, module = node.path, node.module
        while isinstance(module, Wrapper):
            path, module = (*path, "base"), module.base
        if isinstance(module, QuantizedLinear):
            raise JpeftError(f"{name}: {node.name!r} is quantised already ({module.format}); exclude it")
        own = (type(module).__call__, module.dot_general, module.promote_dtype, module.preferred_element_type)
        if own != (nnx.Linear.__call__, jax.lax.dot_general, promote_dtype, None):
            raise JpeftError(
                f"{name}: {node.name!r} ({type(module).__name__}) multiplies in a way of its own, which would be lost; "
                "exclude it"
            )
        chosen[path] = node.name
    return chosen


def _quantized(form: Format, where: str, linear: nnx.Linear) -> QuantizedLinear:
    try:
        kernel = form.quantize(linear.kernel.get_value())
    except JpeftError as error:
        raise JpeftError(f"{error} ({where or 'the model itself'!r})") from None
    return in_place_of(linear, kernel, form.compute_dtype)


def in_place_of(linear: nnx.Linear, kernel: QuantizedKernel, compute_dtype: str | None = None) -> QuantizedLinear:
    """The quantised layer with this kernel and the bias and settings of `linear`."""
    dtype = linear.dtype if compute_dtype is None else jnp.dtype(compute_dtype)
    return QuantizedLinear(kernel, linear.bias, dtype=dtype, precision=linear.precision)
