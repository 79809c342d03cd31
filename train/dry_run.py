"""`jpeft train CONFIG --dry-run`: what a run would take, from its compiled step, without weights or training."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jpeft
from jpeft.sharding.placing import placed_value
from jpeft.targets import coverage, entries
from train import placing
from train.display import Display, clock, size
from train.flops import flops
from train.plan import Plan
from train.schema import Config
from train.step import make_step
from train.tasks import Task

_MOST = 8  # paths that a target is shown to match


def show(plan: Plan, model: Any, kind: Task, display: Display, mesh: Mesh | None = None) -> None:
    """Compiles the step of every shape for the devices here and says what it takes.

    model: adapted, abstract, placed on `mesh` if there is one. Nothing is trained and nothing is written.
    """
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    state = jax.eval_shape(plan.transform.init, adapter)
    layouts = placing.layouts(plan.transform, adapter, mesh, on_host=plan.on_host)
    if layouts is not None:
        state = jax.tree.map(placed_value, state, layouts[1])
    display.say(plan.sentence())
    display.say(f"\n{jpeft.describe(model)}\n")
    held = {"frozen weights": frozen, "adapter": {**adapter, **buffers}, "optimizer": state}
    saved = held["adapter"], (adapter, state)
    sizes = {name: _bytes(arrays) for name, arrays in held.items()}
    said = ", ".join(f"{name} {size(count)}" for name, count in sizes.items())
    display.say(f"memory    {said}" + " in the host's memory" * plan.on_host)
    on_device = sum(sizes.values()) - (sizes["optimizer"] if plan.on_host else 0)
    step: Any = make_step(graphdef, kind, plan.recipe, layouts)
    key = jax.eval_shape(lambda: jax.random.key(0))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    # Of a stream, the rows that are read first stand for all.
    counts = Counter(window.length for window in plan.windows)
    part = plan.steps / len(plan.windows)
    about = "" if part == 1 else "about "
    work = 0.0
    for length in sorted(counts):
        window = next(window for window in plan.windows if window.length == length)
        rows = None if mesh is None else placing.rows_along(mesh, 1)
        batch = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows) for name, a in plan.batch(window).items()}
        begun = time.monotonic()
        traced = step.trace(adapter, state, buffers, frozen, batch, key, number, plan.rates_at(0))
        compiled = traced.lower().compile()
        took = time.monotonic() - begun
        products = flops(traced.jaxpr.jaxpr)
        work += products * counts[length] * part
        temporary = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
        whole = on_device + (temporary or 0)
        peak = "" if temporary is None else f", {size(temporary)} of temporaries, {size(whole)} in all"
        display.say(
            f"step      {about}{round(counts[length] * part)} of {length} tokens a row: {_count(products)}FLOP{peak} "
            f"(compiled in {clock(took)})"
        )
    display.say(f"run       {about}{_count(work)}FLOP in {plan.steps} steps, without evaluations")
    files = [sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in saved]
    display.say(f"files     the adapter takes {size(files[0])}, a checkpoint {size(files[1])}")
    display.say(
        "nothing was trained or written (--dry-run). Memory is that of each device, temporaries as the compiler allots "
        f"them on {jax.devices()[0].device_kind}; FLOP are those of matrix products on all devices"
    )


def show_targets(config: Config, model: Any, display: Display) -> None:
    """Says where each entry of the methods' `targets` is found in the adapted `model`."""
    for method in config.method if isinstance(config.method, list) else [config.method]:
        for entry in entries(method.get("targets")):
            found = [
                name if count == there else f"{name} in {count} of {there} layers"
                for name, (count, there) in coverage(model, str(entry)).items()
            ]
            more = f" and {len(found) - _MOST:,} more" if len(found) > _MOST else ""
            display.say(f"target    {entry}: {', '.join(found[:_MOST])}{more}")


def _bytes(tree: Any) -> int:
    """Bytes on each device."""
    return sum(math.prod(_local(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _local(leaf: Any) -> tuple[int, ...]:
    sharding = getattr(leaf, "sharding", None)
    return tuple(leaf.shape) if sharding is None else sharding.shard_shape(leaf.shape)


def _count(value: float) -> str:
    """A number with a unit before it: `1.2 T`."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} E"
