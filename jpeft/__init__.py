"""Parameter-efficient fine-tuning for JAX and Flax NNX.

A method is a value that maps a module tree to a new module tree; training, merging, sharding, saving and serving many
tasks are plain JAX over the pytrees that result:

    model = jpeft.LoRA(rank=16, targets="all-linear")(model, rngs=nnx.Rngs(0))
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jpeft.baking import bake
from jpeft.describe import Description, describe
from jpeft.errors import JpeftError
from jpeft.eva_start import eva
from jpeft.fusing import fuse
from jpeft.loftq_start import loftq
from jpeft.merge import merge, strip
from jpeft.methods import (
    IA3,
    MAM,
    METHODS,
    OFT,
    AdaLoRA,
    AdapterFusion,
    BitFit,
    Compose,
    DoRA,
    DropAdapters,
    FullTuning,
    Houlsby,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRAPlus,
    Method,
    NormTuning,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    TrainableTokens,
    UniPELT,
    VeRA,
    adalora_ranks,
    applied,
    compose,
    drop_adapters,
)
from jpeft.multi import multi
from jpeft.observing import observe
from jpeft.partition import Partition, combine, param_labels, partition, trainable_mask
from jpeft.quant import FP4, NF4, Int4, Int8, quantize
from jpeft.sharding import make_mesh, optimizer_shardings, shard, shard_batch, shardings
from jpeft.stack import Stack, offload, run_layers
from jpeft.targets import listing as list_targets
from jpeft.training import optimizer, penalty
from jpeft.variables import AdapterBuffer, AdapterIds, DropoutKey, Frozen, Quantized, Trainable
from jpeft.virtual_tokens import insert_prompt

if TYPE_CHECKING:
    from jpeft import models
    from jpeft.checkpoint import load_adapter, save_adapter
    from jpeft.generation import generate
    from jpeft.interop import load_adapterhub, load_peft, save_peft

# Looked up on first use: they bring Orbax, safetensors and the model families, which research code may not need.
_LATER = {
    "models": ("jpeft.models", None),
    "save_adapter": ("jpeft.checkpoint", "save_adapter"),
    "load_adapter": ("jpeft.checkpoint", "load_adapter"),
    "generate": ("jpeft.generation", "generate"),
    "load_adapterhub": ("jpeft.interop", "load_adapterhub"),
    "load_peft": ("jpeft.interop", "load_peft"),
    "save_peft": ("jpeft.interop", "save_peft"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'jpeft' has no attribute {name!r}")
    module, attribute = _LATER[name]
    found = importlib.import_module(module)
    value = found if attribute is None else getattr(found, attribute)
    globals()[name] = value
    return value


__all__ = [
    "FP4",
    "IA3",
    "MAM",
    "METHODS",
    "NF4",
    "OFT",
    "AdaLoRA",
    "AdapterBuffer",
    "AdapterFusion",
    "AdapterIds",
    "BitFit",
    "Compose",
    "Description",
    "DoRA",
    "DropAdapters",
    "DropoutKey",
    "Frozen",
    "FullTuning",
    "Houlsby",
    "Int4",
    "Int8",
    "JpeftError",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoRAFA",
    "LoRAPlus",
    "Method",
    "NormTuning",
    "PTuning",
    "PTuningV2",
    "ParallelAdapter",
    "Partition",
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "Quantized",
    "Stack",
    "Trainable",
    "TrainableTokens",
    "UniPELT",
    "VeRA",
    "adalora_ranks",
    "applied",
    "bake",
    "combine",
    "compose",
    "describe",
    "drop_adapters",
    "eva",
    "fuse",
    "generate",
    "insert_prompt",
    "list_targets",
    "load_adapter",
    "load_adapterhub",
    "load_peft",
    "loftq",
    "make_mesh",
    "merge",
    "models",
    "multi",
    "observe",
    "offload",
    "optimizer",
    "optimizer_shardings",
    "param_labels",
    "partition",
    "penalty",
    "quantize",
    "run_layers",
    "save_adapter",
    "save_peft",
    "shard",
    "shard_batch",
    "shardings",
    "strip",
    "trainable_mask",
]
