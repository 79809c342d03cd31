"""A run over a mesh is the run on one device: losses, scores, adapter; and it goes on on another mesh."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import jpeft
from jpeft import JpeftError
from tests.train.test_resume import stopped_at
from train import session
from train.cli import app
from train.display import Display
from train.run import train


@pytest.fixture
def config(llama: Path, jsonl: Callable[..., Path], config_file: Callable[..., Path], tmp_path: Path) -> Path:
    """Eight steps of a Llama with dropout and accumulation."""
    colours = [("red", "green", "blue")[number % 3] for number in range(40)]
    rows = jsonl([{"text": f"what is {c} ?", "answer": c} for c in colours])
    return config_file(
        f"model: {{source: {llama}, task: causal-lm}}\n"
        "method: {name: lora, rank: 4, targets: [q_proj, down_proj], dropout: 0.1}\n"
        f"data: {{source: {rows}, prompt: text, completion: answer, test_size: 8, max_length: 32}}\n"
        "training: {epochs: 4, batch_size: 8, accumulation: 2, learning_rate: 1e-2}\n"
        "evaluation: {answers: none}\n"
        f"output: {{folder: {tmp_path / 'run'}}}\n"
    )


def quiet() -> Display:
    return Display(Console(quiet=True))


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    return {key: np.asarray(value) for key, value in jpeft.partition(session.open_run(folder).model).adapter.items()}


def close(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert np.linalg.norm(array - other[key]) < 1e-4 * np.linalg.norm(array), key


def test_a_mesh_changes_no_result(config: Path, tmp_path: Path) -> None:
    alone = train(config, [f"output.folder={tmp_path / 'alone'}"], quiet())
    cut = ["mesh.fsdp=2", "mesh.context=2", "mesh.tensor=-1"]
    with pytest.raises(JpeftError, match=r"embed_tokens/embedding' \[327, 32\]: axis 0 of 327 cannot be cut into 2"):
        train(config, cut, quiet())
    spread = train(config, [*cut, "mesh.rules={embed_tokens: [null, fsdp]}"], quiet())
    np.testing.assert_allclose(spread.losses, alone.losses, rtol=1e-4)
    np.testing.assert_allclose(spread.after.metrics["loss"], alone.after.metrics["loss"], rtol=1e-4)
    close(adapter_of(tmp_path / "alone"), adapter_of(tmp_path / "run"))

    # Stopped on one mesh, going on on another.
    halves = [f"output.folder={tmp_path / 'halves'}", "model.remat=true"]
    stopped_at(config, 5, *halves, "mesh.fsdp=8")
    whole = train(config, ["checkpoints.every=2", "training.max_steps=8", *halves, "mesh.data=8"], quiet())
    np.testing.assert_allclose(whole.losses, alone.losses[:8], rtol=1e-4)


# What `jpeft` is asked in a process that has only so many devices.
_ELSEWHERE = """
import json
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
jax.config.update("jax_enable_compilation_cache", False)
from typer.testing import CliRunner
from train.cli import app
for command in json.load(sys.stdin):
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    print(done.output)
    assert done.exit_code == 0, command
"""


def test_a_checkpoint_moves_to_other_machines(config: Path, tmp_path: Path) -> None:
    """Begun on eight devices; from a copy of its folder it goes on, and is used, on four, two and one."""
    rules = "mesh.rules={embed_tokens: [null, fsdp]}"
    stopped_at(config, 5, f"output.folder={tmp_path / 'begun'}", rules, "mesh.fsdp=8")
    alone = train(config, ["training.max_steps=8", f"output.folder={tmp_path / 'alone'}"], quiet())
    for devices in (4, 2, 1):
        run, peft, merged = (str(tmp_path / f"on-{devices}" / name) for name in ("run", "peft", "merged"))
        shutil.copytree(tmp_path / "begun", run)
        settings = ["checkpoints.every=2", "training.max_steps=8", f"output.folder={run}", rules]
        commands = [
            ["train", str(config), *settings, f"mesh.fsdp={devices}"],
            ["eval", run],
            ["export", run, peft],
            ["merge", run, merged],
        ]
        done = subprocess.run(
            [sys.executable, "-c", _ELSEWHERE, str(devices)],
            input=json.dumps(commands),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "resumed   after step 4 of 8" in done.stdout
        close(adapter_of(tmp_path / "alone"), adapter_of(Path(run)))
        (scored,) = re.findall(r"^adapter   .*loss ([\d.]+)", done.stdout, re.MULTILINE)
        assert float(scored) == pytest.approx(alone.after.metrics["loss"], rel=1e-3)
        model, ids = session.open_run(Path(run)).model, np.arange(12)[None]
        for other in (jpeft.load_peft(jpeft.strip(model), peft), jpeft.models.load(merged)):
            np.testing.assert_allclose(other(ids), model(ids), rtol=1e-4, atol=1e-5)


def test_what_a_mesh_cannot_do(config: Path) -> None:
    with pytest.raises(JpeftError, match=r"mesh.rules.embed_tokens: no axis 'fdsp'; .* data, fsdp, context, tensor"):
        train(config, ["mesh.data=-1", "mesh.rules={embed_tokens: [fdsp]}"], quiet())
    with pytest.raises(JpeftError, match=r"mesh: data=3, .* do not make up the 8 devices"):
        train(config, ["mesh.data=3"], quiet())
    with pytest.raises(JpeftError, match=r"training.batch_size: 4 rows cannot be dealt out to 8 .* a multiple of 8"):
        train(config, ["mesh.data=-1", "training.batch_size=4"], quiet())


def test_a_dry_run_counts_what_each_device_holds(config: Path) -> None:
    assert jax.device_count() == 8
    said = {}
    for name, mesh in (("alone", []), ("cut", ["mesh.fsdp=8"])):
        done = CliRunner().invoke(app, ["train", str(config), "--dry-run", *mesh], catch_exceptions=False)
        assert done.exit_code == 0
        said[name] = done.output
    assert "8 devices are here and 1 is used; mesh.data=-1 uses all of them" in said["alone"]
    assert "mesh      8 devices: data 1, fsdp 8, context 1, tensor 1" in said["cut"]
    held = {name: float(text.split("frozen weights ")[1].split()[0]) for name, text in said.items()}
    assert held["cut"] < held["alone"] / 3
    files = {re.search(r"files .*", text)[0] for text in said.values()}  # type: ignore[index]
    assert len(files) == 1, "what is written does not depend on the mesh"
