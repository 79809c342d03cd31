"""Adapters on disk: refused by name when they do not belong, whole or not there, on any mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jpeft
from tests import zoo

# Callbacks of Orbax's event loop that arrive after a load has failed, as it must here; the failure itself was raised.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")


def base(seed: int = 0, **config: Any) -> Any:
    return zoo.UserModel(nnx.Rngs(seed), **{"stacked": True, **config})


def trained(model: Any) -> Any:
    parts = jpeft.partition(jpeft.LoRA(rank=2)(model, rngs=nnx.Rngs(0)))
    return jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return jpeft.save_adapter(tmp_path / "adapter", trained(base()))


def edit(folder: Path, **changes: Any) -> None:
    """Overwrites parts of what was written beside the arrays."""
    file = folder / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    content["custom_metadata"].update(changes)
    file.write_text(json.dumps(content))


def test_another_base_is_refused(folder: Path) -> None:
    with pytest.raises(jpeft.JpeftError, match=r"trained on another base:\n.*values of 'embed/embedding' differ"):
        jpeft.load_adapter(folder, base(1))
    assert jpeft.load_adapter(folder, base(1), check_base=False)
    with pytest.raises(jpeft.JpeftError, match=r"'layers/up/kernel' had shape \(3, 12, 20\) and has \(4, 12, 20\)"):
        jpeft.load_adapter(folder, base(depth=4))
    with pytest.raises(
        jpeft.JpeftError, match=r"no array 'layers/up/kernel'(.|\n)*'layers/0/up/kernel' that was not there"
    ):
        jpeft.load_adapter(folder, base(stacked=False))
    with pytest.raises(jpeft.JpeftError, match="trained on another base"):
        jpeft.load_adapter(folder, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_the_same_base_in_another_precision_is_accepted(folder: Path) -> None:
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(base()))
    model = base()
    nnx.update(model, cast)
    loaded = jpeft.partition(jpeft.load_adapter(folder, model))
    assert loaded.frozen["layers/up/kernel"].dtype == jnp.bfloat16
    assert jnp.array_equal(
        loaded.adapter["layers/up/lora/a"], jpeft.partition(trained(base())).adapter["layers/up/lora/a"]
    )


def test_another_method_is_refused(folder: Path) -> None:
    edit(folder, methods=[jpeft.LoRA(rank=4).to_dict()])
    with pytest.raises(
        jpeft.JpeftError, match=r"'layers/up/lora/a' has shape \(3, 12, 2\) in the file and \(3, 12, 4\)"
    ):
        jpeft.load_adapter(folder, base())
    edit(folder, methods=[jpeft.LoRA(rank=2, targets="up").to_dict()])
    with pytest.raises(jpeft.JpeftError, match="'layers/down/lora/a' has no place in the model"):
        jpeft.load_adapter(folder, base())
    edit(folder, methods=[jpeft.LoRA(rank=2, targets=["up", "down"], name="other").to_dict()])
    with pytest.raises(jpeft.JpeftError, match="'layers/up/other/a' is missing in the file"):
        jpeft.load_adapter(folder, base())
    edit(folder, methods=[{"method": "from_the_future", "rank": 3}])
    with pytest.raises(jpeft.JpeftError, match="unknown method 'from_the_future'"):
        jpeft.load_adapter(folder, base())
    edit(folder, methods=[{"method": "lora", "rank": 2, "newer_field": 1}])
    with pytest.raises(jpeft.JpeftError, match="unknown fields 'newer_field'"):
        jpeft.load_adapter(folder, base())
    edit(folder, methods="lora")
    with pytest.raises(jpeft.JpeftError, match="cannot be used"):
        jpeft.load_adapter(folder, base())
    edit(folder, methods=[{"method": "lora", "targets": "q_proj"}])
    with pytest.raises(jpeft.JpeftError, match="does not fit this model: .*'q_proj' matches nothing"):
        jpeft.load_adapter(folder, base())


def test_a_newer_format_is_refused(folder: Path) -> None:
    edit(folder, version=2)
    with pytest.raises(jpeft.JpeftError, match="format version 2; this jpeft reads up to 1"):
        jpeft.load_adapter(folder, base())


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    with pytest.raises(jpeft.JpeftError, match="there is no folder"):
        jpeft.load_adapter(tmp_path / "missing", base())
    with pytest.raises(jpeft.JpeftError, match="no complete jpeft adapter"):
        jpeft.load_adapter(tmp_path, base())
    ocp.save(tmp_path / "other", {"a": jnp.ones(3)})
    with pytest.raises(jpeft.JpeftError, match="not an adapter that jpeft saved"):
        jpeft.load_adapter(tmp_path / "other", base())


def test_damage_is_one_clear_error(folder: Path) -> None:
    for file in sorted(folder.glob("adapter/**/d/*")):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(jpeft.JpeftError, match="cannot be read|is damaged"):
        jpeft.load_adapter(folder, base())


@pytest.mark.parametrize("values", [{"base": {}}, {"base": {"embed/embedding": {"shape": [1]}}}, {"base": 3}])
def test_a_tampered_description_is_refused(folder: Path, values: dict[str, Any]) -> None:
    edit(folder, **values)
    with pytest.raises(jpeft.JpeftError):
        jpeft.load_adapter(folder, base())


def test_nothing_is_overwritten_unasked(folder: Path) -> None:
    with pytest.raises(jpeft.JpeftError, match="exists; choose another folder or pass overwrite=True"):
        jpeft.save_adapter(folder, trained(base()))
    jpeft.save_adapter(folder, jpeft.LoRA(rank=3)(base(), rngs=1), overwrite=True)
    assert jpeft.applied(jpeft.load_adapter(folder, base()))[0].rank == 3


def test_unusable_places_and_models(tmp_path: Path) -> None:
    with pytest.raises(jpeft.JpeftError, match="nothing trainable; apply a method first"):
        jpeft.save_adapter(tmp_path / "a", base())
    (tmp_path / "file").write_text("")
    with pytest.raises(jpeft.JpeftError, match="cannot write"):
        jpeft.save_adapter(tmp_path / "file" / "adapter", trained(base()))


def test_a_predicate_is_saved_by_the_names_it_chose(tmp_path: Path) -> None:
    adapted = jpeft.LoRA(rank=2, targets=lambda name, module: name.endswith("1.up"))(base(), rngs=0)
    jpeft.save_adapter(tmp_path / "a", adapted)
    loaded = jpeft.load_adapter(tmp_path / "a", base())
    assert jpeft.applied(loaded)[0].targets == (r"^layers\.1\.up$",)
    assert jpeft.partition(loaded).adapter["layers/up/lora/a"].shape[0] == 1


def test_moves_between_meshes(tmp_path: Path) -> None:
    def spread(model: Any, devices: int) -> Any:
        mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

        def place(a: jax.Array) -> jax.Array:
            axis = next((i for i, size in enumerate(a.shape) if size % devices == 0), None)
            return jax.device_put(
                a, NamedSharding(mesh, PartitionSpec(*("fsdp" if i == axis else None for i in range(a.ndim))))
            )

        parts = jpeft.partition(model)
        return jpeft.combine(parts.graphdef, *({k: place(v) for k, v in part.items()} for part in parts[1:]))

    expected = jpeft.partition(trained(base())).adapter
    jpeft.save_adapter(tmp_path / "a", spread(trained(base()), 4))
    for target in (base(), spread(base(), 2), spread(base(), 8)):
        adapter = jpeft.partition(jpeft.load_adapter(tmp_path / "a", target)).adapter
        assert all(jnp.array_equal(adapter[key], value) for key, value in expected.items())


def test_a_killed_save_leaves_no_adapter(tmp_path: Path) -> None:
    """The process dies in the middle of writing: what is there is not taken for an adapter."""
    script = textwrap.dedent(
        f"""
        import os, pathlib, jpeft
        from flax import nnx
        model = jpeft.LoRA(rank=2)(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=0)
        def die(*args, **kwargs):
            os._exit(9)
        os.rename = os.replace = pathlib.Path.rename = pathlib.Path.replace = die
        jpeft.save_adapter({str(tmp_path / "adapter")!r}, model)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, env=_environment())
    assert done.returncode == 9, done.stderr.decode()[-2000:]
    with pytest.raises(jpeft.JpeftError, match="there is no folder|no complete jpeft adapter"):
        jpeft.load_adapter(tmp_path / "adapter", nnx.Linear(4, 4, rngs=nnx.Rngs(0)))


