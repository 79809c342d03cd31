"""DoRA, (IA)3, AdaLoRA and PiSSA beside Hugging Face PEFT, running in the same test on the same weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.losses import causal_lm_loss
from tests.parity.test_lora_peft import tiny_gpt2, tiny_llama

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT calls transformers so
]
IDS = np.random.default_rng(0).integers(0, 31, (2, 7))


def place(name: str) -> tuple[str, int, str]:
    """(our path, layer, the part's name) of a PEFT parameter."""
    head, _, tail = name.removeprefix("base_model.model.").partition(".lora_" if ".lora_" in name else ".ia3_")
    parts = head.removeprefix("model.").removeprefix("transformer.").split(".")
    layer = int(parts.pop(1))
    return "/".join(parts), layer, tail.split(".")[0]


def from_peft(parameters: dict[str, Any], adapter: dict[str, Any], name: str, names: dict[str, str]) -> dict[str, Any]:
    """Our adapter with the values (or gradients) of PEFT's parameters."""
    made = {key: np.full(value.shape, np.nan, np.float32) for key, value in adapter.items()}
    for full, value in parameters.items():
        path, layer, part = place(full)
        target = made[f"{path}/{name}/{names[part]}"][layer]
        target[...] = value.T.reshape(target.shape)
    assert all(np.isfinite(value).all() for value in made.values())
    return made


CASES: dict[str, tuple[Any, str, dict[str, Any], jpeft.Method, dict[str, str]]] = {
    "dora": (
        tiny_llama,
        "LoraConfig",
        {"r": 4, "lora_alpha": 7, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        jpeft.DoRA(rank=4, alpha=7, targets=["q_proj", "down_proj"]),
        {"A": "a", "B": "b", "magnitude_vector": "m"},
    ),
    "dora-with-biases": (
        tiny_gpt2,
        "LoraConfig",
        {"r": 3, "lora_alpha": 2, "use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        jpeft.DoRA(rank=3, alpha=2, targets=["c_attn"]),
        {"A": "a", "B": "b", "magnitude_vector": "m"},
    ),
    "ia3": (tiny_llama, "IA3Config", {}, jpeft.IA3(), {"l": "l"}),
    "ia3-with-biases": (tiny_gpt2, "IA3Config", {"fan_in_fan_out": True}, jpeft.IA3(), {"l": "l"}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_merge(case: str, tmp_path: Any) -> None:
    import peft

    make, kind, config, method, names = CASES[case]
    theirs = peft.get_peft_model(make(tmp_path), getattr(peft, kind)(**config, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    own = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in own.items():
            scaling = "magnitude" in name or "ia3" in name
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter)) if scaling else parameter.normal_(0, 0.2)

    parts = jpeft.partition(method(jpeft.models.load(tmp_path), rngs=0))
    values = from_peft({k: p.detach().numpy() for k, p in own.items()}, parts.adapter, method.name, names)
    theirs.eval()
    logits = theirs(torch.tensor(IDS)).logits
    torch.sum(torch.sin(logits)).backward()

    def run(adapter: Any) -> jax.Array:
        return jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)(IDS)

    expected = logits.detach().numpy()
    scale = np.abs(expected).max()
    assert np.abs(jax.jit(run)(values) - expected).max() / scale < 1e-5
    merged = jpeft.merge(jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen))
    assert np.abs(merged(IDS) - expected).max() / scale < 1e-5

    gradient = jax.jit(jax.grad(lambda adapter: jnp.sum(jnp.sin(run(adapter)))))(values)
    wanted = from_peft({k: p.grad.numpy() for k, p in own.items()}, parts.adapter, method.name, names)
    for key, value in wanted.items():
        assert np.allclose(gradient[key], value, rtol=1e-3, atol=1e-5 * scale), key


def test_adalora_follows_the_same_course(tmp_path: Any) -> None:
    """Losses, values and what is pruned, over a whole short training with plain SGD."""
    import peft

    steps, targets = 14, ["q_proj", "up_proj"]
    base = tiny_llama(tmp_path)
    config = peft.AdaLoraConfig(
        init_r=5,
        target_r=2,
        lora_alpha=9,
        tinit=2,
        tfinal=4,
        deltaT=2,
        total_step=steps,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    own = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in own.values():
            parameter.normal_(0, 0.2)

    method = jpeft.AdaLoRA(
        rank=2,
        initial_rank=5,
        alpha=9,
        targets=targets,
        total_steps=steps,
        warmup_steps=2,
        final_steps=4,
        interval=2,
    )
    adapted = method(jpeft.models.load(tmp_path), rngs=0)
    parts = jpeft.partition(adapted)
    names = {"A": "a", "B": "b", "E": "e"}

    def now() -> dict[str, Any]:
        return from_peft({k: p.detach().numpy() for k, p in own.items()}, parts.adapter, method.name, names)

    adapter = {key: jnp.array(value) for key, value in now().items()}
    tx = jpeft.optimizer(adapted, optax.sgd(0.5))
    state = tx.init(adapter)

    @jax.jit
    def step(adapter: Any, state: Any) -> Any:
        def loss(adapter: Any) -> jax.Array:
            model = jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)
            total, count = causal_lm_loss(model, jnp.array(IDS))
            return total / count + jpeft.penalty(model)

        value, gradient = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    optimizer = torch.optim.SGD(own.values(), lr=0.5)
    kept = []
    for number in range(1, steps + 1):
        optimizer.zero_grad()
        loss = theirs(input_ids=torch.tensor(IDS), labels=torch.tensor(IDS)).loss
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(number)
        adapter, state, value = step(adapter, state)
        assert np.allclose(value, loss.item(), rtol=1e-4), number
        expected = now()
        for key, wanted in expected.items():
            assert np.allclose(adapter[key], wanted, atol=2e-4), (number, key)
            if key.endswith("/e"):
                assert np.array_equal(adapter[key] == 0, wanted == 0), (number, key)
        kept.append(sum(int(np.sum(v != 0)) for k, v in expected.items() if k.endswith("/e")))
    assert kept[0] == 2 * 3 * 5
    assert kept[-1] == 2 * 3 * 2
    model = jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)
    assert sum(int(value.sum()) for value in jpeft.adalora_ranks(model).values()) == 2 * 3 * 2


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weight(init: str, tmp_path: Any) -> None:
    """The same part of the weight is trained: products of the factors agree (their signs are nobody's choice)."""
    import peft

    base = tiny_llama(tmp_path)
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=["k_proj", "gate_proj"], init_lora_weights=init)
    theirs = dict(peft.get_peft_model(base, config).named_parameters())
    method = jpeft.LoRA(rank=4, alpha=7, targets=["k_proj", "gate_proj"], init=init)
    adapter = jpeft.partition(method(jpeft.models.load(tmp_path), rngs=0)).adapter
    for path in ("self_attn.k_proj", "mlp.gate_proj"):
        for layer in range(3):
            a, b = (
                theirs[f"base_model.model.model.layers.{layer}.{path}.lora_{part}.default.weight"].detach().numpy()
                for part in "AB"
            )
            at = f"layers/{path.replace('.', '/')}/lora"
            made = adapter[f"{at}/a"][layer] @ adapter[f"{at}/b"][layer]
            assert np.allclose(made, (b @ a).T, atol=1e-5)
