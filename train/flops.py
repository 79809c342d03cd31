"""Counting the work of a program before it runs."""

from __future__ import annotations

import math
from typing import Any


def flops(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products of a jaxpr, those of a loop as often as it runs.

    XLA's own count takes the body of a loop once, hence one layer of a stack of them. Of a `while` loop, whose length
    no jaxpr knows, the body counts once here too, and of branches the greatest. A kernel counts on all of its grid,
    also where it skips what a mask hides, as XLA's attention computes it; what each device of a mesh does by itself
    counts on all of them.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            shared = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * shared * math.prod(equation.outvars[0].aval.shape)
        inner = [
            flops(program)
            for value in params.values()
            for program in (value if isinstance(value, tuple) else (value,))
            if hasattr(program, "eqns")
        ]
        total += _times(name, params) * (max(inner) if name == "cond" else sum(inner))
    return total


def _times(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return params["mesh"].size if name == "shard_map" else 1
