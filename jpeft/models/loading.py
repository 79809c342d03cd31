"""Loading a model: from a Hugging Face folder, a hub id or a .gguf file, tensor by tensor into stacked arrays.

The model is built under `nnx.eval_shape`, so nothing is allocated before the file has been checked against it. Then
each variable is filled in turn: host memory holds the model once, plus one variable of it.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jpeft import paths, surgery
from jpeft.errors import JpeftError
from jpeft.models.attention import Attention
from jpeft.models.config import Config, read_json
from jpeft.models.families import Family, Slot, check_task, default_task, family, parse_config, slots
from jpeft.models.model import Model
from jpeft.models.packed import PackedSource, formats_of, open_packed
from jpeft.models.reading import Placement, placed, plan, read, read_packed
from jpeft.models.tensors import SafetensorsFolder, TensorInfo, TensorSource
from jpeft.quant import Format, format_of
from jpeft.quant.linear import in_place_of, targeted
from jpeft.sharding import Rules
from jpeft.variables import Trainable, retype

DTYPES = ("float32", "bfloat16", "float16")
POOLINGS = (None, "mean")
_REPORTED = 20  # entries of one kind in an error message


def load(
    source: str | Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    dtype: Any = None,
    pooling: str | None = None,
    remat: bool = False,
    attention: str = "auto",
    rngs: nnx.Rngs | None = None,
    revision: str | None = None,
    quantize: Format | str | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Model:
    """A pretrained model.

    source: a folder with config.json and safetensors, a hub id such as "HuggingFaceTB/SmolLM2-135M", or a .gguf file.
    task: "causal-lm", "sequence-classification", "token-classification", "masked-lm", "seq2seq-lm" or "base"; default:
    what config.json says. num_labels: classes of a classification head. dtype: "float32", "bfloat16" or "float16";
    default: the checkpoint's. pooling: how a classifier sums up a sequence, None for Hugging Face's way or "mean".
    remat: recompute each layer in the backward pass. attention: an implementation that `Attention` knows, by default
    the platform's fastest. rngs: seed of a head that the checkpoint does not have (default `nnx.Rngs(0)`); such a head
    is `Trainable`. revision: of a hub id.

    quantize: `jpeft.NF4()` or another format, or its name ("nf4", "fp4", "int4", "int8"): linear layers are quantised
    as they are read, so that the model is never held in full precision. "keep": the blocks of a .gguf file (Q4_0, Q4_1,
    Q8_0) stay as they are; without it they are dequantised. Checkpoints of bitsandbytes, GPTQ and AWQ (4 bits) are
    always kept as they are.

    mesh, rules: as in `jpeft.shard`, of which the result is the same, but each process reads and holds only the slices
    that its devices own. (What is quantised on the way is read whole, one tensor at a time.)

    Raises JpeftError for a source that cannot be read or trusted, and for missing, unexpected and wrongly shaped
    tensors, all of them at once.
    """
    raw, tensors = open_source(source, revision=revision)
    where = str(source)
    found, config = parse_config(raw, where)
    task = task or default_task(found, raw, where)
    check_task(task)
    relabelled = num_labels is not None and num_labels != config.num_labels
    if num_labels is not None:
        config = config.with_labels(num_labels)
    target = jnp.dtype(_dtype(dtype) if dtype is not None else _stored_dtype(tensors))
    config = _tied_as_stored(found, config, task, tensors)
    abstract = nnx.eval_shape(
        lambda: _build(found, config, task, target, pooling, remat, attention, nnx.Rngs(0)),
    )
    packing = _packing(abstract, found, tensors, quantize)
    placement = plan(abstract, packing, target, mesh, rules)
    return _fill(abstract, found, tensors, target, rngs or nnx.Rngs(0), relabelled, packing, placement)


def from_config(
    config: Mapping[str, Any],
    *,
    task: str | None = None,
    num_labels: int | None = None,
    dtype: Any = "float32",
    pooling: str | None = None,
    remat: bool = False,
    attention: str = "auto",
    rngs: nnx.Rngs | None = None,
) -> Model:
    """A randomly initialised model of the configuration that a config.json holds. Works under `nnx.eval_shape`.

    The arguments are those of `load`; `rngs` (default `nnx.Rngs(0)`) seeds all of it.
    """
    found, parsed = parse_config(config, "config")
    task = task or default_task(found, config, "config")
    check_task(task)
    if num_labels is not None:
        parsed = parsed.with_labels(num_labels)
    settings = (parsed, task, _dtype(dtype), pooling, remat, attention)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: _build(found, *settings, nnx.Rngs(0))))
    return nnx.merge(graphdef, _initial(*settings, (rngs or nnx.Rngs(0)).params()))


@functools.partial(jax.jit, static_argnums=range(6))
def _initial(
    config: Config, task: str, dtype: Any, pooling: str | None, remat: bool, attention: str, key: jax.Array
) -> nnx.State:
    # One compilation for all of the model's random numbers; made one by one they take a compilation each. The default
    # generator takes the compiler seconds for every variable.
    quick = jax.random.wrap_key_data(jax.random.bits(key, (4,), jnp.uint32), impl="unsafe_rbg")
    return nnx.state(_build(family(config.model_type), config, task, dtype, pooling, remat, attention, nnx.Rngs(quick)))


def _build(
    found: Family,
    config: Config,
    task: str,
    dtype: Any,
    pooling: str | None,
    remat: bool,
    attention: str,
    rngs: nnx.Rngs,
) -> Model:
    if pooling not in POOLINGS:
        raise JpeftError(f"pooling={pooling!r}: choose None (Hugging Face's own) or 'mean'")
    if pooling is not None and task != "sequence-classification":
        raise JpeftError(f"pooling={pooling!r}: only task='sequence-classification' pools, this is task={task!r}")
    if pooling is None and task == "sequence-classification" and config.raw.get("classifier_pooling") == "mean":
        pooling = "mean"  # as `save` writes it
    make: Any = found.class_for(task)
    return make(config, param_dtype=dtype, pooling=pooling, remat=remat, attention=Attention(attention), rngs=rngs)


def _dtype(dtype: Any) -> Any:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise JpeftError(f"dtype={dtype!r}: choose one of {list(DTYPES)}")
    return jnp.dtype(name)


def open_source(source: str | Path, *, revision: str | None = None) -> tuple[dict[str, Any], TensorSource]:
    """The config.json of a folder, hub id or .gguf file, and its tensors."""
    path = Path(source)
    if path.suffix == ".gguf" and (path.is_file() or not path.exists()):
        if not path.is_file():
            raise JpeftError(f"{path}: no such file")
        from jpeft.models.gguf import open_gguf

        return open_gguf(path)
    folder = local_folder(source, revision=revision)
    if not (folder / "config.json").is_file():
        raise JpeftError(f"{folder}: has no config.json; a model folder holds config.json and model.safetensors")
    raw = read_json(folder / "config.json")
    return raw, open_packed(raw, SafetensorsFolder(folder))


def local_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder of `source`; a hub id is downloaded into huggingface_hub's cache: config and safetensors only."""
    path = Path(source)
    if path.is_dir():
        return path
    name = str(source)
    if path.exists() or isinstance(source, Path) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise JpeftError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise JpeftError(f"{source}: neither a folder here nor a hub id: {error}") from error
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise JpeftError(
            f"{source}: no such folder here, and the hub did not give it ({type(error).__name__}: {error}). Check the "
            "name and the connection, or download it elsewhere and give the folder"
        ) from error


