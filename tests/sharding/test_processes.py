"""Two processes that train one model together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import jpeft
from tests.sharding import training


def test_two_processes_load_train_save_and_load_together(tmp_path: Path) -> None:
    base = jpeft.models.from_config(training.CONFIG, task="causal-lm", rngs=nnx.Rngs(0))
    jpeft.models.save(base, tmp_path / "model")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharding.training", str(number), port, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parents[2],
        )
        for number in range(training.PROCESSES)
    ]
    results = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in results)

    # Cut along fsdp, each process holds half of a weight; a norm is whole on each of its devices, but is read once.
    frozen = jpeft.partition(base).frozen
    norms = sum(value.nbytes for key, value in frozen.items() if key.endswith("scale"))
    weights = sum(value.nbytes for value in frozen.values()) - norms
    for found in (first, second):
        for key, value in frozen.items():
            copies = training.DEVICES if key.endswith("scale") else 0.5
            assert found["held"][key] == copies * value.nbytes, key
        assert found["read"] == weights // 2 + norms

    one = jpeft.make_mesh(devices=jax.devices()[:1])
    wanted, losses = training.train(base, one, training.rows())
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], losses, rtol=1e-5)
    # Onto one process and a mesh of 8 devices.
    mesh = jpeft.make_mesh(data=2, fsdp=2, tensor=2)
    alone = jpeft.load_adapter(tmp_path / "adapter", jpeft.models.load(tmp_path / "model", mesh=mesh))
    found, expected = training.values(alone), training.values(wanted)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
