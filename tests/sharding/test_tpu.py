"""What the TPU compiler makes of a training step on a mesh; libtpu is needed, a TPU is not."""

from __future__ import annotations

import math
import re

import pytest
from jax.experimental import topologies

from tests.sharding.test_collectives import INNER, TENSOR, VOCABULARY, WIDTH, compiled_step


@pytest.mark.parametrize("quantise", [False, True], ids=["plain", "nf4"])
def test_weights_are_gathered_layer_by_layer(quantise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is locked: no chip is used
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    text = compiled_step(quantise=quantise, devices=devices).as_text()
    found = re.findall(r" = (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    sizes = {(dtype, math.prod(map(int, dims.split(",")))) for dtype, dims in found}
    floats = {size for dtype, size in sizes if dtype in ("f32", "bf16")}
    kernel, head = WIDTH * INNER // TENSOR, WIDTH * VOCABULARY // TENSOR
    if quantise:
        # Kernels come as bytes of two codes; as floats only the head, LoRA's factors and the scales of blocks.
        assert ("u8", kernel // 2) in sizes or ("s8", kernel // 2) in sizes
        assert max(floats - {head}) < kernel // 2
    else:
        assert {kernel, head} <= floats
        assert max(floats - {head}) == kernel
