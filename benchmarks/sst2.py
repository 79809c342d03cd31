"""SST-2 with MiniLM and LoRA, beside Hugging Face PEFT on the same rows in the same batches: accuracy and time.

    python benchmarks/sst2.py --train train.jsonl --dev dev.jsonl            # two epochs, seeds 0, 1, 2

The recipe is configs/sst2.yaml. For each seed jpeft trains as `jpeft train` does, then PEFT in a loop of its own over
the windows of rows that jpeft's plan has: the same rows and padding in each step, AdamW, rates, warm-up and clipping.
Seconds are those of the steps, without compiling, loading and evaluating. Needs the `parity` extra (torch, peft).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from train import config as configs
from train import packages
from train.display import Display
from train.materials import Materials
from train.optimizers import schedule
from train.plan import Plan
from train.run import adapted, carry_out, checked
from train.trackers import METRICS, read

CONFIG = Path(__file__).parent.parent / "configs" / "sst2.yaml"


def jpeft_run(config: Any, materials: Materials) -> tuple[float, float]:
    """(accuracy, seconds of the steps that compiled nothing, scaled to all steps)."""
    result = carry_out(config, materials, Display(Console(quiet=True)))
    assert result is not None
    entries = [entry for entry in read(result.folder / METRICS)[0] if "loss" in entry]
    each = np.diff([0.0, *(entry["seconds"] for entry in entries)])
    # The median is a step's time, whatever a few of them compiled.
    return result.after.metrics["accuracy"], float(np.median(each)) * len(each)


def peft_run(config: Any, materials: Materials) -> tuple[float, float]:
    """The same with transformers, PEFT and torch."""
    import peft
    import torch
    import transformers

    training, seed = config.training, config.training.seed
    model = adapted(config, materials)
    task = materials.examples(model)
    plan = Plan(config, model, task)
    torch.manual_seed(seed)

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = transformers.AutoModel.from_pretrained(packages.resolve(config.model.source))
            lora = peft.LoraConfig(
                r=config.method["rank"], lora_alpha=config.method["rank"], target_modules=config.method["targets"]
            )
            self.encoder = peft.get_peft_model(base, lora)
            self.head = torch.nn.Linear(base.config.hidden_size, len(task.kind.labels))

        def forward(self, batch: dict[str, Any]) -> Any:
            mask = batch["attention_mask"]
            hidden = self.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            weights = mask[..., None].to(hidden.dtype)
            return self.head((hidden * weights).sum(1) / weights.sum(1))

    net = Classifier()
    lora = [p for name, p in net.named_parameters() if p.requires_grad and not name.startswith("head")]
    groups = [
        {"params": lora, "lr": 1.0, "peak": training.learning_rate},
        {"params": list(net.head.parameters()), "lr": 1.0, "peak": training.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
    rate = schedule(training, plan.steps, 1.0)
    factors = [float(rate(step)) for step in range(plan.steps)]
    seconds = []
    net.train()
    for number, window in enumerate(plan.windows):
        batch = {name: torch.as_tensor(np.asarray(array[0])) for name, array in plan.batch(window).items()}
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factors[number]
        each = torch.nn.functional.cross_entropy(net(batch), batch["labels"].long().clamp(min=0), reduction="none")
        loss = (each * batch["weights"]).sum() / batch["weights"].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], training.clip)
        optimizer.step()
        seconds.append(time.perf_counter() - begun)
    net.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(task.test), 128):
            chosen = task.test[start : start + 128]
            length = max(map(len, chosen))
            ids, mask = (np.zeros((len(chosen), length), np.int64) for _ in range(2))
            for row, example in enumerate(chosen):
                ids[row, : len(example)], mask[row, : len(example)] = example.ids, 1
            said = net({"input_ids": torch.as_tensor(ids), "attention_mask": torch.as_tensor(mask)}).argmax(-1)
            right += int((said.numpy() == np.array([example.label for example in chosen])).sum())
    return right / len(task.test), float(np.median(seconds)) * len(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="rows with the columns sentence and label")
    parser.add_argument("--dev", required=True, help="held-out rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=6000, help="rows to train on")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {"jpeft": [], "PEFT": []}
    with tempfile.TemporaryDirectory() as place:
        for seed in args.seeds:
            overrides = [
                *(f"data.source={args.train}", "data.subset=~", f"data.test_source={args.dev}", "data.test_split=~"),
                *(f"data.limit={args.limit}", f"training.epochs={args.epochs}", f"training.seed={seed}"),
                f"output.folder={place}/{seed}",
            ]
            config = checked(configs.load(CONFIG, overrides))
            materials = Materials(config)
            for name, run in (("jpeft", jpeft_run), ("PEFT", peft_run)):
                found[name].append(run(config, materials))
                accuracy, seconds = found[name][-1]
                print(
                    f"seed {seed}  {name:5}  accuracy {accuracy:.4f}  {seconds / args.epochs:.1f} s an epoch",
                    flush=True,
                )
    for name, runs in found.items():
        print(f"{name:5}  accuracy {_spread([run[0] for run in runs])}, {_median(runs) / args.epochs:.1f} s an epoch")
    print(f"jpeft takes {_median(found['jpeft']) / _median(found['PEFT']):.2f} of PEFT's time")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def _median(runs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(seconds for _, seconds in runs)


if __name__ == "__main__":
    main()
