"""Optimizer state and layer inputs in the memory of the host.

A CPU has memories of both kinds, although they are one: what is tested is that arrays are where they are said to be,
and that nothing else changes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import jpeft
from train import loop, placing, session
from train.checkpoints import Checkpoints
from train.display import Display
from train.run import train

OFFLOAD = "training.offload=[optimizer, activations]"


def said(config: Path, *overrides: str) -> str:
    stream = io.StringIO()
    train(config, overrides, Display(Console(file=stream, width=200)))
    return stream.getvalue()


@pytest.fixture
def config(bert: Path, jsonl: Callable[..., Path], config_file: Callable[..., Path], tmp_path: Path) -> Path:
    rows = jsonl([{"text": f"the {c} is", "answer": c} for c in ("red", "green", "blue") * 12])
    return config_file(
        f"model: {{source: {bert}, task: sequence-classification, pooling: mean, remat: true}}\n"
        "method: {name: lora, rank: 4, targets: [query, value], dropout: 0.1}\n"
        f"data: {{source: {rows}, text: text, label: answer, test_size: 8, max_length: 16}}\n"
        "training: {max_steps: 6, batch_size: 8}\n"
        "evaluation: {every: 4, samples: 0}\n"
        f"output: {{folder: {tmp_path / 'plain'}}}\n"
    )


@pytest.mark.parametrize("mesh", ["mesh.data=1", "mesh={data: 4, fsdp: 2}"])
def test_a_run(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: str) -> None:
    kinds: list[set[str]] = []
    pause, restore = loop.Loop._pause, Checkpoints.restore
    restored = []

    def watched(self: loop.Loop, *rest: object) -> None:
        moments = [leaf for leaf in jax.tree.leaves(self.state.optimizer) if leaf.ndim]
        kinds.append({leaf.sharding.memory_kind for leaf in moments})
        assert {leaf.sharding.memory_kind for leaf in self.state.adapter.values()} == {"device"}
        pause(self, *rest)  # type: ignore[arg-type]
        if self.done == 4 and not restored:
            raise InterruptedError

    def found(self: Checkpoints, like: object) -> object:
        made = restore(self, like)  # type: ignore[arg-type]
        restored.append(made[0] if made else 0)
        return made

    said(config, mesh)
    folder = f"output.folder={tmp_path / 'offloaded'}"
    monkeypatch.setattr(loop.Loop, "_pause", watched)
    with pytest.raises(InterruptedError):
        said(config, mesh, OFFLOAD, folder)
    monkeypatch.setattr(Checkpoints, "restore", found)
    assert "resumed   after step 4" in said(config, mesh, OFFLOAD, folder)
    assert restored == [4]
    assert kinds == [{placing.HOST}] * 2
    one, other = (jpeft.partition(session.open_run(tmp_path / name).model).adapter for name in ("plain", "offloaded"))
    for name, array in one.items():
        np.testing.assert_allclose(array, other[name], atol=1e-6, err_msg=name)


def test_where_the_backend_has_no_such_memory(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "HOST", "a_kind_of_its_own")
    text = said(config, OFFLOAD)
    assert "training.offload: cpu offers no memory of kind a_kind_of_its_own, only device, " in text
    assert "the run goes on without" in text
    assert "after" in text
