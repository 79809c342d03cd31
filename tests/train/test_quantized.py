"""Runs on quantised bases."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import jpeft
from jpeft.quant import QuantizedLinear
from train import config as configs
from train import session, use
from train.display import Display
from train.run import train


def test_a_run_on_a_quantised_base(
    llama: Path, jsonl: Callable[..., Path], tmp_path: Path, config_file: Callable[..., Path]
) -> None:
    rows = jsonl([{"text": f"the {colour} is", "answer": colour} for colour in ("red", "green", "blue") * 8])
    folder = tmp_path / "run"
    path = config_file(
        f"model: {{source: {llama}, task: causal-lm, base: nf4}}\n"
        "method: {name: lora, rank: 4, targets: all-linear}\n"
        f"data: {{source: {rows}, prompt: '{{text}}', completion: ' {{answer}}', test_size: 4, max_length: 16}}\n"
        "training: {epochs: 2, batch_size: 4, learning_rate: 3e-2}\n"
        "evaluation: {answers: none, samples: 0}\n"
        f"output: {{folder: {folder}}}\n"
    )
    result = train(path, display=Display(Console(quiet=True)))
    assert result.losses[-1] < result.losses[0]
    run = session.open_run(folder)
    base = jpeft.strip(run.model)
    assert isinstance(base.layers.layer.mlp.up_proj, QuantizedLinear)
    assert jpeft.describe(base).total == jpeft.describe(jpeft.models.load(llama)).total
    assert session.load_call(configs.load(path)).endswith("quantize='nf4')")
    (_, note) = use.merge(folder, tmp_path / "merged")
    assert re.match("note: the base is quantised", note)
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_text() == (llama / name).read_text()
    merged = jpeft.models.load(tmp_path / "merged")
    assert not jpeft.applied(merged)
    assert merged.layers.layer.mlp.up_proj.kernel.dtype == "float32"
