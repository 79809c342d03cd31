"""LoRA beside Hugging Face PEFT, running in the same test on the same weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT calls transformers so
]


def tiny_llama(folder: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return _saved(transformers.LlamaForCausalLM(config), folder)


def tiny_gpt2(folder: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=3, n_head=4, n_positions=32)
    return _saved(transformers.GPT2LMHeadModel(config), folder)


def _saved(model: Any, folder: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


CASES = {
    "plain": (tiny_llama, {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": (tiny_llama, {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["o_proj", "up_proj"]}),
    "all": (tiny_llama, {"r": 3, "lora_alpha": 2, "target_modules": "all-linear"}),
    "layers": (tiny_llama, {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [0, 2], "lora_alpha": 4}),
    "patterns": (
        tiny_llama,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "gate_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5, "gate_proj": 3},
            "alpha_pattern": {"layers.2.mlp.gate_proj": 9},
        },
    ),
    "transposed": (
        tiny_gpt2,
        {"r": 4, "lora_alpha": 7, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
}


def ours(config: dict[str, Any]) -> jpeft.LoRA:
    """The same method in our words."""
    return jpeft.LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=config["target_modules"],
        layers=config.get("layers_to_transform"),
        rank_pattern=config.get("rank_pattern", {}),
        alpha_pattern=config.get("alpha_pattern", {}),
        use_rslora=config.get("use_rslora", False),
    )


def place(name: str) -> tuple[str, int, str]:
    """(our key, layer, variable) of a PEFT parameter."""
    path, kind = name.removeprefix("base_model.model.").split(".lora_")
    parts = path.removeprefix("model.").removeprefix("transformer.").split(".")
    layer = int(parts.pop(1))
    return "/".join(parts), layer, kind[0].lower()


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_merge(case: str, tmp_path: Any) -> None:
    import peft

    make, config = CASES[case]
    base = make(tmp_path)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**config))
    torch.manual_seed(1)
    lora = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for parameter in lora.values():
            parameter.normal_(0, 0.2)

    adapted = ours(config)(jpeft.models.load(tmp_path), rngs=0)
    parts = jpeft.partition(adapted)
    values = {key: np.zeros(value.shape, np.float32) for key, value in parts.adapter.items()}
    covered = {path: getattr(wrapper, "layers", None) for path, wrapper in _wrappers(adapted).items()}

    def row(name: str) -> tuple[np.ndarray, np.ndarray]:
        """Our row for a PEFT tensor, and the slice of it that the tensor's rank fills."""
        path, layer, variable = place(name)
        layers = covered[path] or tuple(range(3))
        target = values[f"{path}/lora/{variable}"][layers.index(layer)]
        return target, target[:, : lora[name].shape[0]] if variable == "a" else target[: lora[name].shape[1]]

    for name, parameter in lora.items():
        row(name)[1][...] = parameter.detach().numpy().T
    assert len(lora) > 0

    ids = np.random.default_rng(0).integers(0, 31, (2, 7))
    logits = theirs(torch.tensor(ids)).logits
    torch.sum(torch.sin(logits)).backward()

    def run(adapter: Any) -> jax.Array:
        return jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)(ids)

    expected = logits.detach().numpy()
    scale = np.abs(expected).max()
    assert np.abs(jax.jit(run)(values) - expected).max() / scale < 1e-5
    merged = jpeft.merge(jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen))
    assert np.abs(merged(ids) - expected).max() / scale < 1e-5

    gradient = jax.jit(jax.grad(lambda adapter: jnp.sum(jnp.sin(run(adapter)))))(values)
    values = {key: np.array(value) for key, value in gradient.items()}
    for name, parameter in lora.items():
        assert np.allclose(row(name)[1], parameter.grad.numpy().T, rtol=1e-3, atol=1e-5 * scale), name


def _wrappers(model: Any) -> dict[str, Any]:
    from jpeft.paths import nodes
    from jpeft.wrapper import Wrapper

    return {node.name: node.module for node in nodes(model) if isinstance(node.module, Wrapper)}


def test_embedding_and_convolution() -> None:
    """Kinds that PEFT adapts with other shapes than a linear layer's."""
    import peft
    from flax import nnx

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(11, 6)
            self.conv = torch.nn.Conv1d(6, 8, 3, stride=2, padding=1)

        def forward(self, ids: Any) -> Any:
            return self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)

    class Flax(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(11, 6, rngs=nnx.Rngs(0))
            self.conv = nnx.Conv(6, 8, (3,), strides=2, padding=1, rngs=nnx.Rngs(0))

        def __call__(self, ids: jax.Array) -> jax.Array:
            return self.conv(self.embed(ids))

    torch.manual_seed(0)
    base = Torch()
    flax = Flax()
    flax.embed.embedding.set_value(jnp.array(base.embed.weight.detach().numpy()))
    flax.conv.kernel.set_value(jnp.array(base.conv.weight.detach().numpy().transpose(2, 1, 0)))
    flax.conv.bias.set_value(jnp.array(base.conv.bias.detach().numpy()))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed", "conv"]))
    lora = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for parameter in lora.values():
            parameter.normal_(0, 0.3)
    by_end = {name.split("model.")[-1].replace(".default", ""): p.detach().numpy() for name, p in lora.items()}
    values = {
        "embed/lora/a": by_end["embed.lora_embedding_A"].T,
        "embed/lora/b": by_end["embed.lora_embedding_B"].T,
        "conv/lora/a": by_end["conv.lora_A.weight"].transpose(2, 1, 0),
        "conv/lora/b": by_end["conv.lora_B.weight"][:, :, 0].T,
    }
    parts = jpeft.partition(jpeft.LoRA(rank=4, alpha=6, targets=["embed", "conv"])(flax, rngs=0))
    ids = np.random.default_rng(0).integers(0, 11, (2, 9))
    model = jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen)
    expected = theirs(torch.tensor(ids)).detach().numpy()
    assert np.abs(model(ids) - expected).max() / np.abs(expected).max() < 1e-5
    assert np.abs(jpeft.merge(model)(ids) - expected).max() / np.abs(expected).max() < 1e-5
