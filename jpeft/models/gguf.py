"""Models of the Llama family in .gguf files: the metadata as a config.json, the tensors under Hugging Face's names.

    token_embd              embed_tokens (and the output layer, where there is no `output`)
    blk.N.attn_{q,k,v}      layers.N.self_attn.{q,k,v}_proj
    blk.N.attn_output       layers.N.self_attn.o_proj
    blk.N.attn_{q,k}_norm   layers.N.self_attn.{q,k}_norm
    blk.N.ffn_{gate,up,down} layers.N.mlp.{gate,up,down}_proj
    blk.N.{attn,ffn}_norm   layers.N.{input,post_attention}_layernorm
    output_norm, output     norm, lm_head

Files of the architecture `llama` store the rows of q and k for rotary pairs (2i, 2i + 1), Hugging Face for pairs
(i, i + H/2): those rows are put back. What a file says about the architecture and this reader does not know is refused:
it would change the result without a sign.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.errors import JpeftError, nearest
from jpeft.models.gguf_file import GGUFFile
from jpeft.models.tensors import TensorInfo
from jpeft.quant import Format, Int4, Int8, QuantizedKernel

# GGUF architecture -> (model_type, class in config.json, whether rows of q and k are permuted).
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM", True),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", False),
}

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Per-frequency divisors of the rotary embedding: the form in which Llama 3.1's scaling is stored.
_ROPE_FACTORS = "rope_freqs.weight"

# Blocks that can be kept: 32 values with scales (and minima) in float16.
_FORMATS: dict[str, Format] = {
    "Q4_0": Int4(block_size=32, scale_dtype="float16"),
    "Q4_1": Int4(block_size=32, symmetric=False, scale_dtype="float16"),
    "Q8_0": Int8(block_size=32, scale_dtype="float16"),
}

# Keys below the architecture's name that are read, and others that say nothing the tensors do not.
_READ = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scale_linear",
    "vocab_size",
)
# Keys that are fine as long as they have this value.
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "use_parallel_residual": True, "attention.causal": True}


class _Metadata:
    """Checked access to the keys under the architecture's name."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.where, self.architecture = str(file.path), architecture
        prefix = f"{architecture}."
        self.values = {
            key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)
        }
        unknown = [
            f"{prefix}{key} = {value!r}"
            for key, value in self.values.items()
            if key not in _READ and not (key in _NEUTRAL and _NEUTRAL[key] == value)
        ]
        if unknown:
            raise JpeftError(
                f"{self.where}: the metadata says {', '.join(unknown[:8])}, which the models here do not compute; "
                "load the model's Hugging Face folder instead"
            )

    def refuse(self, key: str, expected: str) -> JpeftError:
        if key not in self.values:
            near = nearest(key, self.values, 3)
            return JpeftError(f"{self.where}: the metadata lacks {self.architecture}.{key}; the nearest are {near}")
        value = self.values[key]
        return JpeftError(f"{self.where}: {self.architecture}.{key} = {value!r}: expected {expected}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]  # one entry per layer, all equal
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(key, "a positive integer, the same for every layer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refuse(key, "a positive number")
        return float(value)


class GGUFSource:
    """The tensors of a .gguf file as a `TensorSource`: dequantised when read, one at a time.

    config: what config.json would say. Raises JpeftError for an architecture, metadata or tensors outside the Llama
    family.
    """

    config: dict[str, Any]
    stays = False  # matrices are dequantised unless asked for in packed form

    def __init__(self, path: str | Path):
        self.where = str(path)
        self._file = GGUFFile(path)
        architecture = self._file.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise JpeftError(
                f"{path}: the architecture {architecture!r} is not read from GGUF here; {sorted(ARCHITECTURES)} are. "
                "Load the model's Hugging Face folder instead"
            )
        self._names = self._map_names()
        self.config = self._read_config(_Metadata(self._file, architecture), architecture)
        self._permuted = ARCHITECTURES[architecture][2]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor under its Hugging Face name."""
        stored = self._file.tensors
        return {name: TensorInfo(stored[own].shape, stored[own].dtype) for name, own in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` in torch's layout: (out, in) for linear layers."""
        return self._put_back(name, self._file.read(self._names[name]))

    @property
    def formats(self) -> Mapping[str, Format]:
        """The format of each matrix whose blocks can be kept as they are."""
        kinds = {name: self._file.tensors[own] for name, own in self._names.items()}
        return {
            name: _FORMATS[t.kind.name] for name, t in kinds.items() if t.kind.name in _FORMATS and len(t.shape) == 2
        }

    def read_packed(self, name: str) -> QuantizedKernel:
        """The tensor `name` (out, in) as a quantised kernel [in, out]; rows stay whole, so q and k are put back."""
        outputs, inputs = self._file.tensors[self._names[name]].shape
        arrays = {key: self._put_back(name, array) for key, array in self._file.read_packed(self._names[name]).items()}
        return QuantizedKernel(arrays, self.formats[name], (inputs, outputs), "float32")

    def _put_back(self, name: str, tensor: np.ndarray) -> np.ndarray:
        if self._permuted and ".q_proj." in name:
            return _half_split(tensor, self.config["num_attention_heads"])
        if self._permuted and ".k_proj." in name:
            return _half_split(tensor, self.config["num_key_value_heads"])
        return tensor

    def _map_names(self) -> dict[str, str]:
        names, unknown = {}, []
        for own in self._file.tensors:
            if own == _ROPE_FACTORS:
                continue
            layer = re.fullmatch(r"blk\.(0|[1-9][0-9]*)\.(\w+)\.(weight|bias)", own)
            plain = re.fullmatch(r"(\w+)\.(weight|bias)", own)
            if layer and layer[2] in _LAYER_NAMES:
                names[f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"] = own
            elif plain and plain[1] in _NAMES:
                names[f"{_NAMES[plain[1]]}.{plain[2]}"] = own
            else:
                unknown.append(own)
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise JpeftError(
                f"{self.where}: the tensors {unknown[:8]}{more} belong to no model of the Llama family known here; "
                "load the model's Hugging Face folder instead"
            )
        return names

    def _read_config(self, meta: _Metadata, architecture: str) -> dict[str, Any]:
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise JpeftError(f"{self.where}: token_embd.weight is missing or no matrix, so this is no language model")
        model_type, class_name, _ = ARCHITECTURES[architecture]
        heads = meta.integer("attention.head_count")
        hidden = meta.integer("embedding_length")
        context = meta.integer("context_length")
        width = meta.integer("attention.key_length", max(hidden // heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            if meta.integer(key, width) != width:
                raise meta.refuse(key, f"the width of a head, {width}")
        config: dict[str, Any] = {
            "model_type": model_type,
            "architectures": [class_name],
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": meta.integer("feed_forward_length"),
            "num_hidden_layers": meta.integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
            "head_dim": width,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
            "rope_theta": meta.number("rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self._names,
            "use_sliding_window": False,
            **self._tokens(),
        }
        if model_type == "llama":
            biases = [name for name in self._names if name.endswith("_proj.bias")]
            config["attention_bias"] = any(".self_attn." in name for name in biases)
            config["mlp_bias"] = any(".mlp." in name for name in biases)
        if meta.values.get("attention.sliding_window", 0):
            if model_type != "llama":
                raise meta.refuse("attention.sliding_window", "0: windows are read for the architecture 'llama' only")
            window = meta.integer("attention.sliding_window")
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
        scaling = self._rope_scaling(meta, config)
        return config | ({"rope_scaling": scaling} if scaling else {})

    def _tokens(self) -> dict[str, Any]:
        found = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("pad", "padding")):
            value = self._file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            found[name] = value if isinstance(value, int) and not isinstance(value, bool) else None
        ends = list(dict.fromkeys(token for token in (found["eos"], found["eot"]) if token is not None))
        eos = ends[0] if len(ends) == 1 else ends or None
        return {"bos_token_id": found["bos"], "eos_token_id": eos, "pad_token_id": found["pad"]}

    def _rope_scaling(self, meta: _Metadata, config: Mapping[str, Any]) -> dict[str, Any] | None:
        kind = meta.values.get("rope.scaling.type", "linear" if "rope.scale_linear" in meta.values else "none")
        if kind not in ("none", "linear"):
            raise meta.refuse("rope.scaling.type", "'none' or 'linear'; load the model's Hugging Face folder instead")
        key = "rope.scaling.factor" if "rope.scaling.factor" in meta.values else "rope.scale_linear"
        factor = meta.number(key, 1.0) if kind == "linear" else 1.0
        if _ROPE_FACTORS not in self._file.tensors:
            return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
        factors = self._file.read(_ROPE_FACTORS).astype(np.float32)
        if factor == 1.0 and factors.shape == (config["head_dim"] // 2,) and np.all(factors == 1.0):
            return None
        # Llama 3.1, 3.2 and 3.3 differ in the largest divisor alone; anything else is not guessed at.
        scaling = {
            "rope_type": "llama3",
            "factor": round(float(factors.max()), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        expected = _llama3_factors(scaling, config["rope_theta"], config["head_dim"])
        if factor != 1.0 or factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise JpeftError(
                f"{self.where}: {_ROPE_FACTORS} scales the rotary embedding in a way that is not Llama 3's; load the "
                "model's Hugging Face folder instead"
            )
        return scaling


def open_gguf(path: str | Path) -> tuple[dict[str, Any], GGUFSource]:
    """The configuration, as config.json has it, and the tensors of a .gguf file."""
    source = GGUFSource(path)
    return source.config, source


def _half_split(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows (or bias entries) from interleaved rotary pairs to Hugging Face's halves."""
    if tensor.shape[0] % (2 * heads):
        return tensor  # of the wrong shape: whoever compares it with the configuration says so
    return tensor.reshape(heads, -1, 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _llama3_factors(scaling: Mapping[str, Any], theta: float, width: int) -> np.ndarray:
    """By how much Llama 3 divides each frequency."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    return 1 / (np.clip(blend, 0, 1) + (1 - np.clip(blend, 0, 1)) / scaling["factor"])