def _environment() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def test_overwriting_replaces_adapters_only(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("days")
    for name in ("work", "file"):
        with pytest.raises(jpeft.JpeftError):
            jpeft.save_adapter(tmp_path / name, trained(base()), overwrite=True)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "file").read_text() == "days"


def test_the_old_adapter_stays_until_the_new_one_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orbax.checkpoint import v1 as ocp

    for kind in (OSError, ValueError):  # Python's own, and what TensorStore makes of it

        def full(new: Path, *args: Any, kind: type[Exception] = kind, **kwargs: Any) -> None:
            Path(f"{new}.orbax-checkpoint-tmp").mkdir()
            raise kind("No space left on device")

        monkeypatch.setattr(ocp, "save_checkpointables", full)
        with pytest.raises(jpeft.JpeftError, match="cannot write .*No space left"):
            jpeft.save_adapter(folder, jpeft.LoRA(rank=3)(base(), rngs=1), overwrite=True)
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]
    assert jpeft.applied(jpeft.load_adapter(folder, base()))[0].rank == 2


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = base()
    model.layers = jpeft.LoRA(rank=2)(model.layers, rngs=0)
    with pytest.raises(jpeft.JpeftError, match="apply methods to the whole model, not to a part of it"):
        jpeft.save_adapter(tmp_path / "a", model)
    with pytest.raises(jpeft.JpeftError, match="the model is abstract"):
        jpeft.save_adapter(tmp_path / "a", nnx.eval_shape(lambda: trained(base())))
    for path in ("gs://bucket/a", "x" * 300, "a\0b"):
        with pytest.raises(jpeft.JpeftError, match="cannot be used|no path"):
            jpeft.save_adapter(path, trained(base()))


