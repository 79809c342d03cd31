"""Formats of quantised weights: values that turn a kernel into codes and scales, and back.

    q = jpeft.NF4(block_size=64, double_quant=True).quantize(kernel)
    q.dequantize()

A kernel is [*lead, in, out]; its codes are those of the transposed weight (out, in), row by row, as torch stores it:
blocks run along the input axis, and over the ends of rows where their length is no multiple of the block. Leading axes
count layers, each quantised by itself.

| format | codes | scales | bits per weight |
|---|---|---|---|
| NF4, FP4 | bitsandbytes' code books | per block of 64, themselves 8-bit in groups of 256 | 4.127 |
| Int4 | 0 to 15, w = scale (code - 8) or scale code + minimum | per block of 64 | 4.5 or 5 |
| Int8 | -127 to 127 | per output feature, or per block | 8 + 32 / in |

`format(model)` quantises the linear layers of a model (`jpeft.quant.linear`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from jpeft.errors import JpeftError, nearest
from jpeft.quant import blocks
from jpeft.quant.blocks import Array
from jpeft.quant.codebooks import dynamic, four_bit
from jpeft.targets import ALL_LINEAR, entries

_GROUP = 256  # scales that share a scale of their own under double quantisation
_LEAST = np.float32(1e-38)  # the smallest divisor; also the scale of a last block that is not full and all zero
# Compiled code treats float32 below 2^-126 as zero. Values outside of these bounds may lead there.
_TINY, _HUGE = 2.0**-100, 2.0**100
_SMALL = 2**18  # elements up to which NumPy is as quick as compiling

_M = TypeVar("_M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Format:
    """How weights are stored. Subclasses define `encode` and `decode` of one matrix.

    targets, exclude: which linear layers of a model are quantised, as in `jpeft.targets`; by default all but output
    heads. Embeddings and norms are never quantised. compute_dtype: of the products; by default the layer's own.
    """

    kind: ClassVar[str]
    bits: ClassVar[int]

    targets: Any = dataclasses.field(default=ALL_LINEAR, kw_only=True)
    exclude: Any = dataclasses.field(default=(), kw_only=True)
    compute_dtype: str | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", entries(self.targets))
        object.__setattr__(self, "exclude", entries(self.exclude))
        if self.compute_dtype not in (None, "float32", "bfloat16", "float16"):
            said = f"compute_dtype={self.compute_dtype!r}"
            raise JpeftError(f"{type(self).__name__}: {said}; choose 'float32', 'bfloat16' or 'float16'")

    def __call__(self, model: _M) -> _M:
        """A copy of `model` whose linear layers are `QuantizedLinear`; everything else is shared with `model`.

        Raises JpeftError for targets that match nothing, are no linear layers, or are quantised already.
        """
        from jpeft.quant.linear import quantize_layers

        return quantize_layers(model, self)

    def quantize(self, kernel: Float[Array, "*lead in out"]) -> QuantizedKernel:
        """The kernel in this format. Works under tracing; values below 1e-30 are exact outside of it only.

        Raises JpeftError for what is no floating-point matrix, and for values that are not finite.
        """
        shape, dtype = tuple(kernel.shape), jnp.dtype(kernel.dtype)
        if len(shape) < 2 or 0 in shape or not jnp.issubdtype(dtype, jnp.floating):
            raise JpeftError(f"{type(self).__name__}: {dtype.name}{list(shape)} is no kernel [in, out] of floats")
        bare = self.bare()
        *lead, features_in, features_out = shape
        values = kernel.reshape(-1, features_in, features_out)
        arrays = _encode_all(bare, values) if isinstance(kernel, jax.core.Tracer) else bare._encode_concrete(values)
        arrays = {name: array.reshape(*lead, *array.shape[1:]) for name, array in arrays.items()}
        return QuantizedKernel(arrays, bare, (features_in, features_out), dtype.name)

    def _encode_concrete(self, values: Array) -> dict[str, Array]:
        device = _only_device(values)
        finite = plain = None
        if device is None or math.prod(values.shape) > _SMALL:
            finite, plain = (bool(np.all(np.asarray(flag))) for flag in _survey(values))
        elif not isinstance(values, np.ndarray):
            values = np.asarray(values)
        if not (bool(np.all(np.isfinite(values))) if finite is None else finite):
            raise JpeftError(f"{type(self).__name__}: the weight has values that are not finite")
        if plain:
            arrays = _encode_all(self, jnp.asarray(values))
        else:
            # Matrix by matrix in NumPy, which keeps what compiled code takes for zero, and compiles nothing.
            rows = [np.ascontiguousarray(np.asarray(value).astype(np.float32).T) for value in values]
            with np.errstate(all="ignore"):
                made = [self.encode(row) for row in rows]
            # Not tied to the device where it is the default one, as the arrays of a new model are not.
            device = None if device is None or device == jax.local_devices()[0] else device
            arrays = {name: jnp.asarray(np.stack([one[name] for one in made]), device=device) for name in made[0]}
        for name, array in arrays.items():
            if jnp.issubdtype(array.dtype, jnp.floating) and not np.all(np.isfinite(np.asarray(array))):
                raise JpeftError(
                    f"{type(self).__name__}: the weights are too large, {name} would overflow; choose "
                    "double_quant=False, or scale_dtype='float32'"
                )
        return arrays

    def bare(self) -> Format:
        """The format without what says where and how it is applied: equal for equal storage."""
        return dataclasses.replace(self, targets=ALL_LINEAR, exclude=(), compute_dtype=None)

    def to_dict(self) -> dict[str, Any]:
        """The storage as JSON-ready data."""
        where = {field.name for field in dataclasses.fields(Format)}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in where}
        return {"format": self.kind, **fields}

    def __str__(self) -> str:
        settings = [f"{name}={value!r}" for name, value in self.to_dict().items() if name != "format"]
        return f"{type(self).__name__}({', '.join(settings)})"

    def encode(self, weight: Float[Array, "out in"]) -> dict[str, Array]:
        """Codes and scales of one matrix of float32."""
        raise NotImplementedError(f"{type(self).__name__} defines no encode")

    def decode(
        self, arrays: dict[str, Array], shape: tuple[int, int], platform: str = "cpu"
    ) -> Float[Array, "*lead out in"]:
        """The matrices that codes and scales stand for, in float32. shape: (in, out). platform: compiled for which."""
        raise NotImplementedError(f"{type(self).__name__} defines no decode")

    def block_scales(self, arrays: dict[str, Array]) -> Array:
        """The scales of blocks in the form in which they multiply."""
        return arrays["scales"]

    def rowwise(self, shape: tuple[int, int]) -> bool:
        """Whether every row of a matrix (in, out) consists of whole blocks: then codes are [out, ...], else [...]."""
        block = getattr(self, "block_size", None)
        return block is None or shape[0] % block == 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("format", "shape", "dtype"))
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A quantised kernel: a pytree of `arrays`, with leading axes in front of each.

    shape: (in, out). dtype: that of the kernel it was made from, in which `dequantize` returns it.
    """

    arrays: dict[str, Array]
    format: Format
    shape: tuple[int, int]
    dtype: str

    @property
    def codes(self) -> Array:
        """The codes as stored: 4-bit ones two to a byte, of consecutive inputs, the first in the high half."""
        return self.arrays["codes"]

    @property
    def scales(self) -> Float[Array, "..."]:
        """The scale of every block in float32, itself dequantised under double quantisation."""
        return _wide(self.format.block_scales(_outside(self.arrays)))

    def unfolded(self) -> QuantizedKernel:
        """The same values without double quantisation: what a product keeps for its backward pass."""
        form = self.format
        if not (isinstance(form, _CodeBook) and form.double_quant):
            return self
        arrays = {"codes": self.codes, "scales": self.scales}
        return dataclasses.replace(self, arrays=arrays, format=dataclasses.replace(form, double_quant=False))

    @property
    def nbytes(self) -> int:
        """What the arrays take."""
        return sum(array.size * array.dtype.itemsize for array in self.arrays.values())

    def weight(self, platform: str | None = None) -> Float[Array, "*lead out in"]:
        """The values in float32 in torch's layout, in which they are stored.

        platform: "tpu" and others differ in which way is quick; default: where this process computes.
        """
        return self.format.decode(_outside(self.arrays), self.shape, platform or jax.default_backend())

    def dequantize(self, dtype: Any = None) -> Float[Array, "*lead in out"]:
        """The kernel, each value rounded once to `dtype` (default: the dtype of the kernel it was made from)."""
        with np.errstate(under="ignore", over="ignore"):  # into a narrower dtype
            return jnp.asarray(self.weight().astype(jnp.dtype(dtype or self.dtype)).swapaxes(-1, -2))