def _stored_dtype(source: TensorSource) -> Any:
    sizes: Counter[str] = Counter()
    packed = formats_of(source) if isinstance(source, PackedSource) and source.stays else {}
    for name, info in source.tensors.items():
        if info.dtype.name in DTYPES and name not in packed:
            sizes[info.dtype.name] += int(np.prod(info.shape))
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _tied_as_stored(found: Family, config: Config, task: str, source: TensorSource) -> Config:
    """`tie_word_embeddings` as the file has it: writers have set the flag wrongly in both directions."""
    if found.tied is None or task not in found.classes:
        return config
    head, embedding = found.tied
    prefix = found.classes[task].base_prefix
    embedding = embedding if embedding in source.tensors else f"{prefix}.{embedding}"
    if head not in source.tensors or embedding not in source.tensors or not config.tie_word_embeddings:
        return config
    return dataclasses.replace(
        config, tie_word_embeddings=bool(np.array_equal(source.read(head), source.read(embedding)))
    )


@dataclasses.dataclass
class _Report:
    missing: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)

    def check(self, where: str) -> None:
        lines = []
        for kind in ("missing", "wrong", "unexpected"):
            entries = getattr(self, kind)
            more = [f"and {len(entries) - _REPORTED} more"] if len(entries) > _REPORTED else []
            title = {"missing": "missing", "wrong": "of the wrong shape or dtype", "unexpected": "unexpected"}[kind]
            if entries:
                lines.append(f"  {title} ({len(entries)}): " + ", ".join([*entries[:_REPORTED], *more]))
        if lines:
            raise JpeftError(
                f"{where}: the tensors do not fit config.json\n" + "\n".join(lines) + "\n"
                "  check that config.json belongs to these files, or choose another task="
            )


