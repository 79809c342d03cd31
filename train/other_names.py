"""What settings of other tools are called here: those of PEFT, transformers, trl and axolotl.

Likeness finds none of them, and a wrong guess would be worse than none. Each entry is our key, the values that are
called otherwise, or a sentence where there is nothing to set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Ours:
    """key: `section.key`, or empty if there is none. values: what to write for theirs. hint: what else to say."""

    key: str = ""
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hint: str = ""

    def entry(self, value: str | None) -> str:
        """`section.key`, or `section.key: value` where their value is called otherwise here."""
        return self.values.get((value or "").lower(), self.key)


def _renamed(key: str, values: Mapping[str, str], hint: str = "") -> Ours:
    """Another key with other values."""
    return Ours(key, {theirs: f"{key}: {ours}" for theirs, ours in values.items()}, hint)


def _on(entry: str, hint: str = "") -> Ours:
    """A switch there that is a value here."""
    return Ours(entry.partition(":")[0], dict.fromkeys(("true", "yes", "on"), entry), hint)


_BASES = {"nf4": "nf4", "fp4": "fp4"}
_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_hf", "adamw_torch_fused", "adamw_jax", "adam"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), "adamw8bit"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "adamw"),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"), "lion"),
}
_TASKS = {
    "causal_lm": "causal-lm",
    "seq_cls": "sequence-classification",
    "token_cls": "token-classification",
    "seq_2_seq_lm": "seq2seq-lm",
}
_RESUMES = Ours(hint="the same command goes on with a run that was stopped; leave it out")
_LOGGED = Ours(hint="every step is written to metrics.jsonl; leave it out")

OTHERS: dict[str, Ours] = {
    # Model
    **dict.fromkeys(
        ("model_name_or_path", "base_model", "model_id", "pretrained_model_name_or_path"), Ours("model.source")
    ),
    "tokenizer_name_or_path": Ours("model.tokenizer"),
    "tokenizer_config": Ours("model.tokenizer"),
    "torch_dtype": Ours("model.dtype"),
    "bf16": _on("model.dtype: bfloat16"),
    "bfloat16": _on("model.dtype: bfloat16"),
    "fp16": _on("model.dtype: bfloat16", "float16 weights are not needed, and bfloat16 needs no loss scaling"),
    "load_in_4bit": _on("model.base: nf4"),
    "load_in_8bit": _on("model.base: int8"),
    "bnb_4bit_quant_type": _renamed("model.base", _BASES),
    "quantize": Ours("model.base"),
    "gradient_checkpointing": _on("model.remat: true"),
    "attn_implementation": Ours("model.attention"),
    "flash_attention": Ours("model.attention"),
    "task_type": _renamed("model.task", _TASKS),
    # Method
    **dict.fromkeys(("r", "lora_r"), Ours("method.rank")),
    "lora_alpha": Ours("method.alpha"),
    "lora_dropout": Ours("method.dropout"),
    **dict.fromkeys(("target_modules", "lora_target_modules"), Ours("method.targets")),
    "lora_target_linear": _on("method.targets: all-linear"),
    "exclude_modules": Ours("method.exclude"),
    "layers_to_transform": Ours("method.layers"),
    "init_lora_weights": _renamed("method.init", {"true": "kaiming"}),
    "peft_use_rslora": Ours("method.use_rslora"),
    **dict.fromkeys(("use_dora", "peft_use_dora"), _on("method.name: dora")),
    "adapter": _renamed("method.name", {"qlora": "lora"}, "qlora is lora with model.base: nf4"),
    "peft_type": Ours("method.name"),
    "prompt_tuning_init": Ours("method.init"),
    "prompt_tuning_init_text": Ours("method.init_text"),
    "lora_model_dir": Ours("training.start_from"),
    **dict.fromkeys(
        ("modules_to_save", "lora_modules_to_save"),
        Ours(
            hint="modules that train as a whole are a method of their own: method: [{name: lora}, {name: full_tuning, "
            "targets: [lm_head]}]; a new head trains without it"
        ),
    ),
    "bias": Ours(hint="biases are a method of their own: method: [{name: lora}, {name: bitfit}]"),
    "fan_in_fan_out": Ours(hint="it follows from the layer; leave it out"),
    "inference_mode": Ours(hint="there is no such mode; leave it out"),
    # Data
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "train_file", "data_files"), Ours("data.source")),
    "dataset_config_name": Ours("data.subset"),
    "dataset_text_field": Ours("data.text"),
    **dict.fromkeys(("eval_dataset", "test_datasets", "validation_file", "test_file"), Ours("data.test_source")),
    **dict.fromkeys(("val_set_size", "validation_split_percentage", "eval_split_ratio"), Ours("data.test_size")),
    **dict.fromkeys(
        ("max_seq_length", "sequence_len", "max_seq_len", "cutoff_len", "model_max_length"), Ours("data.max_length")
    ),
    **dict.fromkeys(("sample_packing", "pack"), Ours("data.packing")),
    "max_train_samples": Ours("data.limit"),
    "max_eval_samples": Ours("data.test_limit"),
    "train_on_inputs": Ours(
        hint="the loss is on data.completion alone, and of chats on the assistant's turns; leave it out"
    ),
    # Training
    **dict.fromkeys(("num_epochs", "num_train_epochs", "n_epochs"), Ours("training.epochs")),
    "lr": Ours("training.learning_rate"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "train_batch_size"), Ours("training.batch_size")
    ),
    "gradient_accumulation_steps": Ours("training.accumulation"),
    **dict.fromkeys(("optim", "optimizer_name"), _renamed("training.optimizer", _OPTIMIZERS)),
    **dict.fromkeys(
        ("lr_scheduler", "lr_scheduler_type", "scheduler"),
        _renamed("training.schedule", {"constant_with_warmup": "constant"}),
    ),
    "warmup_ratio": Ours("training.warmup"),
    "warmup_steps": Ours("training.warmup", hint="it is the share of the steps in which the rate rises, such as 0.1"),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping", "grad_clip"), Ours("training.clip")),
    "random_seed": Ours("training.seed"),
    "loraplus_lr_ratio": Ours("method.ratio", hint="of method.name: lora_plus"),
    "loraplus_lr_embedding": Ours("training.groups"),
    # Evaluation and checkpoints
    "eval_steps": Ours("evaluation.every"),
    "evals_per_epoch": Ours("evaluation.every", hint="in optimizer steps"),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"),
        Ours("evaluation.every", hint="in optimizer steps; without it, once an epoch"),
    ),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), Ours("evaluation.batch_size")),
    "metric_for_best_model": Ours("evaluation.best"),
    "load_best_model_at_end": Ours("evaluation.best", hint="the metric to choose by, such as loss"),
    "save_steps": Ours("checkpoints.every"),
    **dict.fromkeys(
        ("save_strategy", "saves_per_epoch"),
        Ours("checkpoints.every", hint="in optimizer steps; without it, at each evaluation"),
    ),
    "save_total_limit": Ours("checkpoints.keep"),
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints", "resume"), _RESUMES),
    "early_stopping_patience": Ours("evaluation.best", hint="no run stops early, but it can keep its best adapter"),
    # Output
    "output_dir": Ours("output.folder"),
    "overwrite_output_dir": Ours("output.overwrite"),
    "report_to": Ours(
        "output.tensorboard", {"tensorboard": "output.tensorboard: true", "wandb": "output.wandb: PROJECT"}
    ),
    "wandb_project": Ours("output.wandb"),
    "use_tensorboard": Ours("output.tensorboard"),
    "logging_steps": _LOGGED,
    "logging_strategy": _LOGGED,
    "logging_dir": Ours(hint="what is logged goes to output.folder; leave it out"),
}
