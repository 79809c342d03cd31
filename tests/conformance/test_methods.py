"""What every method promises on every model, whatever the two are."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jpeft
from tests import zoo

# scope="module" makes pytest run all tests of one pair after another, so that they share what was compiled for it.
pairs = pytest.mark.parametrize(("model_name", "method_name"), zoo.PAIRS, scope="module")
# What depends on a method's wrappers and on stacking, and on the model's layers only through these.
deep = pytest.mark.parametrize(("model_name", "method_name"), zoo.DEEP, scope="module")

# What is compared to the last bits, or after Adam has made whole steps of it, is compiled as it is for users: the
# quicker way of tests/conftest.py rounds by how a program is cut into loops.
AS_USUAL: Any = {"xla_cpu_use_fusion_emitters": True}
QUICKLY: Any = {}


@functools.cache
def base_of(model_name: str, dtype: str = "float32") -> Any:
    return zoo.MODELS[model_name].make(dtype)


@functools.cache
def adapted_of(model_name: str, method_name: str) -> Any:
    return zoo.method(method_name, model_name)(base_of(model_name), rngs=nnx.Rngs(5))


@functools.cache
def output(model_name: str) -> jax.Array:
    return evaluate(model_name, base_of(model_name))


def evaluate(model_name: str, model: Any, *, quickly: bool = False) -> jax.Array:
    parts = jpeft.partition(model)
    return _forward(model_name, parts.graphdef, quickly)(*parts[1:])


def forward(model_name: str, parts: jpeft.Partition) -> Any:
    return _forward(model_name, parts.graphdef, False)


@functools.cache
def _forward(model_name: str, graphdef: Any, quickly: bool) -> Any:
    run = zoo.MODELS[model_name].run
    options = QUICKLY if quickly else AS_USUAL
    return jax.jit(lambda *arrays: run(jpeft.combine(graphdef, *arrays)), compiler_options=options)


def loss_of(model_name: str, parts: jpeft.Partition) -> Any:
    """loss(adapter, buffers, frozen, key): distance to a fixed random target, and the methods' penalty."""
    run = zoo.MODELS[model_name].run

    def loss(adapter: Any, buffers: Any, frozen: Any, key: Any = None) -> jax.Array:
        model = jpeft.combine(parts.graphdef, adapter, buffers, frozen, dropout=key)
        y = run(model).astype(jnp.float32)
        return jnp.mean((y - jax.random.normal(jax.random.key(3), y.shape)) ** 2) + jpeft.penalty(model)

    return loss


@functools.cache
def gradient_of(model_name: str, method_name: str) -> Any:
    """value_and_grad of the loss, compiled once for all tests of a pair."""
    loss = loss_of(model_name, jpeft.partition(adapted_of(model_name, method_name)))
    options = AS_USUAL if (model_name, method_name) in zoo.DEEP else QUICKLY
    return jax.jit(jax.value_and_grad(loss), compiler_options=options)


def arrays_of(model: nnx.Module) -> dict[str, Any]:
    parts = jpeft.partition(model)
    return {**parts.adapter, **parts.buffers, **parts.frozen}


@pairs
def test_starts_as_the_base(model_name: str, method_name: str) -> None:
    made, expected = evaluate(model_name, adapted_of(model_name, method_name)), output(model_name)
    starts = zoo.ENTRIES[method_name].starts
    if starts == "exactly":
        assert jnp.array_equal(made, expected)
    elif starts == "closely":
        assert zoo.relative(made, expected) < 1e-5
    else:
        assert made.dtype == expected.dtype
        assert zoo.relative(made, expected) > 1e-5


@pairs
def test_shares_and_leaves_the_base(model_name: str, method_name: str) -> None:
    base = base_of(model_name)
    before = arrays_of(base)
    frozen = jpeft.partition(zoo.method(method_name, model_name)(base, rngs=nnx.Rngs(5))).frozen
    assert arrays_of(base).keys() == before.keys()
    assert all(arrays_of(base)[key] is before[key] for key in before)
    assert all(frozen[key] is before[key] for key in frozen)