def _only_device(array: Array) -> Any:
    """The one device the array is on (the default one for NumPy's), or None if it is spread over several."""
    devices = jax.local_devices()[:1] if isinstance(array, np.ndarray) else array.devices()
    return next(iter(devices)) if len(devices) == 1 else None


def _wide(array: Array) -> Array:
    return array.astype(np.float32)


def _outside(arrays: dict[str, Array]) -> dict[str, Array]:
    """The arrays as NumPy's where compiled code would take some of their products for zero, else as they are."""
    floats = [array for array in arrays.values() if jnp.issubdtype(array.dtype, jnp.floating)]
    if any(isinstance(array, jax.core.Tracer) for array in arrays.values()):
        return arrays
    if all(_only_device(array) is not None and array.size <= _SMALL for array in arrays.values()):
        return {name: np.asarray(array) for name, array in arrays.items()}
    if all(np.all(np.asarray(_survey(array.reshape(1, -1, 1))[1])) for array in floats):
        return arrays
    return {name: np.asarray(array) for name, array in arrays.items()}


@jax.jit
def _survey(values: Array) -> tuple[jax.Array, jax.Array]:
    """For each matrix: whether all is finite, and whether compiled code computes exactly with it."""
    axes = (1, 2)
    wide = values.astype(jnp.float32)
    # Compared as integers: as numbers, those in question are zero already.
    size = jax.lax.bitcast_convert_type(wide, jnp.int32) & 0x7FFFFFFF
    least, most = (int(np.float32(bound).view(np.int32)) for bound in (_TINY, _HUGE))
    plain = (size == 0) | ((size >= least) & (size <= most))
    return jnp.all(size < 0x7F800000, axes), jnp.all(plain, axes) & jnp.any(size != 0, axes)


