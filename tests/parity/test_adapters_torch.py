"""Adapters beside their formulas in torch, hooked into transformers' own modules at the places that the papers name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jpeft
from tests import zoo
from tests.parity.test_prompts_peft import batch, difference, loaded, theirs, tiny

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.parity

# family: (our path of the layers, their layers, attention's output, feed-forward's output, feed-forward's first module)
PLACES: dict[str, tuple[str, Any, str, str, str]] = {
    "bert": (
        "encoder/layer",
        lambda model: model.bert.encoder.layer,
        "attention.output.dense",
        "output.dense",
        "intermediate",
    ),
    "llama": ("layers", lambda model: model.model.layers, "self_attn.o_proj", "mlp.down_proj", "mlp"),
}
ACTIVATIONS = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "swish": lambda x: x * torch.sigmoid(x)}


def trained(method: jpeft.Method, family: str, folder: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Our model with nothing at its initial value, and its arrays."""
    parts = jpeft.partition(method(loaded(family, folder), rngs=0))
    values = {key: np.asarray(value) for key, value in zoo.trained(parts, size=0.3).items()}
    values |= {key: np.asarray(v) for key, v in jpeft.partition(loaded(family, folder)).adapter.items()}  # the head
    model = jpeft.combine(parts.graphdef, values, parts.buffers, parts.frozen)
    return model, {**{key: np.asarray(value) for key, value in parts.buffers.items()}, **values}


def change(arrays: dict[str, np.ndarray], at: str, layer: int, activation: str, x: Any) -> Any:
    """s (act(x W_down + b_down) W_up + b_up)"""
    down, down_bias, up, up_bias, scale = (
        torch.tensor(arrays[f"{at}/{name}"][layer]) for name in ("down", "down_bias", "up", "up_bias", "scale")
    )
    return scale * (ACTIVATIONS[activation](x @ down + down_bias) @ up + up_bias)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_serial_adapters_stand_behind_both_sublayers(family: str, tmp_path: Any) -> None:
    """Houlsby et al. 2019, figure 2: behind each sublayer's projection, before the residual sum; the norms train."""
    model = tiny(family, tmp_path)
    ours, arrays = trained(jpeft.Houlsby(bottleneck_size=5, activation="gelu", scaling=0.7), family, tmp_path)
    layers, theirs_at, *outputs, _ = PLACES[family]
    for number, layer in enumerate(theirs_at(model)):
        for name in outputs:
            at = f"{layers}/{name.replace('.', '/')}/houlsby"

            def behind(module: Any, given: Any, y: Any, at: str = at, number: int = number) -> Any:
                return y + change(arrays, at, number, "gelu", y)

            layer.get_submodule(name).register_forward_hook(behind)
    norms = {key: value for key, value in arrays.items() if "norm" in key.lower().split("/houlsby/")[0].split("/")[-1]}
    assert len(norms) == (6 if family == "bert" else 3)
    for key, value in norms.items():
        path, own = key.split("/houlsby/")
        for number, array in enumerate(value if value.ndim == 2 else [value]):
            inside = path.replace(layers, f"{layers}/{number}") if value.ndim == 2 else path
            norm = model.base_model.get_submodule(inside.replace("/", "."))
            getattr(norm, {"scale": "weight", "bias": "bias"}[own]).data = torch.tensor(array)
    given = batch(family)
    assert difference(ours(**given), theirs(model, given), given) < 1e-5


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_parallel_adapters_lead_from_the_input_of_the_feed_forward_to_its_output(family: str, tmp_path: Any) -> None:
    """He et al. 2022, table 1: h + s f(x), with h the feed-forward's output before the residual sum and x its input."""
    model = tiny(family, tmp_path)
    ours, arrays = trained(jpeft.ParallelAdapter(reduction_factor=4), family, tmp_path)
    layers, theirs_at, _, end, first = PLACES[family]
    at = f"{layers}/{'output' if family == 'bert' else 'mlp'}/parallel"
    assert arrays[f"{at}/scale"].tolist() == [4.0] * 3
    for number, layer in enumerate(theirs_at(model)):
        seen: dict[int, Any] = {}

        def before(module: Any, given: Any, number: int = number, seen: dict[int, Any] = seen) -> None:
            seen[number] = given[0]

        def behind(module: Any, given: Any, y: Any, number: int = number, seen: dict[int, Any] = seen) -> Any:
            return y + change(arrays, at, number, "relu", seen[number])

        layer.get_submodule(first).register_forward_pre_hook(before)
        layer.get_submodule(end).register_forward_hook(behind)
    given = batch(family)
    assert difference(ours(**given), theirs(model, given), given) < 1e-5


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_fusion_attends_over_the_adapters_by_the_output_of_the_feed_forward(family: str, tmp_path: Any) -> None:
    """Pfeiffer et al. 2021, equations of section 3.2."""
    model = tiny(family, tmp_path)
    stage_one = jpeft.Pfeiffer(bottleneck_size=4)(loaded(family, tmp_path), rngs=0)
    parts = jpeft.partition(stage_one)
    tasks = [(zoo.trained(parts, seed, size=0.5), parts.buffers) for seed in range(3)]
    fused = jpeft.partition(jpeft.fuse(stage_one, tasks, rngs=0))
    attention = {key: np.asarray(value) for key, value in zoo.trained(fused, size=0.3).items()}
    attention |= {key: np.asarray(v) for key, v in jpeft.partition(loaded(family, tmp_path)).adapter.items()}
    ours = jpeft.combine(fused.graphdef, attention, fused.buffers, fused.frozen)
    layers, theirs_at, _, end, _ = PLACES[family]
    at = f"{layers}/{end.replace('.', '/')}"
    each = [{key: np.asarray(value) for key, value in {**adapter, **buffers}.items()} for adapter, buffers in tasks]
    for number, layer in enumerate(theirs_at(model)):

        def behind(module: Any, given: Any, y: Any, number: int = number) -> Any:
            z = torch.stack([change(arrays, f"{at}/pfeiffer", number, "relu", y) for arrays in each], dim=-2)
            q, q_bias, k, v = (
                torch.tensor(attention[f"{at}/fusion/{name}"][number])
                for name in ("query", "query_bias", "key", "value")
            )
            weights = torch.softmax(((z @ k) @ (y @ q + q_bias)[..., None])[..., 0], dim=-1)  # [B, T, N]
            return y + (weights[..., None] * (z @ v)).sum(-2)

        layer.get_submodule(end).register_forward_hook(behind)
    given = batch(family)
    assert difference(ours(**given), theirs(model, given), given) < 1e-5