@pairs
def test_trains_and_only_what_it_should(model_name: str, method_name: str) -> None:
    parts = jpeft.partition(adapted_of(model_name, method_name))
    gradient_at = gradient_of(model_name, method_name)
    optimizer = optax.adam(3e-2)

    @jax.jit
    def update(adapter: Any, state: Any, gradient: Any) -> Any:
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(adapter, updates), state

    copies = {name: np.array(value) for name, value in parts.frozen.items() if value.dtype != jax.random.key(0).dtype}
    adapter, state = parts.adapter, optimizer.init(parts.adapter)
    losses = []
    for _ in range(50):
        value, gradient = gradient_at(adapter, parts.buffers, parts.frozen)
        adapter, state = update(adapter, state, gradient)
        losses.append(float(value))
    value, gradient = gradient_at(adapter, parts.buffers, parts.frozen)
    assert value < losses[0]
    assert gradient.keys() == parts.adapter.keys()
    still = [name for name, value in gradient.items() if not jnp.any(value != 0)]
    assert not still, f"no gradient for {still}"
    assert all(jnp.all(jnp.isfinite(value)) for value in gradient.values())
    assert all(np.array_equal(copies[name], parts.frozen[name]) for name in copies)


@pairs
def test_merging_computes_the_same(model_name: str, method_name: str) -> None:
    adapted = adapted_of(model_name, method_name)
    parts = jpeft.partition(adapted)
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    expected = evaluate(model_name, model)
    assert zoo.relative(expected, output(model_name)) > 1e-3
    if not zoo.ENTRIES[method_name].merges:
        with pytest.raises(jpeft.JpeftError, match=r"merge: .*is not a function of the weight"):
            jpeft.merge(model)
        return
    merging = zoo.MODELS[model_name].merge
    merged = jpeft.merge(model, **merging)
    assert zoo.relative(evaluate(model_name, merged), expected) < 1e-5
    again = jpeft.merge(merged)
    assert all(jnp.array_equal(arrays_of(again)[k], v) for k, v in arrays_of(merged).items() if v.dtype != "key<fry>")
    base = jpeft.merge(base_of(model_name), **merging)
    assert {k: (v.shape, v.dtype) for k, v in arrays_of(merged).items()} == {
        k: (v.shape, v.dtype) for k, v in arrays_of(base).items()
    }


@pairs
def test_stripping_gives_the_base_back(model_name: str, method_name: str) -> None:
    stripped, base = jpeft.strip(adapted_of(model_name, method_name)), base_of(model_name)
    assert nnx.graphdef(stripped) == nnx.graphdef(base)
    assert all(arrays_of(stripped)[key] is value for key, value in arrays_of(base).items())


@deep
def test_both_ways_into_optax_agree(model_name: str, method_name: str) -> None:
    parts = jpeft.partition(adapted_of(model_name, method_name))
    loss, optimizer = loss_of(model_name, parts), optax.adamw(1e-2, weight_decay=0.1)
    adapter = zoo.trained(parts)

    def updated(tree: Any, gradient: Any, transformation: Any) -> Any:
        updates, _ = transformation.update(gradient, transformation.init(tree), tree)
        return optax.apply_updates(tree, updates)

    tree = {**parts.frozen, **parts.buffers, **adapter}
    mask, labels = (f(adapted_of(model_name, method_name)) for f in (jpeft.trainable_mask, jpeft.param_labels))
    assert mask.keys() == labels.keys() == tree.keys()
    fixed = {k: v for k, v in tree.items() if not jnp.issubdtype(v.dtype, jnp.floating)}
    tree = {k: v for k, v in tree.items() if k not in fixed}
    mask, labels = ({k: d[k] for k in tree} for d in (mask, labels))
    groups = {label: optax.set_to_zero() if label == "frozen" else optimizer for label in set(labels.values())}
    masked = optax.chain(
        optax.masked(optimizer, mask), optax.masked(optax.set_to_zero(), {k: not v for k, v in mask.items()})
    )

    _, own = gradient_of(model_name, method_name)(adapter, parts.buffers, parts.frozen)
    expected = jax.jit(lambda tree, gradient: updated(tree, gradient, optimizer))(adapter, own)
    gradient = jax.jit(jax.grad(lambda tree: loss({**tree, **fixed}, {}, {})), compiler_options=AS_USUAL)(tree)
    for transformation in (optax.partition(groups, labels), masked):
        new = jax.jit(lambda tree, gradient, t=transformation: updated(tree, gradient, t))(tree, gradient)
        assert all(np.allclose(new[k], expected[k], rtol=1e-5, atol=1e-7) for k in expected)
        assert all(jnp.array_equal(new[k], tree[k]) for k in tree if k not in expected)