def _packing(
    model: Model, found: Family, source: TensorSource, quantize: Format | str | None
) -> dict[surgery.Path, Format]:
    """The format of each linear layer that will be held quantised, by its path."""
    stored = formats_of(source)
    stays = isinstance(source, PackedSource) and source.stays
    if quantize not in (None, "keep"):
        form = format_of(quantize)
        if stored and stays:
            raise JpeftError(
                f"{source.where}: quantize={quantize!r}, but the checkpoint is quantised already, as "
                f"{next(iter(stored.values()))}; leave quantize out to keep it so"
            )
        return dict.fromkeys(targeted(model, form), form)
    if quantize == "keep" and not stored:
        raise JpeftError(f"{source.where}: quantize='keep', but no matrix there is stored in a format that can be kept")
    if quantize is None and not stays:
        return {}
    packing: dict[surgery.Path, Format] = {}
    owners = {node.path: node for node in paths.nodes(model)}
    for slot in slots(model, found) if stored else []:
        names = [_stored_name(model, found, name, source.tensors) for name in slot.names]
        formats = {stored.get(name) for name in names if name in source.tensors}
        if formats <= {None} or not isinstance(owners[slot.path[:-1]].module, nnx.Linear):
            continue
        kept = formats.pop()
        if formats or kept is None:
            said = ", ".join(f"{name}: {stored.get(name)}" for name in names[:3])
            raise JpeftError(
                f"{source.where}: the layers of {slot.key!r} differ in format ({said}, ...), and a stack of layers has "
                "one; load them without quantize='keep', or choose a format"
            )
        packing[slot.path[:-1]] = kept
    return packing


