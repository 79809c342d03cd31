"""Every model and method that the conformance suite runs. A new one enters the suite by standing here.

Models are tiny and random; sizes are chosen odd and unlike one another, so that a swapped axis cannot go unnoticed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import jpeft

BATCH, TIME, VOCABULARY, WIDTH = 2, 6, 31, 12


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with something to feed it. make(dtype): the model; run(model): its output, floating point.

    merge: how `jpeft.merge` is called, where the model's weights are quantised.
    """

    make: Callable[[str], Any]
    run: Callable[[Any], jax.Array]
    layers: int = 0  # how many numbered layers it has, 0 for none
    merge: Mapping[str, bool] = dataclasses.field(default_factory=dict)


def ids(rows: int = BATCH) -> jax.Array:
    """The tokens [B, T] that the language models of the zoo are fed."""
    return jax.random.randint(jax.random.key(1), (rows, TIME), 0, VOCABULARY)


def _floats(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(2), shape).astype(dtype)


class Block(nnx.Module):
    """A layer as a user might write it."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs, param_dtype=dtype)
        self.up = nnx.Linear(WIDTH, 20, rngs=rngs, param_dtype=dtype)
        self.down = nnx.Linear(20, WIDTH, use_bias=False, rngs=rngs, param_dtype=dtype)

    def __call__(self, x: jax.Array, index: Any = None) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class UserModel(nnx.Module):
    """Embedding, layers in a plain list or a Stack, a tied head."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32, *, stacked: bool, remat: bool = False, depth: int = 3):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs, param_dtype=dtype)
        self.layers = jpeft.Stack.create(lambda r: Block(r, dtype), depth, rngs=rngs, remat=remat)
        if not stacked:
            self.layers = self.layers.unstack()

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(jpeft.run_layers(self.layers, self.embed(ids)))


class Shapes(nnx.Module):
    """The layer kinds whose kernels have more than two axes."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        kw: dict[str, Any] = {"rngs": rngs, "param_dtype": dtype}
        self.split = nnx.LinearGeneral(WIDTH, (3, 5), **kw)
        self.join = nnx.LinearGeneral((3, 5), WIDTH, axis=(-2, -1), **kw)
        self.heads = nnx.Einsum("bte,ehd->bthd", (WIDTH, 4, 7), (4, 7), **kw)
        self.back = nnx.Einsum("...hd,hde->...e", (4, 7, WIDTH), **kw)
        self.experts = nnx.Einsum("bte,tef->btf", (TIME, WIDTH, WIDTH), **kw)
        self.window = nnx.Conv(WIDTH, 8, (3,), strides=2, padding="CIRCULAR", feature_group_count=2, **kw)
        self.norm = nnx.BatchNorm(8, use_running_average=True, **kw)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.join(nnx.gelu(self.split(x)))
        x = x + self.back(nnx.gelu(self.heads(x)))
        return self.norm(self.window(x + self.experts(x)))


class Attention(nnx.Module):
    """Flax's own attention, with dropout of its own."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.attention = nnx.MultiHeadAttention(4, WIDTH, 16, decode=False, rngs=rngs, param_dtype=dtype)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(x + self.attention(x, is_causal=True))


def _user(stacked: bool, **kwargs: Any) -> Case:
    return Case(
        lambda dtype: UserModel(nnx.Rngs(0), jnp.dtype(dtype), stacked=stacked, **kwargs),
        lambda model: model(ids()),
        layers=3,
    )


_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}

# What `jpeft.models.from_config` is given: (config.json, task, further arguments).
FAMILIES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama": ({"model_type": "llama", "tie_word_embeddings": False, **_LLAMA}, "causal-lm", {}),
    "mistral-remat": ({"model_type": "mistral", "sliding_window": 4, **_LLAMA}, "causal-lm", {"remat": True}),
    "qwen3-classifier": ({"model_type": "qwen3", **_LLAMA}, "sequence-classification", {"num_labels": 3}),
    "gpt2": (
        {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 32},
        "causal-lm",
        {},
    ),
    "bert-mean-classifier": (
        {"model_type": "bert", "type_vocab_size": 2, **_BERT},
        "sequence-classification",
        {"num_labels": 3, "pooling": "mean"},
    ),
    "roberta": ({"model_type": "roberta", "type_vocab_size": 1, **_BERT, "pad_token_id": 1}, "masked-lm", {}),
    "t5": (
        {
            "model_type": "t5",
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": 5,
            "d_ff": 20,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        "seq2seq-lm",
        {},
    ),
}