def test_state_that_changes_in_use_is_not_the_base(tmp_path: Path) -> None:
    class Normed(nnx.Module):
        def __init__(self) -> None:
            self.linear, self.norm = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    adapted = jpeft.LoRA(rank=2)(Normed(), rngs=0)
    adapted.norm.mean.set_value(jnp.ones(4))
    jpeft.save_adapter(tmp_path / "a", adapted)
    assert jpeft.load_adapter(tmp_path / "a", Normed())


def test_expressions_that_never_end_are_not_run(tmp_path: Path) -> None:
    endless = r"^(layers\.?|[a-z]+)+up$"
    adapted = jpeft.LoRA(rank=2, targets=endless)(base(), rngs=0)  # the user's own, on their own names
    folder = jpeft.save_adapter(tmp_path / "a", adapted)
    (method,) = jpeft.applied(jpeft.load_adapter(folder, base()))
    assert method.targets == (r"^layers\.up$",)  # saved by what it chose
    for changes in ({"targets": [endless]}, {"exclude": [endless]}, {"targets": ["up"], "rank_pattern": {endless: 1}}):
        edit(folder, methods=[{"method": "lora", "rank": 2, **changes}])
        with pytest.raises(jpeft.JpeftError, match="cannot be used: LoRA, .*it repeats a choice"):
            jpeft.load_adapter(folder, base())
    with pytest.raises(jpeft.JpeftError, match="LoRA, rank_pattern: the regular expression"):
        jpeft.save_adapter(tmp_path / "b", jpeft.LoRA(rank=2, rank_pattern={endless: 1})(base(), rngs=0))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"custom_metadata": ' + "[" * 100_000, "null", "\ufeff{}", '{"custom_metadata": 3}']
)
def test_hostile_json_is_refused(folder: Path, text: str) -> None:
    (folder / "_CHECKPOINT_METADATA").write_text(text)
    with pytest.raises(jpeft.JpeftError):
        jpeft.load_adapter(folder, base())


@pytest.mark.parametrize(
    "config", [{"layers": [float("inf")]}, {"rank_pattern": "abc"}, {"rank": "8"}, {"targets": {"q": 1}}, {"alpha": []}]
)
def test_hostile_configurations_are_refused(folder: Path, config: dict[str, Any]) -> None:
    edit(folder, methods=[{"method": "lora", **config}])
    with pytest.raises(jpeft.JpeftError, match="cannot be used"):
        jpeft.load_adapter(folder, base())


@pytest.mark.parametrize(
    "methods",
    [
        [{"method": "lora", "rank": 1, "name": f"n{number}"} for number in range(200)],
        [{"method": "lora", "rank": 10**9}],
        [{"method": "adapter_fusion", "adapter": {"method": "pfeiffer"}, "tasks": 10**8}],
        [{"method": "prompt_tuning", "num_virtual_tokens": 10**12}],
    ],
)
def test_a_small_file_cannot_claim_much(folder: Path, methods: list[dict[str, Any]]) -> None:
    edit(folder, methods=methods)
    with pytest.raises(jpeft.JpeftError, match="cannot be used: .*more than"):
        jpeft.load_adapter(folder, base())
