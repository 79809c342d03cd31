"""What a method costs: its file, a training step, a call of the trained model, and what a language model forgets.

Times are taken in this process, one method after another; what else the machine does is in them. Those of inference
are taken in turns with the base's, so their ratio is less troubled by it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jpeft
from train import batches, placing, session, sources, summary
from train import config as configs
from train.compare.config import Comparison, Forgetting
from train.compare.trials import Trial
from train.data import TaskData
from train.evaluate import Evaluator
from train.examples import Reader
from train.files import Rows
from train.folder import ADAPTER, write_whole, writing
from train.materials import Materials
from train.plan import Plan
from train.run import adapted
from train.schema import Config, DataConfig, EvaluationConfig
from train.step import make_scorer, make_step
from train.tasks import task_of

_STEPS, _CALLS = 8, 10


@dataclasses.dataclass(frozen=True)
class Costs:
    """trainable: parameters. file_bytes: of the saved adapter. step_seconds: median of a training step;
    step_bytes: temporaries that the compiler allots for it. call_seconds: median of scoring a batch; call_ratio: to
    the base's; merged: whether with the method folded into the weights. tokens: of a row in both batches.
    perplexity: of other text, before and after training, mean over seeds; of language models, where asked for.
    """

    trainable: int
    file_bytes: int
    step_seconds: float
    step_bytes: int | None
    call_seconds: float
    call_ratio: float
    merged: bool
    tokens: int
    perplexity: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class OtherText:
    """The rows by which forgetting is measured, and what the file of the comparison says of them."""

    rows: Rows
    settings: Forgetting

    @classmethod
    def read(cls, settings: Forgetting) -> OtherText:
        """Reads the rows. Raises JpeftError if there are none, or no such column."""
        rows = sources.read(settings.source)
        rows.require([settings.text])
        return cls(rows.select(range(min(settings.limit, len(rows)))), settings)

    def identity(self) -> str:
        """A hash of the texts and of how they are read."""
        told = [self.settings.max_length, *self.rows.dataset[self.settings.text]]
        return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()

    def task(self, limit: int, materials: Materials) -> tuple[TaskData, Reader]:
        """The texts as rows of at most `limit` tokens, and what read them."""
        settings, reader = self.settings, Reader(materials.base.tokenizer(), limit)
        data = DataConfig(source=settings.source, text=settings.text, max_length=settings.max_length)  # type: ignore[call-arg]
        kind = task_of(data, "causal-lm")
        return TaskData(kind, [], kind.examples(self.rows, reader), self.rows, self.rows, {}), reader


def measured(
    comparison: Comparison, trials: Sequence[Trial], materials: Materials, other: OtherText | None = None
) -> Costs:
    """The costs of one method with the runs `trials`; those that were measured before are read.

    Timed once, with the last seed; its adapter is on disk. other: text whose perplexity says what is forgotten.
    """
    path, last = comparison.folder / "measured" / f"{trials[-1].label}.json", trials[-1]
    config = comparison.run(last.label, last.rate, last.seed).model_copy(update={"data": materials.data})
    made_of = {
        "runs": [trial.folder.name for trial in trials],
        "configuration": configs.dumps(config),
        "other text": None if other is None else other.identity(),
        **summary.machine(),
    }
    found = _read(path)
    if found.get("of") == made_of:
        values = found["costs"]
        pair = values["perplexity"]
        return Costs(**{**values, "perplexity": tuple(pair) if pair else None})
    costs = _measure(config, trials, materials, other)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"of": made_of, "costs": dataclasses.asdict(costs)}, indent=2) + "\n")
    return costs


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _measure(config: Config, trials: Sequence[Trial], materials: Materials, other: OtherText | None) -> Costs:
    last = trials[-1]
    begun = adapted(config, materials)
    task = materials.examples(begun)
    plan = Plan(config, begun, task)
    mesh = materials.base.mesh
    step_seconds, step_bytes = _step(plan, begun, task, config.training.seed, mesh)

    base = materials.base.model(last.seed)
    trained = jpeft.load_adapter(last.folder / ADAPTER, base)
    merged = session.mergeable(trained)
    ready = jpeft.merge(trained, dequantize=True) if merged else jpeft.bake(trained)
    size = config.evaluation.batch_size or 4 * config.training.batch_size
    window = max(batches.in_order(plan.lengths, plan.buckets, size), key=lambda window: window.length)
    batch = placing.put(batches.Batches(task.kind, task.train)(window, size), mesh)
    base_seconds, call_seconds = _in_turns([_call(model, task, batch) for model in (base, ready)])
    perplexity = None
    if other is not None:
        # The base reads the same windows of text, although a prompt leaves an adapted model less room.
        limit = min(other.settings.max_length, session.context(trained) or other.settings.max_length)
        task, reader = other.task(limit, materials)
        score = functools.partial(_perplexity, config, task, reader, materials.base.mesh)
        after = [score(jpeft.load_adapter(one.folder / ADAPTER, base)) for one in trials]
        perplexity = score(base), statistics.mean(after)
    return Costs(
        trainable=jpeft.describe(begun).trainable,
        file_bytes=sum(file.stat().st_size for file in (last.folder / ADAPTER).rglob("*") if file.is_file()),
        step_seconds=step_seconds,
        step_bytes=step_bytes,
        call_seconds=call_seconds,
        call_ratio=call_seconds / base_seconds,
        merged=merged,
        tokens=window.length,
        perplexity=perplexity,
    )


def _step(plan: Plan, model: Any, task: TaskData, seed: int, mesh: Mesh | None) -> tuple[float, int | None]:
    """(median seconds, bytes of temporaries) of a step over the longest rows."""
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    adapter = jax.tree.map(jnp.copy, adapter)  # the step donates it
    layouts = placing.layouts(plan.transform, adapter, mesh, on_host=plan.on_host)
    init = jax.jit(plan.transform.init, out_shardings=None if layouts is None else layouts[1])
    state = init(adapter)
    window = next(window for window in plan.windows if window.length == max(plan.shapes))
    batch = placing.put(plan.batch(window), mesh, axis=1)
    step: Any = make_step(graphdef, task.kind, plan.recipe, layouts)
    rest = (buffers, frozen, batch, jax.random.key(seed))
    rates = plan.rates_at(0)
    compiled = step.lower(adapter, state, *rest, jnp.int32(0), rates).compile()
    took = []
    for number in range(1 + _STEPS):
        begun = time.perf_counter()
        adapter, state, _ = jax.block_until_ready(compiled(adapter, state, *rest, jnp.int32(number), rates))
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:]), getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)


def _call(model: Any, task: TaskData, batch: Any) -> Callable[[], Any]:
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    score = make_scorer(graphdef, task.kind)
    return lambda: jax.block_until_ready(score(adapter, buffers, frozen, batch))


def _in_turns(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Median seconds of each call, compiled before."""
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + _CALLS):
        for one, seconds in zip(calls, took, strict=True):
            begun = time.perf_counter()
            one()
            seconds.append(time.perf_counter() - begun)
    return [statistics.median(seconds[1:]) for seconds in took]


def _perplexity(config: Config, task: TaskData, reader: Reader, mesh: Mesh | None, model: Any) -> float:
    """The perplexity of other text."""
    graphdef, adapter, buffers, frozen = jpeft.partition(model)
    edges = batches.edges([len(example) for example in task.test])
    size = config.evaluation.batch_size or 4 * config.training.batch_size
    evaluation = EvaluationConfig(metrics=["perplexity"], answers="none")  # type: ignore[call-arg]
    score = Evaluator((graphdef, buffers, frozen), task, reader, evaluation, edges, size, mesh)(adapter)
    return score.metrics.get("perplexity", math.nan)
