"""The file of a comparison: what a run has, with `methods:`, `seeds:` and `learning_rates:` in place of one each.

Read as strictly as a run's, all faults in one message.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from train import config as configs
from train import starts
from train import strict_yaml as sy
from train.schema import Config, Positive, Section
from train.strict_yaml import Fault, Faults, Node
from train.tasks import task_of

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


class Grid(Section):
    """What a comparison has of its own beside the methods."""

    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        min_length=1, description="training.seed of the runs of each method at its chosen rate"
    )
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="training.learning_rate, the same choice for every method"
    )
    validation_size: Annotated[int | float, Field(gt=0)] = Field(
        0.2, description="training rows (or a fraction of them) that choose among several learning rates"
    )


class Forgetting(Section):
    """Other text, whose perplexity before and after says what a language model forgets."""

    source: str = Field(description="file, package or hub id of the rows")
    text: str = Field(description="column with the text")
    limit: Positive = Field(200, description="rows, from the first")
    max_length: Positive = Field(256, description="tokens per row")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A checked file. base: everything that the runs share. methods: by label, as `method:` of a run has them."""

    base: Config
    methods: Mapping[str, Any]
    grid: Grid
    forgetting: Forgetting | None

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.base.output.folder)

    def run(self, label: str, rate: float, seed: int, *, searching: bool = False) -> Config:
        """The configuration of one run, with a folder of its own; searching: for the choice of the rate."""
        within = "rates" if searching else "runs"
        folder = self.folder / within / label / f"rate-{rate:g}-seed-{seed}"
        training = self.base.training.model_copy(update={"learning_rate": rate, "seed": seed})
        output = self.base.output.model_copy(update={"folder": str(folder)})
        return self.base.model_copy(update={"method": self.methods[label], "training": training, "output": output})


def load(path: Path, overrides: Sequence[str] = ()) -> Comparison:
    """The comparison in `path` with `key=value` overrides. Raises JpeftError with every fault found."""
    return configs.read(path, overrides, _build, _required())


def _required() -> list[str]:
    return ["model", "methods", "data", "output", "seeds", "learning_rates"]


def _build(root: Node, faults: Faults) -> Comparison | None:
    if not isinstance(root.value, dict):
        faults.append(Fault(root.where, "", f"{sy.show(root)} is not a mapping of {', '.join(_required())}"))
        return None
    children, shared = dict(root.value), [name for name in Config.model_fields if name != "method"]
    known = [*shared, "methods", *Grid.model_fields, "forgetting"]
    for name in [name for name in children if name not in known]:
        child = children.pop(name)
        several = f"unknown key; did you mean {name}s? (known: {', '.join(known)})"
        said = several if f"{name}s" in known else configs.unknown(name, child, "", known)
        faults.append(Fault(child.where, name, said))
    methods = _methods(children.pop("methods", None), root, faults)
    grid = configs.build_section(
        Grid, Node({n: children.pop(n) for n in Grid.model_fields if n in children}, root.where), "", faults
    )
    other = children.pop("forgetting", None)
    forgetting = None if other is None else configs.build_section(Forgetting, other, "forgetting", faults)
    _set_by_the_grid(children, faults)
    found = next((node for node in methods.values() if isinstance(node, Node)), Node({}, root.where))
    mine: Faults = []
    base = configs.build(Node({**children, "method": found}, root.where), mine)
    faults += [fault for fault in mine if not fault.key.startswith("method")]
    made = {label: configs.build_method(node, f"methods.{label}", faults) for label, node in methods.items()}
    if base is None or grid is None or faults:
        return None
    rates = [f"{rate:g}" for rate in grid.learning_rates]  # as folders are named
    for name, values, said in (("seeds", grid.seeds, ""), ("learning_rates", rates, " (six digits count)")):
        if len(set(values)) < len(values):
            faults.append(Fault(root.value[name].where, name, f"a value is given twice{said}"))
    size = grid.validation_size
    if size >= 1 and not float(size).is_integer():
        where = root.value["validation_size"].where
        faults.append(Fault(where, "validation_size", f"{size} is neither a number of rows nor a fraction below 1"))
    head = task_of(base.data, base.model.task).head
    if other is not None and head != "causal-lm":
        faults.append(Fault(other.where, "forgetting", f"is for causal-lm, whose perplexity it is; this is {head}"))
    for label, method in made.items():
        wrong = starts.faults(base.model_copy(update={"method": method}))
        faults += [Fault(methods[label].where, f"methods.{label}", fault) for fault in wrong]
    return Comparison(base, made, grid, forgetting)


def _methods(node: Node | None, root: Node, faults: Faults) -> dict[str, Node]:
    if node is None or not isinstance(node.value, dict) or not node.value:
        said = "required" if node is None else f"{sy.show(node)} is not a mapping of methods"
        shown = "{lora: {name: lora, rank: 8}, bitfit: {name: bitfit}}"
        faults.append(Fault((node or root).where, "methods", f"{said}; give labels of your own: {shown}"))
        return {}
    for label, child in node.value.items():
        if not _LABEL.fullmatch(label):
            said = "a label has letters, digits, _ . + and -, as a folder's name, and at most 64 of them"
            faults.append(Fault(child.where, f"methods.{label}", said))
    return node.value


def _set_by_the_grid(children: Mapping[str, Node], faults: Faults) -> None:
    """Faults for keys of a run that would be ignored here."""
    instead = {
        ("training", "learning_rate"): "learning_rates sets it, the same choice for every method",
        ("training", "seed"): "seeds sets it",
        ("data", "streaming"): "the rows of a comparison are read once for all its runs; leave it out",
        ("evaluation", "best"): "the held-out rows would choose the adapters that they score; leave it out",
        ("output", "overwrite"): "a comparison goes on with what is finished; give another output.folder",
    }
    for (section, key), message in instead.items():
        given = children[section].value if section in children else None
        if isinstance(given, dict) and key in given:
            faults.append(Fault(given[key].where, f"{section}.{key}", message))
