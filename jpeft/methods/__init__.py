"""Every method by the name it has in configurations and files. A new method is a new file and a line here."""

from __future__ import annotations

from typing import Any

from jpeft.errors import JpeftError, nearest
from jpeft.methods.adalora import AdaLoRA, adalora_ranks
from jpeft.methods.adapter_drop import DropAdapters, drop_adapters
from jpeft.methods.bottleneck import Houlsby, ParallelAdapter, Pfeiffer
from jpeft.methods.compose import Compose, compose
from jpeft.methods.dora import DoRA
from jpeft.methods.fusion import AdapterFusion
from jpeft.methods.ia3 import IA3
from jpeft.methods.lora import LoRA, LoRAFA, LoRAPlus
from jpeft.methods.mam import MAM
from jpeft.methods.method import Method, applied
from jpeft.methods.prefix import PrefixTuning, PTuningV2
from jpeft.methods.prompt import PromptTuning, PTuning
from jpeft.methods.retrained import BitFit, FullTuning, NormTuning
from jpeft.methods.trainable_tokens import TrainableTokens
from jpeft.methods.unipelt import UniPELT
from jpeft.methods.weight_updates import OFT, LoHa, LoKr, VeRA

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "lora_plus": LoRAPlus,
    "lora_fa": LoRAFA,
    "dora": DoRA,
    "adalora": AdaLoRA,
    "prefix_tuning": PrefixTuning,
    "p_tuning_v2": PTuningV2,
    "prompt_tuning": PromptTuning,
    "p_tuning": PTuning,
    "bitfit": BitFit,
    "norm_tuning": NormTuning,
    "full_tuning": FullTuning,
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "parallel_adapter": ParallelAdapter,
    "mam": MAM,
    "unipelt": UniPELT,
    "drop_adapters": DropAdapters,
    "adapter_fusion": AdapterFusion,
    "ia3": IA3,
    "trainable_tokens": TrainableTokens,
    "vera": VeRA,
    "loha": LoHa,
    "lokr": LoKr,
    "oft": OFT,
}


def from_dict(config: dict[str, Any]) -> Method:
    """A method from `{"method": name, field: value, ...}`. Raises JpeftError on unknown names and fields."""
    name = config.get("method")
    if name not in METHODS:
        near = ", ".join(nearest(str(name), METHODS, 3))
        raise JpeftError(f"unknown method {name!r}; nearest: {near}")
    return METHODS[name].from_dict(config)


__all__ = [
    "IA3",
    "MAM",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "AdapterFusion",
    "BitFit",
    "Compose",
    "DoRA",
    "DropAdapters",
    "FullTuning",
    "Houlsby",
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
    "Pfeiffer",
    "PrefixTuning",
    "PromptTuning",
    "TrainableTokens",
    "UniPELT",
    "VeRA",
    "adalora_ranks",
    "applied",
    "compose",
    "drop_adapters",
    "from_dict",
]
