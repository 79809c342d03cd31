"""`load_adapterhub`: the other library's adapters, one alone or a fusion of several, whichever a folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from jpeft.errors import JpeftError
from jpeft.interop.adapterhub_bottleneck import load_bottleneck
from jpeft.interop.adapterhub_fusion import CONFIG, load_fusion
from jpeft.models.model import Model

_M = TypeVar("_M", bound=Model)


def load_adapterhub(model: _M, path: str | Path, *, adapters: Sequence[str | Path] = ()) -> _M:
    """`model` with the bottleneck adapter, or the fusion, that AdapterHub's `adapters` (1.3.0) saved in `path`.

    A fusion becomes `AdapterFusion`. adapters: the folders of what it fuses, in any order; by default they are looked
    for under their names in `path` and beside it.

    model: a base from `jpeft.models.load`: BERT, RoBERTa, Llama, Mistral, GPT-2. Houlsby's adapters
    (`double_seq_bn`), and single ones with `original_ln_before=False`, become `Houlsby` and `Pfeiffer`; parallel ones
    on BERT and RoBERTa `ParallelAdapter`. Prediction heads are not read.

    Raises JpeftError, naming fields, tensors and files, for what is damaged, does not fit the model, or computes
    something that no method here does.
    """
    where = Path(path)
    if (where / CONFIG).is_file():
        return load_fusion(model, where, adapters)
    if adapters:
        raise JpeftError(f"load_adapterhub: {where} is no fusion, so adapters= has nothing to be for")
    return load_bottleneck(model, where)
