"""Pretrained models as NNX modules with stacked layers: `load`, `from_config`, `save`."""

from jpeft.models.abstract import abstract
from jpeft.models.attention import Attention
from jpeft.models.config import Config
from jpeft.models.families import MODEL_TYPES
from jpeft.models.loading import from_config, load
from jpeft.models.model import TASKS, Model
from jpeft.models.saving import Rounding, save, save_merged
from jpeft.models.tokenizer import load_tokenizer

__all__ = [
    "MODEL_TYPES",
    "TASKS",
    "Attention",
    "Config",
    "Model",
    "Rounding",
    "abstract",
    "from_config",
    "load",
    "load_tokenizer",
    "save",
    "save_merged",
]
