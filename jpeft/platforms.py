"""Which kind of device a program is compiled for: kernels, and the quickest of equal programs, differ."""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding


def platform_of(sharding: NamedSharding | None) -> str:
    """Where arrays that lie so are computed with, "cpu", "gpu" or "tpu"; None: where this process computes.

    A mesh may be of devices that are not here, for which a program is only compiled.
    """
    return jax.default_backend() if sharding is None else sharding.mesh.devices.flat[0].platform