@pairs
def test_switching_tasks_recompiles_nothing(model_name: str, method_name: str) -> None:
    parts = jpeft.partition(adapted_of(model_name, method_name))
    run = forward(model_name, parts)
    run(*parts[1:])
    before = run._cache_size()
    outputs = [run(zoo.trained(parts, seed), parts.buffers, parts.frozen) for seed in range(3)]
    assert run._cache_size() == before
    assert not jnp.allclose(outputs[0], outputs[1])


@deep
def test_many_adapters_at_once_by_vmap(model_name: str, method_name: str) -> None:
    parts = jpeft.partition(adapted_of(model_name, method_name))
    adapters = [zoo.trained(parts, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    loss = loss_of(model_name, parts)
    each = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(0, None, None)))
    values, gradients = each(stacked, parts.buffers, parts.frozen)
    one_value, one_gradient = gradient_of(model_name, method_name)(adapters[1], parts.buffers, parts.frozen)
    assert np.allclose(values[1], one_value, rtol=1e-5)
    assert max(zoo.relative(gradients[k][1], one_gradient[k]) for k in one_gradient) < 1e-4


@pairs
def test_rows_with_adapters_of_their_own(model_name: str, method_name: str) -> None:
    parts = jpeft.partition(adapted_of(model_name, method_name))
    tasks = [(zoo.trained(parts, seed), parts.buffers) for seed in range(3)]
    if "head" in jpeft.param_labels(adapted_of(model_name, method_name)).values():
        with pytest.raises(jpeft.JpeftError, match=r"'(classifier|score)/\w+'.* cannot differ from row to row"):
            jpeft.multi(adapted_of(model_name, method_name), tasks)
        return
    if not zoo.ENTRIES[method_name].rows:
        with pytest.raises(jpeft.JpeftError, match="cannot differ from row to row"):
            jpeft.multi(adapted_of(model_name, method_name), tasks)
        return
    served = jpeft.partition(jpeft.multi(adapted_of(model_name, method_name), tasks))
    run = zoo.MODELS[model_name].run

    @jax.jit
    def mixed(ids: jax.Array, *arrays: Any) -> jax.Array:
        return run(jpeft.combine(served.graphdef, *arrays, adapter_ids=ids))

    one = forward(model_name, parts)
    for ids in ([2, 0], [-1, 1]):
        rows = mixed(jnp.array(ids), *served[1:])
        alone = [output(model_name) if i < 0 else one(*tasks[i], parts.frozen) for i in ids]
        assert all(zoo.relative(rows[row], alone[row][row]) < 1e-5 for row in range(2))
    # Nobody is answered with the adapter of another: a task that there is not gives no number, or is refused.
    strange = mixed(jnp.array([2, 3]), *served[1:])
    assert zoo.relative(strange[0], one(*tasks[2], parts.frozen)[0]) < 1e-5
    lost = jnp.isnan(strange[1])
    assert jnp.any(lost)
    assert jnp.allclose(jnp.where(lost, 0, strange[1]), jnp.where(lost, 0, output(model_name)[1]), atol=1e-5)
    assert mixed._cache_size() == 1
    with pytest.raises(jpeft.JpeftError, match=r"there is no task 3; they are 0 to 2, and -1 is the base"):
        jpeft.combine(*served, adapter_ids=jnp.array([2, 3]))