def _fill(
    model: Model,
    found: Family,
    source: TensorSource,
    dtype: Any,
    rngs: nnx.Rngs,
    relabelled: bool,
    packing: Mapping[surgery.Path, Format],
    placement: Placement,
) -> Model:
    tensors = source.tensors
    wanted = slots(model, found)
    stored = {slot.path: [_stored_name(model, found, name, tensors) for name in slot.names] for slot in wanted}
    new = _new_parts(model, wanted, stored, tensors, relabelled)
    graphdef, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    report = _Report()
    used: set[str] = set()
    key = rngs.params() if new else None
    for slot in wanted:
        if slot.path[0] in new:
            used.update(name for name in stored[slot.path] if name in tensors)
            continue
        shape = tuple(variables[slot.path].get_value().shape)
        shape = shape[1:] if slot.stacked else shape
        # Quantised matrices are stored (out, in) in every family.
        kept = _is_packed(slot, packing) and stored[slot.path][0] in formats_of(source)
        shape = (*shape[:-2], shape[-1], shape[-2]) if slot.transpose or kept else shape
        for name in stored[slot.path]:
            used.add(name)
            info = tensors.get(name)
            if info is None:
                report.missing.append(name)
            elif info.shape != shape or not jnp.issubdtype(info.dtype, jnp.floating) or info.dtype.itemsize == 1:
                report.wrong.append(f"{name} {info.dtype.name}{list(info.shape)}, expected {list(shape)}")
    tied = {name for key in found.tied or () for name in (key, f"{model.base_prefix}.{key}")}
    used |= tied if model.config.tie_word_embeddings else set()
    for name in tensors:
        if name not in used and not found.ignores(model, name):
            report.unexpected.append(name)
    report.check(source.where)
    filled: list[tuple[Any, nnx.Variable]] = []
    packed: dict[surgery.Path, Callable[[Any], Any]] = {}
    for slot in wanted:
        variable = variables[slot.path]
        if _is_packed(slot, packing) and slot.path[0] not in new:
            form = packing[slot.path[:-1]]
            kernel = read_packed(source, slot, stored[slot.path], form, dtype, placement)
            packed[slot.path[:-1]] = functools.partial(in_place_of, kernel=kernel, compute_dtype=form.compute_dtype)
            value = variable  # still abstract; its module is replaced below
        elif slot.path[0] in new:
            fresh = _fresh(key, slot.key, variable.get_value().shape, model.config.initializer_range)
            at = placement.at(slot.path)
            value = variable.replace(fresh if at is None else placed(fresh.shape, at, np.asarray(fresh).__getitem__))
        else:
            shape = variable.get_value().shape
            value = variable.replace(read(source, slot, stored[slot.path], shape, dtype, placement.at(slot.path)))
            value = retype(value, nnx.Param) if isinstance(value, Trainable) else value
        filled.append((slot.path, value))
    made: Any = nnx.merge(graphdef, nnx.from_flat_state(filled))
    if packed:
        made = surgery.replace(made, packed)
    placement.tell(made)
    return made


def _is_packed(slot: Slot, packing: Mapping[surgery.Path, Format]) -> bool:
    return slot.path[:-1] in packing and slot.path[-1] == "kernel"


def _stored_name(model: Model, found: Family, name: str, tensors: Mapping[str, Any]) -> str:
    """The name under which the file has it: checkpoints of a bare model leave the base prefix out, old ones rename."""
    short = name.removeprefix(f"{model.base_prefix}.") if model.base_prefix else name
    names = [spelling for form in dict.fromkeys((name, short)) for spelling in found.spellings(form)]
    return next((stored for stored in names if stored in tensors), name)


def _new_parts(
    model: Model,
    wanted: list[Slot],
    stored: Mapping[Any, list[str]],
    tensors: Mapping[str, TensorInfo],
    relabelled: bool,
) -> set[str]:
    """The renewable attributes of which the file has nothing, and the heads for another number of classes."""
    new = set()
    for part in model.renewable:
        names = [name for slot in wanted if slot.path[0] == part for name in stored[slot.path]]
        if names and (not any(name in tensors for name in names) or (relabelled and part in model.heads)):
            new.add(part)
    return new


def _fresh(key: Any, name: str, shape: tuple[int, ...], stddev: float) -> jax.Array:
    kind = name.rpartition("/")[2]
    if kind == "bias":
        return jnp.zeros(shape, jnp.float32)
    if kind == "scale":
        return jnp.ones(shape, jnp.float32)
    return stddev * jax.random.normal(jax.random.fold_in(key, zlib.crc32(name.encode())), shape, jnp.float32)