@functools.partial(jax.jit, static_argnums=0)
def _encode_all(form: Format, values: Array) -> dict[str, jax.Array]:
    # One matrix after the other: the temporaries are of one layer, not of the stack.
    return jax.lax.map(lambda value: form.encode(value.T.astype(jnp.float32)), values)


def _in_rows(array: Array, block: int, shape: tuple[int, int], per_block: int = 1) -> Array:
    """[*lead, blocks * per_block] as [*lead, out, ...] where every row consists of whole blocks, else as it is."""
    features_in, features_out = shape
    if features_in % block:
        return array
    return array.reshape(*array.shape[:-1], features_out, features_in // block * per_block)


def _flat(array: Array, block: int, shape: tuple[int, int]) -> Array:
    """The inverse of `_in_rows`."""
    return array if shape[0] % block else array.reshape(*array.shape[:-2], -1)


def _spread(codes: Array, scales: Array, block: int, shape: tuple[int, int], *offsets: Array) -> Array:
    """Values times the scale of their block (plus its offset) as [*lead, out, in]."""
    features_in, features_out = shape
    rowwise = features_in % block == 0
    grouped = codes.reshape(*codes.shape[:-1], -1, block) if rowwise else blocks.split(codes, block)
    made = grouped * scales[..., None]
    for offset in offsets:
        made = made + offset[..., None]
    made = made.reshape(*made.shape[:-2], -1)
    return made if rowwise else made[..., : features_in * features_out].reshape(*made.shape[:-1], *shape[::-1])


@dataclasses.dataclass(frozen=True)
class _CodeBook(Format):
    """4-bit code books of bitsandbytes, bit for bit as version 0.50 quantises on a CPU.

    block_size: weights that share a scale, a multiple of 2. double_quant: the scales are themselves quantised to 8
    bits, minus their mean, in groups of 256.
    """

    bits: ClassVar[int] = 4

    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_block(self, self.block_size, least=2, multiple=2)
        if not isinstance(self.double_quant, bool):
            raise JpeftError(f"{type(self).__name__}: double_quant={self.double_quant!r} is neither True nor False")

    def encode(self, weight: Float[Array, "out in"]) -> dict[str, Array]:
        xp, shape = blocks.library(weight), (weight.shape[1], weight.shape[0])
        flat = weight.reshape(-1)
        grouped = blocks.split(flat, self.block_size)
        scales = xp.max(xp.abs(grouped), axis=-1)
        partial = flat.shape[0] % self.block_size != 0
        if partial:
            scales = xp.concatenate([scales[:-1], xp.where(scales[-1:] < _LEAST, _LEAST, scales[-1:])])
        # Products with the inverse, but quotients in a last block that is not full.
        divisor = xp.where(scales > 0, xp.maximum(scales, _LEAST), np.float32(1))
        ratios = grouped * (np.float32(1) / divisor)[:, None]
        if partial:
            ratios = xp.concatenate([ratios[:-1], blocks.quotient(grouped[-1:], divisor[-1:, None])])
        book = four_bit(self.kind)
        codes = blocks.nearest(book, xp.clip(ratios, -1, 1)).reshape(-1)[: flat.shape[0]]
        filler = int(np.flatnonzero(book.values == 0)[0])
        arrays = {"codes": _in_rows(blocks.pack(codes, filler), self.block_size, shape, self.block_size // 2)}
        if not self.double_quant:
            return arrays | {"scales": _in_rows(scales, self.block_size, shape)}
        offset = blocks.mean(scales)
        scale_codes, scale_scales = _encode_scales(scales - offset)
        return arrays | {
            "scale_codes": _in_rows(scale_codes, self.block_size, shape),
            "scale_scales": scale_scales,
            "scale_offset": xp.asarray(offset),
        }

    def block_scales(self, arrays: dict[str, Array]) -> Array:
        if not self.double_quant:
            return arrays["scales"]
        codes, scales, offset = arrays["scale_codes"], arrays["scale_scales"], arrays["scale_offset"]
        xp, lead = blocks.library(codes), codes.shape[: offset.ndim]
        grouped = blocks.split(blocks.look_up(dynamic().values, codes.reshape(*lead, -1)), _GROUP) * scales[..., None]
        # Between the product and the sum, a bound that changes nothing: compiled code would round the two only once.
        product = xp.maximum(grouped, -xp.abs(grouped)).reshape(*lead, -1)
        return (product + offset[..., None])[..., : math.prod(codes.shape[len(lead) :])].reshape(codes.shape)

    def decode(
        self, arrays: dict[str, Array], shape: tuple[int, int], platform: str = "cpu"
    ) -> Float[Array, "*lead out in"]:
        codes = blocks.unpack(arrays["codes"], platform)
        if shape[0] % self.block_size:
            codes = codes[..., : math.prod(shape)]
        values = blocks.look_up(four_bit(self.kind).values, codes)
        return _spread(values, self.block_scales(arrays), self.block_size, shape)


def _encode_scales(scales: Float[Array, "n"]) -> tuple[Array, Array]:
    """8-bit codes [n] and the scales [groups] of groups of 256."""
    xp = blocks.library(scales)
    grouped = blocks.split(scales, _GROUP)
    largest = xp.max(xp.abs(grouped), axis=-1)
    divisor = xp.where(largest > 0, largest, np.float32(1))
    ratios = xp.clip(grouped * (np.float32(1) / divisor)[:, None], -1, 1)
    codes = xp.where(largest[:, None] > 0, blocks.nearest(dynamic(), ratios), 0).astype(np.uint8)
    return codes.reshape(-1)[: scales.shape[0]], largest


@dataclasses.dataclass(frozen=True)
class NF4(_CodeBook):
    """4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314): the quantiles of a normal distribution.

    With double quantisation of the scales a weight takes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits.
    """

    kind: ClassVar[str] = "nf4"


@dataclasses.dataclass(frozen=True)
class FP4(_CodeBook):
    """4-bit floating point of bitsandbytes: sign, two bits of exponent, one of mantissa."""

    kind: ClassVar[str] = "fp4"


@dataclasses.dataclass(frozen=True)
class Int4(Format):
    """16 even steps per block.

    symmetric: steps around zero, w = scale * (code - 8); else from the smallest value up, w = scale * code + minimum.
    block_size: weights that share a scale; a multiple of 2. scale_dtype: of the scales and minima. GGUF's Q4_0 and
    Q4_1 are blocks of 32 with scales in float16; GPTQ's and AWQ's groups are asymmetric blocks.
    """

    kind: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4

    block_size: int = 64
    symmetric: bool = True
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_block(self, self.block_size, least=2, multiple=2)
        _check_scale_dtype(self, self.scale_dtype)
        if not isinstance(self.symmetric, bool):
            raise JpeftError(f"Int4: symmetric={self.symmetric!r} is neither True nor False")

    def encode(self, weight: Float[Array, "out in"]) -> dict[str, Array]:
        xp, shape = blocks.library(weight), (weight.shape[1], weight.shape[0])
        flat = weight.reshape(-1)
        grouped = blocks.split(flat, self.block_size)
        kept = np.dtype(self.scale_dtype)
        if self.symmetric:
            # The largest magnitude, whatever its sign, gets code 0: there is one step more below the middle.
            place = xp.argmax(xp.abs(grouped), axis=-1)
            scales = (xp.take_along_axis(grouped, place[:, None], axis=-1)[:, 0] / np.float32(-8)).astype(kept)
            steps = grouped * _inverse(_wide(scales))[:, None] + np.float32(8)
            arrays = {"scales": scales}
        else:
            # A last block that is not full is filled up with its own last value, not with zeros.
            missing = -flat.shape[0] % self.block_size
            filled = xp.concatenate([flat, xp.broadcast_to(flat[-1:], (missing,))])
            grouped = filled.reshape(-1, self.block_size)
            least = xp.min(grouped, axis=-1).astype(kept)
            scales = ((xp.max(grouped, axis=-1) - _wide(least)) / np.float32(15)).astype(kept)
            steps = (grouped - _wide(least)[:, None]) * _inverse(_wide(scales))[:, None]
            arrays = {"scales": scales, "minima": least}
        codes = xp.clip(xp.round(steps), 0, 15).astype(np.uint8).reshape(-1)[: flat.shape[0]]
        packed = {"codes": _in_rows(blocks.pack(codes), self.block_size, shape, self.block_size // 2)}
        return packed | {name: _in_rows(array, self.block_size, shape) for name, array in arrays.items()}

    def decode(
        self, arrays: dict[str, Array], shape: tuple[int, int], platform: str = "cpu"
    ) -> Float[Array, "*lead out in"]:
        codes = blocks.unpack(arrays["codes"], platform)
        if shape[0] % self.block_size:
            codes = codes[..., : math.prod(shape)]
        scales = _wide(arrays["scales"])
        if self.symmetric:
            return _spread(codes.astype(np.float32) - np.float32(8), scales, self.block_size, shape)
        return _spread(codes.astype(np.float32), scales, self.block_size, shape, _wide(arrays["minima"]))


@dataclasses.dataclass(frozen=True)
class Int8(Format):
    """-127 to 127.

    block_size: None for one scale per output feature, as bitsandbytes' 8-bit layers have (the scale is the largest
    magnitude, w = code * scale / 127); a number for blocks along the input, w = code * scale, of which GGUF's Q8_0 is
    the one of 32 with scales in float16. scale_dtype: of the scales of blocks.
    """

    kind: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8

    block_size: int | None = None
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None:
            _check_block(self, self.block_size, least=1, multiple=1)
        _check_scale_dtype(self, self.scale_dtype)

    def encode(self, weight: Float[Array, "out in"]) -> dict[str, Array]:
        xp, shape = blocks.library(weight), (weight.shape[1], weight.shape[0])
        if self.block_size is None:
            largest = xp.max(xp.abs(weight), axis=-1)
            divisor = xp.where(largest > 0, largest, np.float32(1))
            codes = xp.round(weight * (np.float32(127) / divisor)[:, None])
            return {"codes": codes.astype(np.int8), "scales": largest}
        flat = weight.reshape(-1)
        grouped = blocks.split(flat, self.block_size)
        scales = (xp.max(xp.abs(grouped), axis=-1) / np.float32(127)).astype(np.dtype(self.scale_dtype))
        codes = xp.clip(xp.round(grouped * _inverse(_wide(scales))[:, None]), -127, 127).astype(np.int8)
        codes = codes.reshape(-1)[: flat.shape[0]]
        return {
            "codes": _in_rows(codes, self.block_size, shape, self.block_size),
            "scales": _in_rows(scales, self.block_size, shape),
        }

    def decode(
        self, arrays: dict[str, Array], shape: tuple[int, int], platform: str = "cpu"
    ) -> Float[Array, "*lead out in"]:
        codes, scales = _wide(arrays["codes"]), _wide(arrays["scales"])
        if self.block_size is None:
            return codes * scales[..., None] * np.float32(7.874015718698502e-3)
        return _spread(codes, scales, self.block_size, shape)


def _inverse(scales: Array) -> Array:
    """1 / scale, and 0 for the scale of a block of zeros."""
    xp = blocks.library(scales)
    return xp.where(scales != 0, np.float32(1) / xp.where(scales != 0, scales, np.float32(1)), np.float32(0))


def _check_block(form: Format, size: Any, *, least: int, multiple: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < least or size % multiple:
        wanted = f"a multiple of {multiple}" if multiple > 1 else "a positive whole number"
        raise JpeftError(f"{type(form).__name__}: block_size={size!r}: expected {wanted}")


def _check_scale_dtype(form: Format, dtype: Any) -> None:
    if dtype not in ("float32", "float16"):
        raise JpeftError(f"{type(form).__name__}: scale_dtype={dtype!r}; choose 'float32' or 'float16'")


FORMATS: dict[str, type[Format]] = {"nf4": NF4, "fp4": FP4, "int4": Int4, "int8": Int8}


def format_of(given: Format | str) -> Format:
    """A format from its name in configurations ("nf4", "fp4", "int4", "int8"), or the format itself."""
    if isinstance(given, Format):
        return given
    if not isinstance(given, str) or given not in FORMATS:
        near = ", ".join(nearest(str(given), FORMATS, 4))
        raise JpeftError(f"{given!r} is no format of quantised weights; choose one of {near}, or pass jpeft.NF4()")
    return FORMATS[given]()


def quantize(model: _M, form: Format | str = "nf4") -> _M:
    """A copy of `model` with its linear layers quantised: `form(model)`, where `form` may be a name as well."""
    return format_of(form)(model)