@deep
def test_sharded_equals_one_device(model_name: str, method_name: str) -> None:
    parts = jpeft.partition(adapted_of(model_name, method_name))
    adapter, run = zoo.trained(parts), gradient_of(model_name, method_name)
    value, gradient = run(adapter, parts.buffers, parts.frozen)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def place(tree: Any) -> Any:
        def spread(a: jax.Array) -> jax.Array:
            axis = next((i for i, size in enumerate(a.shape) if size % 4 == 0 and size % 8 == 0), None)
            spec = PartitionSpec(*("fsdp" if i == axis else None for i in range(a.ndim)))
            return jax.device_put(a, NamedSharding(mesh, spec))

        return jax.tree.map(spread, tree)

    placed = [place(tree) for tree in (adapter, parts.buffers, parts.frozen)]
    sharded_value, sharded_gradient = run(*placed)
    assert np.allclose(value, sharded_value, rtol=1e-5)
    assert max(zoo.relative(sharded_gradient[k], gradient[k]) for k in gradient) < 1e-4


@pairs
def test_low_precision_base(model_name: str, method_name: str) -> None:
    base = base_of(model_name, "bfloat16")
    expected = nnx.eval_shape(zoo.MODELS[model_name].run, base)
    adapted = zoo.method(method_name, model_name)(base, rngs=nnx.Rngs(5))
    parts = jpeft.partition(adapted)
    trained = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    assert {v.dtype.name for v in jpeft.partition(adapted).adapter.values()} <= {"float32", "bfloat16"}
    made = evaluate(model_name, trained, quickly=True)
    assert made.dtype == expected.dtype
    entry = zoo.ENTRIES[method_name]
    if entry.merges:
        merged = jpeft.merge(trained, **zoo.MODELS[model_name].merge)
        assert zoo.relative(evaluate(model_name, merged, quickly=True), made) < entry.low


merging = pytest.mark.parametrize(
    ("model_name", "method_name"), [pair for pair in zoo.PAIRS if zoo.ENTRIES[pair[1]].merges], scope="module"
)


@merging
def test_a_merge_that_overflows_is_refused(model_name: str, method_name: str) -> None:
    base = base_of(model_name, "float16")
    before = arrays_of(base)
    parts = jpeft.partition(zoo.method(method_name, model_name)(base, rngs=nnx.Rngs(5)))
    huge = {
        key: jnp.full(value.shape, min(1e6, float(jnp.finfo(value.dtype).max)), value.dtype)
        for key, value in parts.adapter.items()
    }
    with pytest.raises(jpeft.JpeftError, match="not finite"):
        jpeft.merge(jpeft.combine(parts.graphdef, huge, parts.buffers, parts.frozen), **zoo.MODELS[model_name].merge)
    assert all(arrays_of(base)[key] is value for key, value in before.items())


@pairs
@pytest.mark.filterwarnings("ignore:save_adapter. AdaLoRA:UserWarning")  # no allocator has run here
def test_saved_and_loaded_bit_for_bit(model_name: str, method_name: str, tmp_path: Any) -> None:
    parts = jpeft.partition(adapted_of(model_name, method_name))
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    jpeft.save_adapter(tmp_path / "adapter", model)
    loaded = jpeft.load_adapter(tmp_path / "adapter", base_of(model_name))
    again = jpeft.partition(loaded)
    assert again.graphdef == jpeft.partition(model).graphdef
    assert all(jnp.array_equal(again.adapter[k], v) for k, v in jpeft.partition(model).adapter.items())
    assert all(jnp.array_equal(again.buffers[k], v) for k, v in parts.buffers.items())
    assert jpeft.applied(loaded) == jpeft.applied(adapted_of(model_name, method_name))


@pytest.mark.parametrize(("model_name", "method_name"), zoo.WRITERS, scope="module")
def test_generation_equals_whole_passes(model_name: str, method_name: str) -> None:
    parts = jpeft.partition(adapted_of(model_name, method_name))
    model = jpeft.combine(parts.graphdef, zoo.trained(parts), parts.buffers, parts.frozen)
    prompt = zoo.ids()
    made = jpeft.generate(model, prompt, max_new_tokens=4, eos_token_id=zoo.VOCABULARY - 1)[:, : prompt.shape[1] + 4]
    logits = forward(model_name, jpeft.partition(model))  # compiled for the prompt's length
    whole = jax.jit(lambda ids, *arrays: jpeft.combine(parts.graphdef, *arrays)(ids))(made, *jpeft.partition(model)[1:])
    assert zoo.relative(whole[:, : prompt.shape[1]], logits(*jpeft.partition(model)[1:])) < 1e-5
    likeliest = np.asarray(jnp.argmax(whole, -1))
    for row, tokens in enumerate(made):
        ended = False
        for at in range(prompt.shape[1], made.shape[1]):
            assert ended or tokens[at] == likeliest[row, at - 1]
            ended |= tokens[at] == zoo.VOCABULARY - 1


