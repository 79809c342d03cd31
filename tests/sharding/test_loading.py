"""Models loaded onto a mesh: the same as loaded and then placed, with each byte that is owned read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.models.tensors import SafetensorsFolder
from tests.sharding.test_methods import CONFIGS
from tests.sharding.training import Counted, counting


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setattr(SafetensorsFolder, "read", counting(SafetensorsFolder.read))
    Counted.taken = 0
    return Counted


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jpeft.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        name: jpeft.models.from_config(CONFIGS[name][0], task=CONFIGS[name][1], rngs=nnx.Rngs(0))
        for name in ("llama", "gpt2", "bert")
    }
    return {name: jpeft.models.save(model, root / name) for name, model in made.items()}


def the_same(found: Any, wanted: Any) -> None:
    (graphdef, state), (graphdef_wanted, state_wanted) = nnx.split(found), nnx.split(wanted)
    assert graphdef == graphdef_wanted  # what modules were told of the mesh is part of it
    assert jax.tree.structure(state) == jax.tree.structure(state_wanted)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_wanted), strict=True):
        assert a.sharding == b.sharding
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_slices_are_read_once(
    name: str, folders: dict[str, Path], mesh: jax.sharding.Mesh, counted: type[Counted]
) -> None:
    loaded = jpeft.models.load(folders[name], mesh=mesh)
    stored = sum(np.asarray(array).nbytes for array in jax.tree.leaves(nnx.state(loaded)))
    assert counted.taken == stored  # and not twice, although `data` holds everything twice
    the_same(loaded, jpeft.shard(jpeft.models.load(folders[name]), mesh))


def test_quantised_while_loading(folders: dict[str, Path], mesh: jax.sharding.Mesh, tmp_path: Path) -> None:
    form = jpeft.NF4(block_size=4)
    loaded = jpeft.models.load(folders["llama"], mesh=mesh, quantize=form)
    wanted = jpeft.shard(jpeft.models.load(folders["llama"], quantize=form), mesh)
    the_same(loaded, wanted)
    assert loaded.layers.layer.mlp.up_proj.codes[...].addressable_shards[0].data.shape == (2, 12, 4)
    # A checkpoint that is stored quantised is cut as it is.
    kept = jpeft.models.save(jpeft.models.load(folders["llama"], quantize=form), tmp_path / "nf4")
    the_same(jpeft.models.load(kept, mesh=mesh), jpeft.shard(jpeft.models.load(kept), mesh))


def test_heads_that_no_file_has_and_rules(folders: dict[str, Path], mesh: jax.sharding.Mesh) -> None:
    settings: dict[str, Any] = {"task": "sequence-classification", "num_labels": 3}
    rules = {"q_proj": P(), "score": P("fsdp")}
    loaded = jpeft.models.load(folders["llama"], mesh=mesh, rules=rules, **settings)
    the_same(loaded, jpeft.shard(jpeft.models.load(folders["llama"], **settings), mesh, rules))
    assert loaded.score.kernel[...].sharding.spec == P("fsdp", None)
    with pytest.raises(jpeft.JpeftError, match="rules say how weights lie on a mesh; give mesh= too"):
        jpeft.models.load(folders["llama"], rules=rules)
    with pytest.raises(jpeft.JpeftError, match="match nothing in the model: 'q_porj'"):
        jpeft.models.load(folders["llama"], mesh=mesh, rules={"q_porj": P()})
