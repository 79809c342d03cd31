"""Quantised frozen bases: formats as values, linear layers that hold codes and scales, and what goes with them."""

from jpeft.quant.adam8bit import adam8bit, scale_by_adam8bit
from jpeft.quant.formats import FORMATS, FP4, NF4, Format, Int4, Int8, QuantizedKernel, format_of, quantize
from jpeft.quant.initialization import loftq, pissa, qpissa
from jpeft.quant.linear import QuantizedLinear
from jpeft.quant.sharding import partition_specs

__all__ = [
    "FORMATS",
    "FP4",
    "NF4",
    "Format",
    "Int4",
    "Int8",
    "QuantizedKernel",
    "QuantizedLinear",
    "adam8bit",
    "format_of",
    "loftq",
    "partition_specs",
    "pissa",
    "qpissa",
    "quantize",
    "scale_by_adam8bit",
]
