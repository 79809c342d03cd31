"""How methods start from what a run has and a method's dataclass has not: words, batches of data, another run.

`init_text` is tokenised by the run's tokenizer. `init: eva` sees the first training batches, `init: loftq` the weights
before quantisation. `training.start_from` takes the arrays of a finished run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jpeft.errors import JpeftError
from train.schema import Config

if TYPE_CHECKING:
    from train.materials import Materials

Encode = Callable[[str], list[int]]

EVA_BATCHES = 8
# By the field of a method's dataclass that makes sense of the key: key, type, default, meaning.
_KEYS: dict[str, tuple[str, Any, Any, str]] = {
    "text_ids": (
        "init_text",
        str | None,
        None,
        "words to start from, which the run's tokenizer makes text_ids of; init is text then",
    ),
    "rank_pattern": (
        "eva_batches",
        int | None,
        EVA_BATCHES,
        "with init: eva, how many training batches are looked at before the first step",
    ),
}


def more_keys(kind: type) -> dict[str, tuple[Any, Any, str]]:
    """(type, default, meaning) of the keys that a method has in a file and not in its dataclass."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: rest for field, (key, *rest) in _KEYS.items() if field in names and "init" in names}  # type: ignore[misc]


def settings(entry: Mapping[str, Any], encode: Encode) -> dict[str, Any]:
    """The arguments of the dataclass that an entry of `method:` means. encode: from words to token ids.

    Raises JpeftError for keys that do not go together.
    """
    made = {("name" if key == "adapter_name" else key): value for key, value in entry.items() if key != "name"}
    text, batches = made.pop("init_text", None), made.pop("eva_batches", None)
    if text is not None:
        if made.get("init", "text") != "text" or made.get("text_ids"):
            raise JpeftError(f"init_text={text!r} says what to start from; leave init and text_ids out beside it")
        ids = encode(text)
        if not ids:
            raise JpeftError(f"init_text={text!r} has no token; give a few words")
        made |= {"init": "text", "text_ids": ids}
    if batches is not None and (made.get("init") != "eva" or batches < 1):
        raise JpeftError(f"eva_batches={batches}: it is a number of at least 1, beside init: eva")
    return made


def faults(config: Config) -> Iterator[str]:
    """What is wrong with how the methods of `config` are to start."""
    entries = config.method if isinstance(config.method, list) else [config.method]
    for number, entry in enumerate(entries):
        init = entry.get("init")
        if init in ("eva", "loftq") and number:
            yield f"init={init}: only the first method of a list starts so; put it first"
        if init == "loftq" and config.model.base in (None, "keep"):
            yield (
                "init=loftq makes up for what quantisation loses; let model.base quantise a checkpoint that is in full "
                "precision (nf4, fp4, int4, int8)"
            )


def adapted(config: Config, materials: Materials) -> Any:
    """The model of `config` as its first step finds it, or, of an abstract base, its shapes.

    The shapes of `init: eva` are those of equal ranks. Raises JpeftError for starts that cannot be.
    """
    import jax
    from flax import nnx

    import jpeft
    from train import config as configs

    for said in faults(config):
        raise JpeftError(f"method: {said}")
    base, key = materials.base, jax.random.key(config.training.seed)
    model: Any = base.model(config.training.seed)
    first, *rest = configs.methods_of(config, lambda text: base.tokenizer()(text, add_special_tokens=False).input_ids)
    init = getattr(first, "init", None)
    if base.abstract:
        first = dataclasses.replace(first, init="kaiming") if init in ("eva", "loftq") else first
        # Some methods start from values of the base, which a plan does not have.
        return nnx.eval_shape(lambda model: jpeft.compose(first, *rest)(model, rngs=key), model)
    if init == "eva":
        entry: Any = config.method[0] if isinstance(config.method, list) else config.method
        made: Any = _eva(first, model, entry.get("eva_batches", EVA_BATCHES), config, materials, key)
    elif init == "loftq":
        made = jpeft.loftq(base.unquantized(config.training.seed), first, model, rngs=key)
    else:
        made = first(model, rngs=key)
    made = jpeft.compose(*rest)(made, rngs=key) if rest else made
    return made if config.training.start_from is None else _continued(made, model, config, materials)


def _eva(method: Any, model: Any, count: int, config: Config, materials: Materials, key: Any) -> Any:
    """EVA over `count` batches of training rows, as the first epoch's order has them, padded to one length."""
    import jpeft
    from train import batches

    task, training = materials.examples(model), config.training
    lengths = [len(example) for example in task.train]
    size = min(training.batch_size, len(lengths))
    windows = batches.plan(lengths, batches.edges(lengths)[-1:], size, training.seed, 0)
    feed = batches.Batches(task.kind, task.train, training.seed)
    # Rows that fill up a smaller batch would be counted as text.
    seen = [feed(window, size) for window in windows if len(window.rows) == size][:count]
    try:
        return jpeft.eva(model, method, seen, call=task.kind.losses, rngs=key)
    except JpeftError as error:
        raise JpeftError(f"{error} (method.eva_batches is {count}, and {len(seen)} were seen)") from None


def _continued(model: Any, base: Any, config: Config, materials: Materials) -> Any:
    """`model` with the arrays of the run `training.start_from`; its head if both have the same labels."""
    import jpeft
    from jpeft.checkpoint import read_adapter
    from train import config as configs
    from train.folder import ADAPTER, CONFIG

    home = Path(str(config.training.start_from))
    _, found = read_adapter(home / ADAPTER, base)
    parts, groups = jpeft.partition(model), jpeft.param_labels(model)
    wanted = {**parts.adapter, **parts.buffers}
    heads = {name for name in parts.adapter if groups[name] == "head"}
    if configs.load(home / CONFIG).data.labels != materials.data.labels:
        found = {name: value for name, value in found.items() if name not in heads}
        wanted = {name: value for name, value in wanted.items() if name not in heads}
    shapes = [{name: tuple(value.shape) for name, value in arrays.items()} for arrays in (found, wanted)]
    odd = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if odd:
        raise JpeftError(
            f"training.start_from: {home} is a run of another method: {odd[0]!r} is {shapes[0].get(odd[0], 'not')} "
            f"there and {shapes[1].get(odd[0], 'not')} here ({len(odd)} arrays differ)"
        )
    typed = {name: found[name].astype(value.dtype) for name, value in wanted.items()}
    adapter, buffers = ({n: typed.get(n, v) for n, v in old.items()} for old in (parts.adapter, parts.buffers))
    return jpeft.combine(parts.graphdef, adapter, buffers, parts.frozen)