@pytest.mark.parametrize(("model_name", "method_name"), zoo.OTHERS, scope="module")
def test_on_one_model_of_every_kind(model_name: str, method_name: str) -> None:
    entry, base = zoo.ENTRIES[method_name], base_of(model_name)
    if method_name in zoo.NO_PLACE.get(model_name, ()):
        with pytest.raises(jpeft.JpeftError, match=r"^\w+: .*(does not declare its|matches nothing; nearest names)"):
            zoo.method(method_name, model_name)(base, rngs=nnx.Rngs(5))
        return
    parts = jpeft.partition(adapted_of(model_name, method_name))
    expected = evaluate(model_name, base, quickly=True)
    start = evaluate(model_name, adapted_of(model_name, method_name), quickly=True)
    assert (start.dtype, start.shape) == (expected.dtype, expected.shape)
    assert (zoo.relative(start, expected) < 1e-5) == (entry.starts != "elsewhere")
    adapter = zoo.trained(parts)
    value, gradient = gradient_of(model_name, method_name)(adapter, parts.buffers, parts.frozen)
    assert jnp.isfinite(value)
    still = [name for name, value in gradient.items() if not jnp.any(value != 0)]
    assert not still, f"no gradient for {still}"
    assert all(jnp.all(jnp.isfinite(value)) for value in gradient.values())
    model = jpeft.combine(parts.graphdef, adapter, parts.buffers, parts.frozen)
    if not entry.merges:
        with pytest.raises(jpeft.JpeftError, match=r"merge: .*is not a function of the weight"):
            jpeft.merge(model)
        return
    made = evaluate(model_name, model, quickly=True)
    assert zoo.relative(made, expected) > 1e-3
    assert zoo.relative(evaluate(model_name, jpeft.merge(model), quickly=True), made) < 1e-5


@pairs
def test_abstract_models(model_name: str, method_name: str) -> None:
    make = zoo.MODELS[model_name].make
    abstract = nnx.eval_shape(lambda: zoo.method(method_name, model_name)(make("float32"), rngs=nnx.Rngs(5)))
    concrete = jpeft.partition(adapted_of(model_name, method_name))
    for got, want in zip(jpeft.partition(abstract)[1:], concrete[1:], strict=True):
        assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, v.dtype) for k, v in want.items()}
    assert jpeft.describe(abstract).trainable == sum(v.size for v in concrete.adapter.values())


@pytest.mark.parametrize("model_name", zoo.MODELS)
def test_dropout_is_a_function_of_its_key(model_name: str) -> None:
    adapted = jpeft.LoRA(rank=2, dropout=0.5)(base_of(model_name), rngs=nnx.Rngs(5))
    parts = jpeft.partition(adapted)
    arrays = (zoo.trained(parts), parts.buffers, parts.frozen)
    run = zoo.MODELS[model_name].run
    noisy = jax.jit(lambda key, *arrays: run(jpeft.combine(parts.graphdef, *arrays, dropout=key)))
    first, second = (jax.random.fold_in(jax.random.key(0), step) for step in (1, 2))
    assert jnp.array_equal(noisy(first, *arrays), noisy(first, *arrays))
    assert not jnp.allclose(noisy(first, *arrays), noisy(second, *arrays))
    quiet = forward(model_name, parts)
    assert jnp.array_equal(quiet(*arrays), quiet(*arrays))


def test_every_registered_method_is_here() -> None:
    methods = [entry.method for entry in zoo.METHODS.values()]
    parts = [part for method in methods for part in (method.methods if isinstance(method, jpeft.Compose) else [method])]
    assert {type(method) for method in parts} >= set(jpeft.METHODS.values())
