"""Rotary position embedding (Su et al., 2021) and the ways checkpoints stretch it to longer texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft.models.config import Fields

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """The `rope_parameters` of a config.json; `length` is the original context length where the kind needs one."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __call__(self, positions: jax.Array, head_dim: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B, T, 1, head_dim / 2] for positions [B, T], computed in float32."""
        angles = positions.astype(jnp.float32)[..., None] * self._frequencies(positions, head_dim)
        factor = self.attention_factor
        return (
            (jnp.cos(angles) * factor).astype(dtype)[:, :, None],
            (jnp.sin(angles) * factor).astype(dtype)[:, :, None],
        )

    def _frequencies(self, positions: jax.Array, dim: int) -> jax.Array:
        exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
        base: Any = self.theta
        if self.kind == "dynamic":
            longest = jnp.maximum(jnp.max(positions) + 1, self.length)
            base = base * (self.factor * longest / self.length - (self.factor - 1)) ** (dim / (dim - 2))
        plain = 1.0 / base**exponents
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(plain, dim)
        return plain

    def _llama3(self, plain: jax.Array) -> jax.Array:
        wavelength = 2 * math.pi / plain
        blend = (self.length / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - blend) * plain / self.factor + blend * plain
        stretched = jnp.where(wavelength > self.length / self.low_freq_factor, plain / self.factor, blended)
        return jnp.where(wavelength < self.length / self.high_freq_factor, plain, stretched)

    def _yarn(self, plain: jax.Array, dim: int) -> jax.Array:
        # Peng et al., 2023: dimensions of many rotations keep their frequency, those of few are interpolated.
        def at(rotations: float) -> float:
            return dim * math.log(self.length / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = at(self.beta_fast), at(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001), 0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + H/2]) of heads [B, T, N, H] by the angles of `Rope`."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def parse_rope(fields: Fields, context: int) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    new, old = fields.object("rope_parameters"), fields.object("rope_scaling")
    raw: Mapping[str, Any] = new if new is not None else old if old is not None else {}
    inner = Fields(raw, f"{fields.where}: {'rope_parameters' if new is not None else 'rope_scaling'}")
    theta = inner.number("rope_theta") if raw.get("rope_theta") is not None else fields.number("rope_theta", 10000.0)
    name = "rope_type" if "rope_type" in raw else "type"
    kind = inner.choice(name, "default", KINDS)
    partial = inner if "partial_rotary_factor" in raw else fields
    if partial.number("partial_rotary_factor", 1.0) != 1.0:
        raise partial.refuse("partial_rotary_factor", "1.0, the only one these families have here")
    if kind == "default":
        return Rope(theta)
    factor = inner.number("factor")
    if factor < 1:
        raise inner.refuse("factor", "a number from 1 up")
    if kind in ("linear", "dynamic"):
        return Rope(theta, kind, factor, context)
    length = inner.integer(
        "original_max_position_embeddings", fields.raw.get("original_max_position_embeddings", context)
    )
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if high <= low:
            raise inner.refuse("high_freq_factor", f"a number above low_freq_factor, {low}")
        return Rope(theta, kind, factor, length, low, high)
    return Rope(
        theta,
        kind,
        factor,
        length,
        beta_fast=inner.number("beta_fast", 32.0) if raw.get("beta_fast") is not None else 32.0,
        beta_slow=inner.number("beta_slow", 1.0) if raw.get("beta_slow") is not None else 1.0,
        truncate=inner.flag("truncate", True),
        attention_factor=_yarn_attention(inner, factor),
    )


def _yarn_attention(inner: Fields, factor: float) -> float:
    def scale(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1.0

    if inner.raw.get("attention_factor") is not None:
        return inner.number("attention_factor")
    if inner.raw.get("mscale") and inner.raw.get("mscale_all_dim"):
        return scale(inner.number("mscale")) / scale(inner.number("mscale_all_dim"))
    return scale(1.0)
