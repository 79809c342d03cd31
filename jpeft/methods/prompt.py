"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691) and P-tuning (Liu et al. 2021, arXiv:2103.10385).

Virtual tokens with trained embeddings among those of the text. In prompt tuning the embeddings are the parameters; in
P-tuning they are what a small encoder, a bidirectional LSTM and two linear layers or an MLP, makes of its own inputs,
and they may stand anywhere in a template. `jpeft.virtual_tokens` says how they come into a batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import zlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.method import Method
from jpeft.methods.prompt_wrappers import EncodedPrompt, Prompt, PromptWrapper
from jpeft.methods.targeted import Targeted, replaced
from jpeft.paths import Node
from jpeft.targets import Layers, lasting
from jpeft.virtual_tokens import prompt_of
from jpeft.wrapper import innermost


class _PromptMethod(Targeted):
    """What both have in common: one embedding is wrapped."""

    wraps: ClassVar[tuple[type[nnx.Module], ...]] = (nnx.Embed,)
    role: ClassVar[str | None] = "embedding"

    num_virtual_tokens: int
    position: Any
    dtype: str
    exclude: Any = ()
    layers: Any = None

    def _settle(self) -> None:
        self.settle_targets()
        position = self.position
        if not isinstance(position, str | None):
            position = fields.token_ids(self, "position", position)
        fields.settle(
            self, num_virtual_tokens=fields.whole(self.num_virtual_tokens), position=position, dtype=str(self.dtype)
        )
        fields.check_whole(self, "num_virtual_tokens", self.num_virtual_tokens, least=1)
        fields.check_choice(self, "dtype", self.dtype, fields.DTYPES)
        if isinstance(position, tuple):
            if len(position) != self.num_virtual_tokens or list(position) != sorted(position):
                raise JpeftError(
                    f"{type(self).__name__}: position={position!r}: give the {self.num_virtual_tokens} virtual tokens "
                    "a place each, in rising order"
                )
        elif position not in ("front", "back", None):
            raise JpeftError(f'{type(self).__name__}: position={position!r}; choose "front", "back", None or places')

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        chosen, named = self.resolve(model), type(self).__name__
        if len(chosen) > 1 or chosen[0][0].stack:
            found = ", ".join(node.name for node, _ in chosen)
            raise JpeftError(f"{named}: give one token embedding outside the layers as targets=, not {found}")
        if prompt_of(model) is not None:
            raise JpeftError(f"{named}: the model has virtual tokens already; a second prompt method cannot join them")
        return super().apply(model, key)

    def recorded(self, model: nnx.Module) -> tuple[Method, ...]:
        if all(lasting(entry) for entry in self.targets or ()):
            return (self,)
        return (replaced(self, targets=tuple(f"^{re.escape(node.expanded())}$" for node, _ in self.resolve(model))),)


@dataclasses.dataclass(frozen=True)
class PromptTuning(_PromptMethod):
    """Virtual tokens whose embeddings are trained (arXiv:2104.08691).

    num_virtual_tokens: how many, n; the text and they must fit into the model together.
    init: "vocabulary" (the embeddings of tokens drawn at random), "random" (uniform within 0.5, as in the paper), or
        "text": those of `text_ids`, repeated or cut to n.
    text_ids: the tokens of a text to start from.
    position: "front", "back", a place for each, or None: see `jpeft.virtual_tokens`.
    targets: the token embedding; None: the one that the model declares.
    dtype: of the prompt, which is cast to that of the embeddings.
    name: keyed `<embedding's path>/<name>/embeddings`, [n, D].
    """

    kind: ClassVar[str] = "prompt_tuning"

    num_virtual_tokens: int = 20
    init: str = "vocabulary"
    text_ids: tuple[int, ...] = ()
    position: Any = "front"
    targets: Any = None
    dtype: str = "float32"
    name: str = "prompt"

    def __post_init__(self) -> None:
        self._settle()
        fields.settle(self, text_ids=fields.token_ids(self, "text_ids", self.text_ids))
        fields.check_choice(self, "init", self.init, ("vocabulary", "random", "text"))
        if (self.init == "text") != bool(self.text_ids):
            raise JpeftError("PromptTuning: init='text' and text_ids= (the tokens of a text) belong together")

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> PromptWrapper:
        own, size = node.keys(key, self.name), base.num_embeddings
        if self.init == "random":
            rows = jax.random.uniform(own, (self.num_virtual_tokens, base.features), minval=-0.5, maxval=0.5)
        else:
            if self.init == "text":
                ids = jnp.asarray(np.resize(self.text_ids, self.num_virtual_tokens))
                if max(self.text_ids) >= size:
                    raise JpeftError(f"PromptTuning: text_ids holds {max(self.text_ids)}, the vocabulary {size} ids")
            else:
                ids = jax.random.randint(own, (self.num_virtual_tokens,), 0, size)
            rows = innermost(base)(ids)
        return Prompt(base, name=self.name, embeddings=rows.astype(self.dtype), position=self.position)


@dataclasses.dataclass(frozen=True)
class PTuning(_PromptMethod):
    """Virtual tokens whose embeddings an encoder makes (arXiv:2103.10385), anywhere in the text.

    num_virtual_tokens, position, targets, dtype: as in `PromptTuning`; P-tuning's templates give `position` a place for
        each virtual token, such as (0, 0, 0, 3, 3).
    encoder: "lstm" (bidirectional, then two linear layers with a ReLU between) or "mlp" (three, with two).
    hidden_size: of the LSTM (each direction) or the MLP; None: the width of the embeddings.
    encoder_layers: how many LSTM layers; the MLP has none.

    The encoder runs once per call. `jpeft.bake` stores what it makes, `jpeft.generate` does so by itself; a saved
    adapter keeps the encoder, so that training can go on. Keyed `<embedding's path>/<name>/inputs` [n, D],
    `lstm<l>_<direction>_{input,hidden,bias}` (gates in PyTorch's order, its two biases as one) and
    `linear<i>_{kernel,bias}`; baked, as `PromptTuning`.
    """

    kind: ClassVar[str] = "p_tuning"

    num_virtual_tokens: int = 20
    encoder: str = "lstm"
    hidden_size: int | None = None
    encoder_layers: int = 2
    position: Any = "front"
    targets: Any = None
    dtype: str = "float32"
    name: str = "p_tuning"

    def __post_init__(self) -> None:
        self._settle()
        fields.settle(
            self, hidden_size=fields.whole(self.hidden_size), encoder_layers=fields.whole(self.encoder_layers)
        )
        fields.check_choice(self, "encoder", self.encoder, ("lstm", "mlp"))
        fields.check_whole(self, "encoder_layers", self.encoder_layers, least=1)
        if self.hidden_size is not None:
            fields.check_whole(self, "hidden_size", self.hidden_size, least=1)

    def baked(self) -> PromptTuning:
        return PromptTuning(
            num_virtual_tokens=self.num_virtual_tokens,
            position=self.position,
            targets=self.targets,
            dtype=self.dtype,
            name=self.name,
        )

    def wrapper(self, base: Any, node: Node, layers: Layers, key: jax.Array) -> PromptWrapper:
        width, hidden = base.features, self.hidden_size or base.features
        shapes: dict[str, tuple[tuple[int, ...], int | None]] = {"inputs": ((self.num_virtual_tokens, width), None)}
        if self.encoder == "lstm":
            for layer in range(self.encoder_layers):
                for side in ("forward", "backward"):
                    parts = (("input", (2 * hidden if layer else width, 4 * hidden)), ("hidden", (hidden, 4 * hidden)))
                    for part, shape in (*parts, ("bias", (4 * hidden,))):
                        shapes[f"lstm{layer}_{side}_{part}"] = (shape, hidden)
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, hidden, hidden, width]
        for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            shapes[f"linear{number}_kernel"] = ((inputs, outputs), inputs)
            shapes[f"linear{number}_bias"] = ((outputs,), inputs)
        own = node.keys(key, self.name)
        weights = {name: _drawn(own, name, *form).astype(self.dtype) for name, form in shapes.items()}
        return EncodedPrompt(base, name=self.name, weights=weights, position=self.position)


def _drawn(key: jax.Array, name: str, shape: tuple[int, ...], fan: int | None) -> jax.Array:
    """Normal, or uniform within 1 / sqrt(fan)."""
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if fan is None:
        return jax.random.normal(key, shape)
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / math.sqrt(fan)