def _family(name: str) -> Case:
    config, task, further = FAMILIES[name]

    def make(dtype: str) -> Any:
        return jpeft.models.from_config(config, task=task, dtype=dtype, rngs=nnx.Rngs(0), **further)

    def run(model: Any) -> jax.Array:
        given = {"decoder_input_ids": ids()[:, :4]} if task == "seq2seq-lm" else {}
        return model(ids(), **given)

    return Case(make, run, layers=3)


def _quantized(case: Case, form: Any) -> Case:
    return dataclasses.replace(case, make=lambda dtype: form(case.make(dtype)), merge={"dequantize": True})


MODELS: dict[str, Case] = {
    "user-list": _user(stacked=False),
    "user-stack-remat": _user(stacked=True, remat=True),
    "shapes": Case(
        lambda dtype: Shapes(nnx.Rngs(0), jnp.dtype(dtype)), lambda model: model(_floats(BATCH, TIME, WIDTH))
    ),
    "flax-attention": Case(
        lambda dtype: Attention(nnx.Rngs(0), jnp.dtype(dtype)), lambda model: model(_floats(BATCH, TIME, WIDTH))
    ),
    **{name: _family(name) for name in FAMILIES},
    "llama-nf4": _quantized(_family("llama"), jpeft.NF4(block_size=4)),
}

