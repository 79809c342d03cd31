"""Adapters as Hugging Face PEFT 0.21.2 stores them: read onto a model of `jpeft.models`, and written for PEFT to read.

    model = jpeft.load_peft(jpeft.models.load("base"), "their-adapter")
    jpeft.save_peft(model, "our-adapter")

A folder holds `adapter_config.json` and `adapter_model.safetensors`. How they become a model, file by file:

    folder.py       the two files, checked; written whole or not at all
    config.py       the fields of adapter_config.json: typed, refused by name, or named in a warning
    names.py        our modules under transformers' names
    selection.py    PEFT's rules on which modules a configuration means, and the shortest names for a set of modules
    expressions.py  regular expressions from a file, run only where they end soon
    links.py        which array of ours is which tensor of theirs: the one table that reading and writing share
    converter.py    what a method has to say: its fields, the method they mean, its links
    lora.py, ...    one converter per method
    saved.py        modules and biases that are trained as a whole beside the method
    training.py     what serves training only, in a file of its own
    load.py, save.py   the two directions, which know no method
    adapterhub.py, adapterhub_bottleneck.py, adapterhub_fusion.py   the other library's adapters, read only

A new method is one file with a `Converter` and one line in `converters.py`.
"""

from __future__ import annotations

from jpeft.interop.adapterhub import load_adapterhub
from jpeft.interop.load import load_peft
from jpeft.interop.save import save_peft

__all__ = ["load_adapterhub", "load_peft", "save_peft"]
