"""Quantised checkpoints in safetensors: bitsandbytes' 4-bit and 8-bit layers, GPTQ and AWQ with 4 bits.

Each is read as a `PackedSource`: a `TensorSource` that has one logical tensor (out, in) where the file has codes,
scales and what describes them, and hands it out either as floats or as the arrays of a format of `jpeft.quant`.

    bitsandbytes, 4 bits   X.weight, X.weight.absmax, X.weight.quant_map, X.weight.quant_state.bitsandbytes__nf4, and
                           X.weight.nested_absmax, X.weight.nested_quant_map under double quantisation
    bitsandbytes, 8 bits   X.weight, X.SCB, X.weight_format
    GPTQ, AWQ              X.qweight, X.qzeros, X.scales, and X.g_idx for GPTQ
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from jpeft.errors import JpeftError
from jpeft.models.config import parse_json
from jpeft.models.tensors import TensorInfo, TensorSource
from jpeft.quant import FP4, NF4, Format, Int4, Int8, QuantizedKernel
from jpeft.quant.codebooks import dynamic, four_bit

_STATE = re.compile(r"(?P<name>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")
_FOUR_BIT: dict[str, type[NF4] | type[FP4]] = {"nf4": NF4, "fp4": FP4}
_NIBBLES = np.arange(0, 32, 4, dtype=np.uint32)
# In which order AWQ packs eight columns into an integer, from the lowest bits up.
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@runtime_checkable
class PackedSource(TensorSource, Protocol):
    """A `TensorSource` some of whose tensors are stored in a quantised format.

    stays: whether they are held in that format unless asked otherwise.
    """

    stays: bool

    @property
    def formats(self) -> Mapping[str, Format]:
        """The format of each tensor that can be had in packed form."""

    def read_packed(self, name: str) -> QuantizedKernel:
        """The tensor `name` (out, in) as a quantised kernel [in, out] of NumPy arrays."""


def formats_of(source: TensorSource) -> Mapping[str, Format]:
    """The format of each tensor that `source` gives in packed form."""
    return source.formats if isinstance(source, PackedSource) else {}


def open_packed(raw: Mapping[str, Any], source: TensorSource) -> TensorSource:
    """`source`, or the `PackedSource` that reads it, by the `quantization_config` of its config.json."""
    config = raw.get("quantization_config")
    if config is None:
        return source
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method == "bitsandbytes" or (method is None and isinstance(config, Mapping) and "load_in_4bit" in config):
        return BitsAndBytes(source)
    if method in ("gptq", "awq"):
        return Grouped(source, config, method)
    if method == "gguf":
        return source  # transformers leaves this entry behind when it has dequantised a .gguf file
    raise JpeftError(
        f"{source.where}: quantised by {method!r}; bitsandbytes, gptq and awq with 4 bits are read here. Load the "
        "unquantised checkpoint with quantize="
    )


class _Packed:
    """What the sources below share. entries: the format of each packed tensor. hidden: names that are parts of one."""

    stays = True

    def __init__(self, source: TensorSource):
        self.where = source.where
        self._source = source
        self._formats: dict[str, Format] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._hidden: set[str] = set()

    @property
    def formats(self) -> Mapping[str, Format]:
        return self._formats

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        plain = {name: info for name, info in self._source.tensors.items() if name not in self._hidden}
        return {**plain, **self._infos}

    def read(self, name: str) -> np.ndarray:
        if name not in self._formats:
            return self._source.read(name)
        return np.asarray(self.read_packed(name).dequantize("float32")).T

    def read_packed(self, name: str) -> QuantizedKernel:
        raise NotImplementedError(f"{type(self).__name__} defines no read_packed")

    def _refuse(self, name: str, why: str) -> JpeftError:
        return JpeftError(f"{self.where}: the quantised tensor {name!r} {why}; get the checkpoint again")

    def _array(self, name: str, owner: str, kinds: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A part of `owner`: of a dtype whose kind is among `kinds`, and of the given shape or element count."""
        info = self._source.tensors.get(name)
        if info is None:
            raise self._refuse(owner, f"lacks {name!r}")
        if info.dtype.kind not in kinds or (shape is not None and info.shape != shape):
            wanted = "" if shape is None else f", expected {list(shape)}"
            raise self._refuse(owner, f"has {name!r} {info.dtype.name}{list(info.shape)}{wanted}")
        return self._source.read(name)


