"""Counting the work of a program before it runs."""

from __future__ import annotations

import math
from typing import Any


def flops(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products of a jaxpr, those of a loop as often as it runs.

    XLA's own count takes the body of a loop once, hence one layer of a stack of them. Of a `while` loop, whose length
    no jaxpr knows, the body counts once here too.
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            shared = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * shared * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            programs = value if isinstance(value, tuple) else (value,)
            total += times * sum(flops(program) for program in programs if hasattr(program, "eqns"))
    return total
