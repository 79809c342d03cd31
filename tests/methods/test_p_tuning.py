"""P-tuning: the encoders against PyTorch's modules' formulas, baking, templates."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from tests import zoo

AT = "embed_tokens/p_tuning/"


def adapted(**settings: Any) -> Any:
    return jpeft.PTuning(num_virtual_tokens=3, **settings)(zoo.MODELS["llama"].make("float32"), rngs=0)


def test_shapes() -> None:
    lstm = {key.removeprefix(AT): v.shape for key, v in jpeft.partition(adapted(hidden_size=5)).adapter.items()}
    assert lstm["inputs"] == (3, 12)
    assert (lstm["lstm0_forward_input"], lstm["lstm1_backward_input"]) == ((12, 20), (10, 20))
    assert (lstm["linear0_kernel"], lstm["linear1_kernel"]) == ((10, 10), (10, 12))
    mlp = {key.removeprefix(AT): v.shape for key, v in jpeft.partition(adapted(encoder="mlp")).adapter.items()}
    assert {name for name in mlp if "kernel" in name} == {f"linear{i}_kernel" for i in range(3)}


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_the_encoder_is_pytorchs(encoder: str) -> None:
    torch = pytest.importorskip("torch")
    model = adapted(hidden_size=5, encoder=encoder)
    weights = {k.removeprefix(AT): torch.tensor(np.array(v)) for k, v in jpeft.partition(model).adapter.items()}
    x = weights["inputs"]
    if encoder == "lstm":
        lstm = torch.nn.LSTM(12, 5, num_layers=2, bidirectional=True, batch_first=True)
        state = {}
        for layer in range(2):
            for side, suffix in (("forward", ""), ("backward", "_reverse")):
                ours = f"lstm{layer}_{side}_"
                state[f"weight_ih_l{layer}{suffix}"] = weights[ours + "input"].T
                state[f"weight_hh_l{layer}{suffix}"] = weights[ours + "hidden"].T
                state[f"bias_ih_l{layer}{suffix}"] = weights[ours + "bias"]
                state[f"bias_hh_l{layer}{suffix}"] = torch.zeros(20)
        lstm.load_state_dict(state)
        x = lstm(x[None])[0][0]
    last = 1 if encoder == "lstm" else 2
    for number in range(last + 1):
        x = x @ weights[f"linear{number}_kernel"] + weights[f"linear{number}_bias"]
        x = x if number == last else torch.relu(x)
    made = jpeft.partition(jpeft.bake(model)).adapter
    assert made.keys() == {AT + "embeddings"}
    assert np.allclose(made[AT + "embeddings"], x.detach().numpy(), atol=1e-6)


def test_baked_models_compute_and_save_the_same(tmp_path: Any) -> None:
    model = adapted(hidden_size=5, position=(0, 2, 4))
    baked = jpeft.bake(model)
    ids = zoo.ids()
    assert zoo.relative(baked(ids), model(ids)) < 1e-6
    jpeft.save_adapter(tmp_path / "baked", baked)
    loaded = jpeft.load_adapter(tmp_path / "baked", zoo.MODELS["llama"].make("float32"))
    assert jnp.array_equal(loaded(ids), baked(ids))
    made = [jpeft.generate(m, ids, max_new_tokens=3, eos_token_id=()) for m in (model, baked)]
    assert np.array_equal(*made)


@pytest.mark.parametrize(
    ("settings", "said"), [({"encoder": "gru"}, "choose 'lstm' or 'mlp'"), ({"hidden_size": 0}, "hidden_size=0")]
)
def test_refusals(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(jpeft.JpeftError, match=said):
        jpeft.PTuning(**settings)