# The models that every method runs on, one of each kind.
CORE = ("user-stack-remat", "flax-attention", "llama", "gpt2", "bert-mean-classifier", "t5")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method in the conformance suite.

    models: those it runs on. on: other configurations for some of them (targets of a model that declares no roles).
    starts: as the base "exactly", "closely" (to 1e-5: initial values from a decomposition) or "elsewhere" (a prompt is
    always seen). merges: whether it is a function of the weight; where not, merging is refused by name. low: largest
    relative difference between merged and unmerged on a bfloat16 base.
    """

    method: jpeft.Method
    models: tuple[str, ...] = CORE
    on: Mapping[str, jpeft.Method] = dataclasses.field(default_factory=dict)
    starts: Literal["exactly", "closely", "elsewhere"] = "exactly"
    merges: bool = True
    rows: bool = True
    low: float = 5e-2


# Models that hold an `attention_fn`. A prefix is seen from the start, and it moves positions.
def _prefix(kind: Any, *models: str, **settings: Any) -> Entry:
    named = {"flax-attention": kind(targets="attention", **settings)}
    return Entry(kind(**settings), models=models, on=named, starts="elsewhere", merges=False)


# Models that put virtual tokens in by themselves.
_PROMPTED = ("llama", "gpt2", "bert-mean-classifier", "t5")

# One configuration of every registered method, and others that differ in a way of their own.
METHODS: dict[str, Entry] = {
    "lora": Entry(jpeft.LoRA(rank=2, alpha=3.0), models=tuple(MODELS)),
    "prefix_tuning": _prefix(
        jpeft.PrefixTuning,
        *("flax-attention", "llama", "gpt2", "bert-mean-classifier", "t5"),
        num_virtual_tokens=3,
        hidden_size=7,
    ),
    "p_tuning_v2": _prefix(jpeft.PTuningV2, "mistral-remat", "roberta", num_virtual_tokens=2),
    "prompt_tuning": Entry(
        jpeft.PromptTuning(num_virtual_tokens=3), models=_PROMPTED, starts="elsewhere", merges=False
    ),
    "p_tuning": Entry(
        jpeft.PTuning(num_virtual_tokens=3, hidden_size=5, encoder_layers=1, position=(0, 2, 4)),
        models=("llama",),
        starts="elsewhere",
        merges=False,
    ),
    "bitfit": Entry(
        jpeft.BitFit(),
        models=("flax-attention", "bert-mean-classifier"),
        on=dict.fromkeys(("llama", "t5"), jpeft.BitFit(new_biases=True)),
    ),
    "norm_tuning": Entry(
        jpeft.NormTuning(),
        models=("user-stack-remat", "t5"),
        on={"user-stack-remat": jpeft.NormTuning(targets="norm", layers=[1, 2])},
    ),
    "full_tuning": Entry(
        jpeft.FullTuning(targets=["mlp", "embed_tokens"]),
        models=("llama",),
        on={
            "user-stack-remat": jpeft.FullTuning(targets="down"),
            "flax-attention": jpeft.FullTuning(targets="out"),
            "gpt2": jpeft.FullTuning(targets=["mlp", "wte"]),
            "bert-mean-classifier": jpeft.FullTuning(targets=["attention", "word_embeddings"]),
            "t5": jpeft.FullTuning(targets=["SelfAttention", "shared"]),
        },
    ),
    # Tied to the head, and not.
    "trainable_tokens": Entry(
        jpeft.TrainableTokens(tokens=[7, 2, 30, 10, 5, 21, 25]),
        models=("user-stack-remat", "gpt2"),
        on={"user-stack-remat": jpeft.TrainableTokens(tokens=[7, 2, 30, 10, 5, 21, 25], targets="embed")},
        starts="closely",
    ),
    "vera": Entry(
        jpeft.VeRA(rank=5),
        models=("user-stack-remat", "llama"),
        on={"llama": jpeft.VeRA(rank=5, targets=["q_proj", "down_proj"], layers=[0, 1])},
        rows=False,
    ),
    "loha": Entry(jpeft.LoHa(rank=2, alpha=3.0), models=("user-stack-remat",), rows=False),
    "lokr": Entry(jpeft.LoKr(rank=1, alpha=3.0), models=("user-stack-remat",), rows=False),
    "oft": Entry(
        jpeft.OFT(block_size=4),
        models=("user-stack-remat", "llama-nf4"),
        on={"llama-nf4": jpeft.OFT(block_size=2, layers=[1])},
        starts="closely",
        rows=False,
    ),
    # Adapters: behind linear layers of every family, beside a feed-forward that is one module and one that is two.
    "houlsby": Entry(
        jpeft.Houlsby(bottleneck_size=5),
        models=("user-stack-remat", "bert-mean-classifier"),
        on={"user-stack-remat": jpeft.Houlsby(targets="down", norms="norm", reduction_factor=3, layers=[1, 2])},
        merges=False,
    ),
    "pfeiffer": Entry(
        jpeft.Pfeiffer(reduction_factor=2, drop=2, dropout=0.1),
        models=("t5",),
        on={"user-stack-remat": jpeft.Pfeiffer(targets="down", reduction_factor=2, drop=2)},
        merges=False,
    ),
    "parallel_adapter": Entry(
        jpeft.ParallelAdapter(scaling="learned"),
        models=("flax-attention",),
        on={"flax-attention": jpeft.ParallelAdapter(targets="attention", activation="tanh")},
        merges=False,
    ),
    "drop_adapters": Entry(
        jpeft.compose(jpeft.Pfeiffer(bottleneck_size=5), jpeft.DropAdapters(layers=[0])),
        models=("user-list",),
        on=dict.fromkeys(
            ("user-list", "user-stack-remat"),
            jpeft.compose(jpeft.Pfeiffer(targets="down", bottleneck_size=5), jpeft.DropAdapters(layers=[0])),
        ),
        merges=False,
    ),
    # Stage 1 as it is after training: with initial values of zero there is nothing to attend to.
    "adapter_fusion": Entry(
        jpeft.AdapterFusion(adapter=jpeft.Pfeiffer(bottleneck_size=5, init="bert", scaling=99.0), tasks=2),
        models=("bert-mean-classifier",),
        on={
            "user-stack-remat": jpeft.AdapterFusion(
                adapter=jpeft.Pfeiffer(targets="down", bottleneck_size=5, init="bert", scaling=99.0), tasks=2
            )
        },
        starts="elsewhere",
        merges=False,
    ),
    "mam": Entry(
        jpeft.MAM(num_virtual_tokens=3, hidden_size=7), models=("mistral-remat",), starts="elsewhere", merges=False
    ),
    "unipelt": Entry(
        jpeft.UniPELT(num_virtual_tokens=3, hidden_size=7, rank=2, bottleneck_size=5),
        models=("gpt2", "flax-attention"),
        on={
            "flax-attention": jpeft.UniPELT(
                num_virtual_tokens=3,
                reparameterize=False,
                projections="query",
                attention="attention",
                outputs="attention.out",
                bottleneck_size=5,
            )
        },
        starts="elsewhere",
        merges=False,
    ),
    "ia3": Entry(
        jpeft.IA3(),
        models=("user-stack-remat", "flax-attention", "gpt2", "bert-mean-classifier"),
        on={
            "user-stack-remat": jpeft.IA3(targets="up", feed_forward="down", layers=[0, 2]),
            "flax-attention": jpeft.IA3(targets=["key", "value"], feed_forward="out"),
        },
    ),
    "lora_plus": Entry(jpeft.LoRAPlus(rank=2), models=("user-stack-remat",)),
    "lora_fa": Entry(jpeft.LoRAFA(rank=2), models=("user-stack-remat", "flax-attention")),
    "dora": Entry(
        jpeft.DoRA(rank=2, alpha=3.0),
        models=("user-stack-remat", "flax-attention", "gpt2", "llama-nf4"),
        starts="closely",
        rows=False,
    ),
    "adalora": Entry(
        jpeft.AdaLoRA(rank=2, initial_rank=3, total_steps=9),
        models=("user-stack-remat", "flax-attention", "t5"),
        rows=False,
    ),
}

# Further configurations, which differ in ways that do not depend on the model: one with a stack tells. What splits the
# stack's scan also runs on a whole family, where it meets the cache.
_STACK = ("user-stack-remat",)
VARIANTS: dict[str, Entry] = {
    "lora-pissa": Entry(
        jpeft.LoRA(rank=2, alpha=3.0, init="pissa", targets=["embed", "up"], layers=[0, 2]),
        models=("user-stack-remat", "flax-attention"),
        on={"flax-attention": jpeft.LoRA(rank=3, init="olora", rank_pattern={"query": 2})},
        starts="closely",
    ),
    "lora-orthogonal": Entry(jpeft.LoRA(rank=2, init="orthogonal"), models=("user-stack-remat",), starts="closely"),
    "dora-some-layers": Entry(
        jpeft.DoRA(rank=2, dropout=0.3, layers=[1], init="pissa"), models=("llama",), starts="closely", rows=False
    ),
    "lora-rslora-gaussian": Entry(
        jpeft.LoRA(rank=4, alpha=2.0, use_rslora=True, init="gaussian", dropout=0.2), models=_STACK
    ),
    "lora-twice": Entry(jpeft.compose(jpeft.LoRA(rank=2), jpeft.LoRA(rank=4, name="second")), models=_STACK),
    "lora-some-layers": Entry(jpeft.LoRA(rank=2, layers=[1], targets="all-linear"), models=(*_STACK, "llama")),
    "lora-ranks": Entry(
        jpeft.LoRA(rank=2, rank_pattern={"layers.0": 4, "layers.1": 0}, alpha_pattern={"layers.2": 5.0}), models=_STACK
    ),
}

ENTRIES = {**METHODS, **VARIANTS}
# How NNX holds a module decides nothing about how a method meets a model: in tree mode each method has one model and a
# stack of the user's own, and LoRA all of them.
_TREE = os.environ.get("NNX_GRAPH_MODE", "").lower() == "false"
PAIRS = [
    (model, name)
    for name, entry in ENTRIES.items()
    for model in (entry.models[:1] if _TREE and name != "lora" else entry.models)
]
# The other models of one kind each: fewer checks, for what differs is how a method finds its places.
OTHERS = [
    (model, name)
    for name, entry in METHODS.items()
    for model in CORE
    if model not in entry.models and (not _TREE or model == "user-stack-remat")
]
# Where a method has nothing to stand on: the user's model says nothing about itself, and Flax's attention has neither
# embedding nor norm nor plain linear layers.
NO_PLACE = {
    "user-stack-remat": (
        *("prefix_tuning", "p_tuning_v2", "prompt_tuning", "p_tuning", "parallel_adapter", "mam", "unipelt"),
    ),
    "flax-attention": (
        *("prompt_tuning", "p_tuning", "norm_tuning", "trainable_tokens", "vera", "loha", "lokr", "oft", "houlsby"),
        *("pfeiffer", "drop_adapters", "adapter_fusion", "mam"),
    ),
}
# Every method on a model that writes.
WRITERS = [pair for pair in PAIRS if pair[0] in ("llama", "gpt2")]
WRITERS += [(model, name) for model, name in OTHERS if model == "llama" and ("gpt2", name) not in PAIRS]
# LoRA on every model, the others where layers are a rematerialised stack and on one whole family.
DEEP = [(model, name) for model, name in PAIRS if name == "lora" or model in ("user-stack-remat", "llama")]


def method(name: str, model: str) -> jpeft.Method:
    """The configuration that the entry `name` has for `model`."""
    return ENTRIES[name].on.get(model, ENTRIES[name].method)


def trained(parts: jpeft.Partition, seed: int = 7, size: float = 0.1) -> dict[str, jax.Array]:
    """Adapter values as after training: nothing at its initial value."""
    keys = jax.random.split(jax.random.key(seed), len(parts.adapter))
    return {
        name: (size * jax.random.normal(key, value.shape)).astype(value.dtype)
        for key, (name, value) in zip(keys, sorted(parts.adapter.items()), strict=True)
    }


def relative(a: jax.Array, b: jax.Array) -> float:
    """Largest difference relative to the largest value."""
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    return float(jnp.max(jnp.abs(a - b)) / jnp.maximum(jnp.max(jnp.abs(b)), 1e-9))
