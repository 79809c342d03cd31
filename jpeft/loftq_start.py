"""`loftq`: a quantised base whose update starts as what quantisation loses. Li et al. 2023, arXiv:2310.08659."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jpeft import kinds, paths, surgery
from jpeft.errors import JpeftError
from jpeft.methods.dora import DoRA
from jpeft.methods.lora import LoRA
from jpeft.methods.low_rank import LoRALinear
from jpeft.quant.formats import Format, QuantizedKernel
from jpeft.quant.initialization import principal
from jpeft.quant.linear import QuantizedLinear, in_place_of, targeted
from jpeft.wrapper import Wrapper, innermost


def loftq(
    model: nnx.Module,
    method: LoRA,
    form: Format | nnx.Module,
    *,
    iterations: int = 1,
    rngs: nnx.Rngs | jax.Array | int,
) -> Any:
    """`model` quantised, with `method` on it, whose update starts as the best one for what quantisation loses.

    model: in full precision; a quantised one no longer has what LoftQ needs. method: a `LoRA`, `LoRAPlus` or `LoRAFA`;
    layers that it adapts and `form` leaves alone start as always. form: the format, such as `jpeft.NF4()`, or the same
    model quantised already (from a file), whose codes then stay.
    iterations: of algorithm 1 of the paper. With 1 the base is what `form(model)` makes, and the adapter fits any model
    quantised so. Further ones quantise the weight less the update again: closer, but a base of its own, which is to be
    kept with its adapter (`jpeft.strip(made)`).

    The sum of base and update is taken in float32 from the values that the forward pass multiplies with. In the
    configuration of the result, `init` is the default: a saved adapter loads without the full weights.
    Raises JpeftError for other methods, a model that is quantised, and where no layer is both adapted and quantised.
    """
    _check(method, form, iterations)
    for node in paths.nodes(model):
        if isinstance(innermost(node.module), kinds.Packed):
            raise JpeftError(
                f"loftq: {node.name!r} is quantised already, so what quantisation lost is unknown; give the model in "
                "full precision (load it without quantize=), and the quantised one as form="
            )
    plain = dataclasses.replace(method, init="kaiming")
    if isinstance(form, Format):
        adapted: Any = plain(model, rngs=rngs)
        places: dict[surgery.Path, Format | None] = dict.fromkeys(targeted(adapted, form), form)
    else:
        adapted = plain(form, rngs=rngs)
        packed = [path for path, module in surgery.modules(adapted) if isinstance(module, QuantizedLinear)]
        places = dict.fromkeys(packed, None)
    weights = {node.name: node.module for node in paths.nodes(model)}
    replacements: dict[surgery.Path, Any] = {}
    found = False
    for path, own in places.items():
        above = _wrapper_above(adapted, path, plain.name)
        if above is None:
            if own is not None:
                replacements[path] = lambda linear, own=own: in_place_of(
                    linear, own.quantize(linear.kernel.get_value()), own.compute_dtype
                )
            continue
        found = True
        original = weights.get(paths.key_of(adapted, above))
        if original is None or kinds.weight_shape(original) != kinds.weight_shape(surgery.get(adapted, path)):
            raise JpeftError(f"loftq: form= has no layer like {paths.key_of(adapted, above)!r} of the model")
        replacements[above] = _starter(original, own, iterations, paths.key_of(adapted, above))
    if not found:
        raise JpeftError(
            "loftq: no layer is both adapted and quantised, so there is nothing to make up for; let the targets of "
            "the method and of the format overlap"
        )
    return surgery.replace(adapted, replacements)


def _check(method: Any, form: Any, iterations: Any) -> None:
    if not isinstance(method, LoRA) or isinstance(method, DoRA):
        raise JpeftError(f"loftq starts a LoRA, LoRAPlus or LoRAFA, not a {type(method).__name__}")
    if method.init not in ("kaiming", "loftq"):
        raise JpeftError(f"loftq: the method starts by init={method.init!r}; leave init out, or say 'loftq'")
    if not isinstance(form, Format | nnx.Module):
        raise JpeftError(f"loftq: form={form!r} is no format; give jpeft.NF4(), or a quantised model")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise JpeftError(f"loftq: iterations={iterations!r} is not a whole number of at least 1")
    if iterations > 1 and not isinstance(form, Format):
        raise JpeftError(f"loftq: iterations={iterations} would change the codes of a model that is quantised already")


def _wrapper_above(model: nnx.Module, path: surgery.Path, name: str) -> surgery.Path | None:
    """Where the wrapper called `name` stands whose layer is at `path`, under nothing but wrappers."""
    while path and path[-1] == "base":
        path = path[:-1]
        module: Any = surgery.get(model, path)
        if isinstance(module, LoRALinear) and module.name == name:
            return path
    return None


def _starter(original: Any, form: Format | None, iterations: int, where: str) -> Any:
    def start(wrapper: LoRALinear) -> LoRALinear:
        try:
            return _started(wrapper, original, form, iterations)
        except JpeftError as error:
            raise JpeftError(f"loftq: {error} ({where!r})") from None

    return start


def _started(wrapper: LoRALinear, original: Any, form: Format | None, iterations: int) -> LoRALinear:
    """`wrapper` with the update started and the layer in it quantised (form: None where it is already)."""
    layers = wrapper.layers
    wide = kinds.dense_weight(original, layers)
    scale: Array = wrapper.scale.get_value()
    if form is None:
        a, b = _residual(wide, kinds.dense_weight(wrapper, layers), scale)
    else:
        kernel = kinds.weight(wrapper).get_value()
        quantized = form.quantize(kernel)
        a, b = _residual(wide, _values(quantized, layers), scale)
        for _ in range(iterations - 1):
            less = wide - jnp.matmul(a * scale[..., None, :], b, precision=jax.lax.Precision.HIGHEST)
            whole = less if layers is None else kernel.astype(jnp.float32).at[jnp.array(layers)].set(less)
            quantized = dataclasses.replace(form.quantize(whole), dtype=quantized.dtype)
            a, b = _residual(wide, _values(quantized, layers), scale)
        holder: Wrapper = wrapper
        while isinstance(holder.base, Wrapper):
            holder = holder.base
        holder.base = nnx.data(in_place_of(holder.base, quantized, form.compute_dtype))
    wrapper.a.set_value(a.astype(wrapper.a.dtype))
    wrapper.b.set_value(b.astype(wrapper.b.dtype))
    return wrapper


def _values(quantized: QuantizedKernel, layers: tuple[int, ...] | None) -> Float[Array, "*lead in out"]:
    """What the forward pass multiplies with, of the layers that the wrapper covers."""
    values = quantized.dequantize().astype(jnp.float32)
    return values if layers is None else values[jnp.array(layers)]


def _residual(
    weight: Float[Array, "*lead in out"], base: Float[Array, "*lead in out"], scale: Float[Array, "*lead r"]
) -> tuple[Float[Array, "*lead in r"], Float[Array, "*lead r out"]]:
    """a and b such that `base + (a * scale) b` is as close to the weight as their ranks allow."""
    a, b = principal(weight - base, scale.shape[-1])
    live = scale != 0
    return a * live[..., None, :], b * jnp.where(live, 1 / jnp.where(live, scale, 1), 0)[..., :, None]
