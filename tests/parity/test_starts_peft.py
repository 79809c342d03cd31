"""LoftQ and EVA beside Hugging Face PEFT's own code, on the same weights and the same activations."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from tests.parity.test_lora_peft import tiny_llama

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.disable(logging.WARNING)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    logging.disable(logging.NOTSET)
    from peft.utils import loftq_utils

    def here(to: Any) -> Any:  # PEFT insists on a GPU
        def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs = {key: "cpu" if value == "cuda" else value for key, value in kwargs.items()}
            return to(self, *("cpu" if value == "cuda" else value for value in args), **kwargs)

        return moved

    monkeypatch.setattr(torch.Tensor, "to", here(torch.Tensor.to))
    monkeypatch.setattr(bitsandbytes.nn.Params4bit, "to", here(bitsandbytes.nn.Params4bit.to))
    # What is kept of a residual is as exact as the sixth and seventh singular values are apart, and each library's SVD
    # differs by machine: 4 % of the largest here, in default_rng(0) less than 1 %.
    weight = np.random.default_rng(90).standard_normal((64, 128)).astype(np.float32)  # (out, in)
    base, a, b = loftq_utils.loftq_init(torch.tensor(weight), num_bits=4, reduced_rank=6, num_iter=iterations)

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(128, 64, rngs=nnx.Rngs(0))
            self.linear.kernel.set_value(jnp.asarray(weight.T))

    made = jpeft.loftq(
        Model(), jpeft.LoRA(rank=6, targets="linear"), jpeft.NF4(double_quant=False), iterations=iterations, rngs=0
    )
    ours = jpeft.partition(made).adapter
    frozen = jpeft.partition(jpeft.merge(jpeft.strip(made), dequantize=True)).frozen["linear/kernel"]
    assert np.abs(np.asarray(frozen).T - base.numpy()).max() < 1e-6
    product = np.asarray(ours["linear/lora/a"] @ ours["linear/lora/b"]).T
    assert np.abs(product - (b @ a).numpy()).max() < 1e-5 * np.abs(product).max()
    for mine, theirs in ((ours["linear/lora/a"].T, a), (ours["linear/lora/b"].T, b)):  # up to the sign of a component
        assert np.allclose(np.abs(mine), np.abs(theirs.numpy()), atol=1e-4)


def test_eva(tmp_path: Any) -> None:
    import peft

    ids = np.random.default_rng(1).integers(0, 31, (8, 12))
    mask = np.ones_like(ids)
    mask[2, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]  # each with an input of its own: no ties between ranks
    theirs = tiny_llama(tmp_path)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=4,
        target_modules=targets,
        init_lora_weights="eva",
        task_type="CAUSAL_LM",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.99, whiten=True),
    )
    model = peft.get_peft_model(theirs, config, low_cpu_mem_usage=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.initialize_lora_eva_weights(
            model, [{key: torch.tensor(value) for key, value in batch.items()}], show_progress_bar=False
        )
    expected = {
        name.removeprefix("base_model.model.model.").partition(".lora_A")[0]: parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if ".lora_A." in name
    }

    # PEFT takes the batches again until components stay as they are: one batch, twice.
    method = jpeft.LoRA(rank=3, alpha=4, targets=targets)
    made = jpeft.eva(jpeft.models.load(tmp_path), method, [batch, batch], whiten=True, rngs=0)
    (recorded,) = jpeft.applied(made)
    ranks = {name.strip("^$").replace("\\", ""): rank for name, rank in recorded.rank_pattern.items() if rank}
    assert ranks == {name: len(rows) for name, rows in expected.items()}
    assert len(set(ranks.values())) > 2
    alphas = {name.strip("^$").replace("\\", ""): alpha for name, alpha in recorded.alpha_pattern.items()}
    assert all(np.isclose(alphas[name], 4 * rank / 3) for name, rank in ranks.items())
    scaling = {
        name.removeprefix("base_model.model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.scaling
    }
    assert all(np.isclose(scaling[name], alphas[name] / rank) for name, rank in ranks.items())
    adapter = jpeft.partition(made).adapter
    for name, rows in expected.items():
        _, layer, rest = name.split(".", 2)
        key = f"layers/{rest.replace('.', '/')}/lora/a"
        layers = [n for n in range(3) if ranks.get(f"layers.{n}.{rest}")]
        a = np.asarray(adapter[key])
        assert a.shape[0] in (len(layers), 3)
        own = a[int(layer) if a.shape[0] == 3 else layers.index(int(layer))].T[: len(rows)]
        # Theirs come from a randomised decomposition, and their signs are arbitrary.
        cosines = np.abs(np.sum(own * rows, 1)) / np.linalg.norm(own, axis=1) / np.linalg.norm(rows, axis=1)
        assert cosines.min() > 0.999, name
        assert np.allclose(np.linalg.norm(own, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-3), name
