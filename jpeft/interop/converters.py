"""The converters by PEFT's name of the kind and by our method. A new one is a line here."""

from __future__ import annotations

from jpeft.errors import JpeftError, nearest
from jpeft.interop.adalora import ADALORA
from jpeft.interop.config import Settings
from jpeft.interop.converter import Converter
from jpeft.interop.ia3 import IA3_CONVERTER
from jpeft.interop.lora import LORA
from jpeft.interop.norms import LN_TUNING
from jpeft.interop.prefix import PREFIX_TUNING
from jpeft.interop.prompts import P_TUNING, PROMPT_TUNING
from jpeft.interop.tokens import TRAINABLE_TOKENS
from jpeft.interop.weight_updates import WEIGHT_UPDATES
from jpeft.methods import Method

CONVERTERS: tuple[Converter, ...] = (
    LORA,
    ADALORA,
    IA3_CONVERTER,
    LN_TUNING,
    PROMPT_TUNING,
    P_TUNING,
    PREFIX_TUNING,
    TRAINABLE_TOKENS,
    *WEIGHT_UPDATES,
)


def for_settings(settings: Settings) -> Converter:
    """The converter of a configuration's `peft_type`."""
    found = {converter.peft_type: converter for converter in CONVERTERS}
    if settings.peft_type not in found:
        near = ", ".join(nearest(settings.peft_type, found, 3))
        raise JpeftError(
            f"{settings.where}: peft_type {settings.peft_type!r} is not one of those read here; nearest: {near}"
        )
    return found[settings.peft_type]


def for_method(method: Method) -> Converter:
    """The converter that writes a method."""
    found = {kind: converter for converter in CONVERTERS for kind in converter.methods}
    if type(method) not in found:
        raise JpeftError(
            f"save_peft: PEFT has no files for {type(method).__name__} that are written here (there are "
            f"{', '.join(sorted(kind.__name__ for kind in found))}); jpeft.save_adapter saves every method"
        )
    return found[type(method)]