class BitsAndBytes(_Packed):
    """Layers as bitsandbytes and transformers save them."""

    def __init__(self, source: TensorSource):
        super().__init__(source)
        self._states: dict[str, dict[str, Any]] = {}
        for name in source.tensors:
            found = _STATE.fullmatch(name)
            if found:
                self._four_bit(found["name"], found["kind"], name)
            elif name.endswith(".SCB"):
                self._eight_bit(name.removesuffix(".SCB"))

    def _four_bit(self, weight: str, kind: str, state_name: str) -> None:
        state = parse_json(self._array(state_name, weight, "u").tobytes(), f"{self.where}: {state_name}")
        shape, nested = state.get("shape"), "nested_offset" in state
        if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
            raise self._refuse(weight, f"has shape {shape!r} in its state, expected (out, in)")
        block, group = state.get("blocksize"), state.get("nested_blocksize", 256)
        if state.get("quant_type") != kind or group != 256 or not isinstance(block, int):
            raise self._refuse(weight, f"has the state {state!r}, which this reader does not know")
        form: Format = _FOUR_BIT[kind](block_size=block, double_quant=nested)
        count = shape[0] * shape[1]
        blocks = -(-count // block)
        expected = {f"{weight}.quant_map": four_bit(kind).values, f"{weight}.nested_quant_map": dynamic().values}
        for name, values in expected.items():
            if name in self._source.tensors and not np.allclose(self._source.read(name), values, atol=1e-6):
                raise self._refuse(weight, f"has a code book of its own in {name!r}")
        self._array(f"{weight}.absmax", weight, "u" if nested else "f", (blocks,))
        if nested:
            self._array(f"{weight}.nested_absmax", weight, "f", (-(-blocks // 256),))
        stored = self._source.tensors.get(weight)
        if stored is None or int(np.prod(stored.shape)) * stored.dtype.itemsize != -(-count // 2):
            raise self._refuse(weight, f"does not hold the {count} codes that its state announces")
        self._formats[weight], self._states[weight] = form, state
        dtype: Any = {"float32": np.float32, "float16": np.float16}.get(str(state.get("dtype")), ml_dtypes.bfloat16)
        self._infos[weight] = TensorInfo((shape[0], shape[1]), np.dtype(dtype))
        self._hidden |= {name for name in self._source.tensors if name.startswith(f"{weight}.")}

    def _eight_bit(self, layer: str) -> None:
        weight = f"{layer}.weight"
        info = self._source.tensors.get(weight)
        if info is None or info.dtype != np.int8 or len(info.shape) != 2:
            raise self._refuse(weight, "has scales (SCB) but is no int8 matrix")
        self._array(f"{layer}.SCB", weight, "f", info.shape[:1])
        if f"{layer}.weight_format" in self._source.tensors and np.any(self._source.read(f"{layer}.weight_format")):
            raise JpeftError(f"{self.where}: {weight!r} is in a layout for one kind of GPU; save it in row layout")
        self._formats[weight] = Int8()
        self._infos[weight] = TensorInfo(info.shape, np.dtype(np.float16))
        self._hidden |= {f"{layer}.SCB", f"{layer}.weight_format"}

    def read_packed(self, name: str) -> QuantizedKernel:
        form, info = self._formats[name], self._infos[name]
        shape = (info.shape[1], info.shape[0])
        if isinstance(form, Int8):
            scales = self._source.read(f"{name.removesuffix('.weight')}.SCB").astype(np.float32)
            return QuantizedKernel({"codes": self._source.read(name), "scales": scales}, form, shape, info.dtype.name)
        state, block = self._states[name], form.block_size  # type: ignore[attr-defined]
        arrays: dict[str, Any] = {"codes": np.ascontiguousarray(self._source.read(name)).reshape(-1).view(np.uint8)}
        if form.double_quant:  # type: ignore[attr-defined]
            arrays["scale_codes"] = self._source.read(f"{name}.absmax")
            arrays["scale_scales"] = self._source.read(f"{name}.nested_absmax").astype(np.float32)
            arrays["scale_offset"] = np.float32(state["nested_offset"]).reshape(())
        else:
            arrays["scales"] = self._source.read(f"{name}.absmax").astype(np.float32)
        if form.rowwise(shape):
            arrays["codes"] = arrays["codes"].reshape(shape[1], -1)
            scales_name = "scale_codes" if "scale_codes" in arrays else "scales"
            arrays[scales_name] = arrays[scales_name].reshape(shape[1], shape[0] // block)
        return QuantizedKernel(arrays, form, shape, info.dtype.name)


class Grouped(_Packed):
    """GPTQ's and AWQ's 4-bit layers: groups along the input with a scale and a zero point for each output feature."""

    def __init__(self, source: TensorSource, config: Mapping[str, Any], method: str):
        super().__init__(source)
        bits, version = config.get("bits", config.get("w_bit")), config.get("version", "gemm")
        if bits != 4 or (method == "awq" and str(version).lower() != "gemm"):
            said = f"{bits!r} bits, version {version!r}" if method == "awq" else f"{bits!r} bits"
            raise JpeftError(f"{self.where}: {method} with {said}; 4 bits (of AWQ: version 'gemm') are read here")
        self._awq = method == "awq"
        # The older layout of GPTQ stores zero points less one.
        self._more = 0 if self._awq or config.get("checkpoint_format") == "gptq_v2" else 1
        for name in source.tensors:
            if name.endswith(".qweight"):
                self._layer(name.removesuffix(".qweight"))

    def _layer(self, layer: str) -> None:
        weight = f"{layer}.weight"
        rows, columns = self._array(f"{layer}.qweight", weight, "iu").shape
        shape = (columns * 8, rows) if self._awq else (columns, rows * 8)  # (out, in)
        groups = self._array(f"{layer}.scales", weight, "f").shape[0]
        self._array(f"{layer}.scales", weight, "f", (groups, shape[0]))
        self._array(f"{layer}.qzeros", weight, "iu", (groups, shape[0] // 8))
        if not groups or shape[1] % groups:
            raise self._refuse(weight, f"has {groups} groups of scales for {shape[1]} inputs")
        size = shape[1] // groups
        index = f"{layer}.g_idx"
        if index in self._source.tensors and np.any(self._source.read(index) != np.arange(shape[1]) // size):
            raise JpeftError(
                f"{self.where}: {weight!r} is quantised in the order of activations (desc_act), so its groups are no "
                "blocks of inputs; get a checkpoint without desc_act"
            )
        self._formats[weight] = Int4(block_size=size, symmetric=False)
        self._infos[weight] = TensorInfo(shape, np.dtype(np.float16))
        self._hidden |= {f"{layer}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}

    def read_packed(self, name: str) -> QuantizedKernel:
        layer, info, form = name.removesuffix(".weight"), self._infos[name], self._formats[name]
        outputs, inputs = info.shape
        codes = self._nibbles(self._source.read(f"{layer}.qweight"), along_inputs=not self._awq)  # [in, out]
        zeros = self._nibbles(self._source.read(f"{layer}.qzeros"), along_inputs=False).astype(np.float32)
        scales = self._source.read(f"{layer}.scales").astype(np.float32)
        turned = np.ascontiguousarray(codes.T)
        arrays = {
            "codes": (turned[:, 0::2] << 4) | turned[:, 1::2],
            "scales": np.ascontiguousarray(scales.T),
            "minima": np.ascontiguousarray((-scales * (zeros + self._more)).T),
        }
        return QuantizedKernel(arrays, form, (inputs, outputs), info.dtype.name)

    def _nibbles(self, packed: np.ndarray, *, along_inputs: bool) -> np.ndarray:
        """Eight codes of each integer, along the first axis or the second."""
        words = packed.view(np.uint32)
        if along_inputs:
            return ((words[:, None, :] >> _NIBBLES[None, :, None]) & 15).astype(np.uint8).reshape(-1, words.shape[1])
        spread = ((words[:, :, None] >> _NIBBLES) & 15).astype(np.uint8)
        if self._awq:
            spread = spread[:, :, np.argsort(_AWQ_ORDER)]
        return spread.reshape(len(words), -1)


def packed_tensors(kernel: QuantizedKernel, name: str) -> dict[str, np.ndarray]:
    """What bitsandbytes' layout has for one quantised kernel [in, out] under the tensor name `name`.

    Raises JpeftError for a format that bitsandbytes does not have.
    """
    form, arrays = kernel.format, {key: np.asarray(array) for key, array in kernel.arrays.items()}
    if isinstance(form, Int8) and form.block_size is None:
        layer = name.removesuffix(".weight")
        return {
            name: arrays["codes"],
            f"{layer}.SCB": arrays["scales"],
            f"{layer}.weight_format": np.zeros((), np.uint8),
        }
    if not isinstance(form, NF4 | FP4):
        raise JpeftError(
            f"save: {name!r} is quantised as {form}, which bitsandbytes does not have; NF4, FP4 and Int8() can be "
            "written, or jpeft.merge(model, dequantize=True)"
        )
    state: dict[str, Any] = {
        "quant_type": form.kind,
        "blocksize": form.block_size,
        "dtype": kernel.dtype,
        "shape": [kernel.shape[1], kernel.shape[0]],
    }
    made = {name: arrays["codes"].reshape(-1, 1), f"{name}.quant_map": four_bit(form.kind).values}
    if form.double_quant:
        made[f"{name}.absmax"] = arrays["scale_codes"].reshape(-1)
        made[f"{name}.nested_absmax"] = arrays["scale_scales"]
        made[f"{name}.nested_quant_map"] = dynamic().values
        offset = float(arrays["scale_offset"])
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        made[f"{name}.absmax"] = arrays["scales"].reshape(-1)
    text = json.dumps(state).encode()
    return made | {f"{name}.quant_state.bitsandbytes__{form.kind}": np.frombuffer(text, np.uint8)}


def quantization_config(forms: set[Format], dtype: str) -> dict[str, Any]:
    """The entry of config.json by which transformers recognises layers in that format.

    Raises JpeftError if there are several formats: the entry speaks of the whole model.
    """
    if len(forms) > 1:
        said = sorted(map(repr, forms))
        raise JpeftError(f"save: a checkpoint has layers of one quantised format only, this model has {said}")
    (form,) = forms
    if isinstance(form, Int8):
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": form.kind,
        "bnb_4bit_use_double_quant": bool(getattr(form, "double_quant", False)),
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }
