"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190) and P-tuning v2 (Liu et al. 2021, arXiv:2110.07602).

Each attention attends to P trained keys and values before those of the tokens:

    Attn(q, [P_k; K], [P_v; V])

They are trained directly, or are what an MLP makes of a smaller matrix (section 4.3 of the first paper), which trains
more steadily and which `jpeft.bake` drops.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpeft import surgery
from jpeft.errors import JpeftError
from jpeft.methods import fields
from jpeft.methods.method import refuse_second
from jpeft.methods.prefix_text import KeysValues, attention_path, keys_values_of
from jpeft.methods.prefix_wrappers import Prefix, PrefixWrapper, ReparameterizedPrefix
from jpeft.methods.targeted import Targeted, replaced
from jpeft.paths import Node
from jpeft.targets import Layers
from jpeft.wrapper import innermost

_STDDEV = {"small": 0.02, "normal": 1.0, "zeros": 0.0}


@dataclasses.dataclass(frozen=True)
class PrefixTuning(Targeted):
    """Trained keys and values before those of the tokens, in every attention (arXiv:2101.00190).

    num_virtual_tokens: how many, P. Real tokens have the positions from P on, and P + T must fit into the model.
    reparameterize: train them through an MLP, as the paper does. hidden_size: of its hidden layer.
    init: of keys and values that are trained directly: "small" (normal, standard deviation 0.02), "normal" (1, as
        Hugging Face PEFT), "zeros" (all virtual tokens then stay alike), or "text": what the model makes of `text_ids`.
    text_ids: the tokens of a text, repeated or cut to P. Without padding, the adapted model then computes at first what
        the base does behind that text.
    targets, exclude, layers: the attention modules, which hold an `attention_fn`; None: all that the model declares, in
        encoder-decoders those of the encoder, the decoder and between them, each with its own prefix. A model of your
        own names them; `nnx.MultiHeadAttention` is known, another module says `kv_shape = (heads, head width)`.
    dtype: of the variables, which are cast to that of the model's keys.
    name: keyed `<module path>/attention_fn/<name>/keys` and `/values`, lead + [P, heads, head width].
    """

    kind: ClassVar[str] = "prefix_tuning"
    wraps: ClassVar[tuple[type[nnx.Module], ...]] = (nnx.Module,)
    role: ClassVar[str | None] = "attention"

    num_virtual_tokens: int = 10
    reparameterize: bool = True
    hidden_size: int = 512
    init: str = "small"
    text_ids: tuple[int, ...] = ()
    targets: Any = None
    exclude: Any = ()
    layers: Any = None
    dtype: str = "float32"
    name: str = "prefix"

    def __post_init__(self) -> None:
        self.settle_targets()
        fields.settle(
            self,
            num_virtual_tokens=fields.whole(self.num_virtual_tokens),
            hidden_size=fields.whole(self.hidden_size),
            text_ids=fields.token_ids(self, "text_ids", self.text_ids),
            dtype=str(self.dtype),
        )
        fields.check_whole(self, "num_virtual_tokens", self.num_virtual_tokens, least=1)
        fields.check_whole(self, "hidden_size", self.hidden_size, least=1)
        fields.check_switch(self, "reparameterize")
        fields.check_choice(self, "init", self.init, (*_STDDEV, "text"))
        fields.check_choice(self, "dtype", self.dtype, fields.DTYPES)
        named = type(self).__name__
        if (self.init == "text") != bool(self.text_ids):
            raise JpeftError(f"{named}: init='text' and text_ids= (the tokens of a text) belong together")
        if self.reparameterize and self.init != "small":
            raise JpeftError(
                f"{named}: init={self.init!r} needs reparameterize=False; an MLP has its own initial values"
            )

    def apply(self, model: nnx.Module, key: jax.Array) -> nnx.Module:
        chosen = self.resolve(model)
        for node, _ in chosen:
            if not hasattr(innermost(node.module), "attention_fn"):
                raise JpeftError(
                    f"{type(self).__name__}: {node.name!r}, a {type(innermost(node.module)).__name__}, holds no "
                    "attention_fn that could be given a prefix; name modules that do"
                )
            refuse_second(innermost(node.module).attention_fn, self.name, node.name)
        texts = self._texts(model, chosen)
        return surgery.replace(
            model, {attention_path(node): self._maker(node, layers, key, texts) for node, layers in chosen}
        )

    def baked(self) -> PrefixTuning:
        return replaced(self, reparameterize=False)

    def _texts(self, model: nnx.Module, chosen: list[tuple[Node, Layers]]) -> dict[str, KeysValues]:
        if self.init != "text":
            return {}
        names = [node.expanded(m) for node, layers in chosen for m in (layers or node.members)]
        return keys_values_of(model, names, [int(token) for token in np.resize(self.text_ids, self.num_virtual_tokens)])

    def _maker(self, node: Node, layers: Layers, key: jax.Array, texts: dict[str, KeysValues]) -> Any:
        heads, width = kv_shape(node)
        lead = () if node.stack is None else (len(layers or node.members),)
        keys = node.keys(key, self.name, lead, layers)
        if self.reparameterize:
            values = self._mlp(node, key, keys, heads, width)
            return lambda base: ReparameterizedPrefix(
                base, name=self.name, values=values, leading=len(lead), layers=layers
            )
        if self.init == "text":
            rows = [texts[node.expanded(m)] for m in (layers or node.members)]
            made = [jnp.stack(part) if node.stack else part[0] for part in zip(*rows, strict=True)]
        else:
            shape = (2, self.num_virtual_tokens, heads, width)
            drawn = _vmapped(lambda k: jax.random.normal(k, shape), len(lead))(keys) * _STDDEV[self.init]
            made = [jnp.take(drawn, side, axis=len(lead)) for side in (0, 1)]
        both = [array.astype(self.dtype) for array in made]
        return lambda base: Prefix(base, name=self.name, keys=both[0], values=both[1], layers=layers)

    def _mlp(self, node: Node, key: jax.Array, keys: jax.Array, heads: int, width: int) -> dict[str, jax.Array]:
        """The MLP's initial values: normal embeddings, and linear layers uniform within 1 / sqrt(inputs)."""
        outer, hidden = heads * width, self.hidden_size
        parts = [part for part in node.parts if not part.isdecimal()]
        common = dataclasses.replace(node, parts=tuple(parts), stack=None).keys(key, self.name)
        first = [jax.random.fold_in(common, number) for number in range(3)]

        def uniform(key: jax.Array, shape: tuple[int, ...], inputs: int) -> jax.Array:
            return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / math.sqrt(inputs)

        def last(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            weight, bias = jax.random.split(key)
            return uniform(weight, (hidden, 2, heads, width), hidden), uniform(bias, (2, heads, width), hidden)

        w_out, b_out = _vmapped(last, keys.ndim)(keys)
        made = {
            "embedding": jax.random.normal(first[0], (self.num_virtual_tokens, outer)),
            "w_in": uniform(first[1], (outer, hidden), outer),
            "b_in": uniform(first[2], (hidden,), outer),
            "w_out": w_out,
            "b_out": b_out,
        }
        return {name: value.astype(self.dtype) for name, value in made.items()}


@dataclasses.dataclass(frozen=True)
class PTuningV2(PrefixTuning):
    """Deep prompts without reparameterisation (arXiv:2110.07602), for classification, labelling and generation alike.

    The fields are those of `PrefixTuning`. Short prompts (below 20) do for simple classification, sequence labelling
    wants about 100 (section 4 of the paper).
    """

    kind: ClassVar[str] = "p_tuning_v2"

    num_virtual_tokens: int = 20
    reparameterize: bool = False
    name: str = "p_tuning_v2"


def kv_shape(node: Node) -> tuple[int, int]:
    """(heads, head width) of the keys and values of the attention module at `node`."""
    module = innermost(node.module)
    if isinstance(module, nnx.MultiHeadAttention):
        return module.num_kv_heads, module.head_dim
    shape = getattr(module, "kv_shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(size, int) for size in shape)):
        raise JpeftError(
            f"{node.name!r}: a {type(module).__name__} does not say what shape its keys have; give it an attribute "
            "kv_shape = (key-value heads, head width)"
        )
    return shape


def _vmapped(function: Any, times: int) -> Any:
    for _ in range(times):
        function = jax.vmap(function)
    return function


__all__ = ["PTuningV2", "PrefixTuning", "PrefixWrapper", "kv_shape"]
