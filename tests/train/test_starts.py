"""How runs start from words, from their first batches, from weights before quantisation, and from another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import JpeftError
from tests.train.conftest import make_tokenizer
from tests.train.test_run import COLOURS
from train import batches, session
from train import config as configs
from train.materials import Materials
from train.run import adapted, checked

WORDS = "the answer is red or green or blue"


@pytest.fixture
def write(jsonl: Callable[..., Path], tmp_path: Path, config_file: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a configuration of questions with one word for an answer."""

    def make(model: Path, method: str, *, labels: bool = False, base: str = "null", folder: str = "run") -> Path:
        rows = jsonl([{"text": f"the {COLOURS[n % 3]} is", "answer": COLOURS[n % 3]} for n in range(30)])
        head = "sequence-classification, pooling: mean" if labels else "causal-lm"
        data = "text: text, label: answer" if labels else "prompt: '{text}', completion: ' {answer}'"
        return config_file(
            f"model: {{source: {model}, task: {head}, base: {base}}}\nmethod: {method}\n"
            f"data: {{source: {rows}, {data}, test_size: 6, max_length: 16}}\n"
            "training: {epochs: 1, max_steps: 2, batch_size: 8, learning_rate: 1e-2}\n"
            f"evaluation: {{every: 9, samples: 0{'' if labels else ', answers: none'}}}\n"
            f"output: {{folder: {tmp_path / folder}}}\n",
            f"{folder}.yaml",
        )

    return make


def made(path: Path, *overrides: str) -> tuple[Any, Materials]:
    """The model of a run before its first step."""
    config = checked(configs.load(path, overrides))
    materials = Materials(config)
    return adapted(config, materials), materials


def finished(path: Path, model: Any, materials: Materials) -> Path:
    """The folder that the run would leave if its steps changed nothing."""
    config = checked(configs.load(path)).model_copy(update={"data": materials.data})
    folder = Path(config.output.folder)
    folder.mkdir()
    configs.save(config, folder / session.CONFIG)
    jpeft.save_adapter(folder / session.ADAPTER, model)
    return folder


def test_prompts_start_from_words(llama: Path, write: Callable[..., Path]) -> None:
    words = f"init_text: '{WORDS}'"
    ids = make_tokenizer()(WORDS, add_special_tokens=False).input_ids
    path = write(llama, f"{{name: prompt_tuning, num_virtual_tokens: {len(ids)}, {words}}}")
    model, materials = made(path)
    base = materials.base.model(0)
    rows = jpeft.partition(model).adapter["embed_tokens/prompt/embeddings"]
    assert np.array_equal(rows, base.embed_tokens(jnp.array(ids)))

    # Deep prompts: the model continues as if the words stood there.
    model, _ = made(write(llama, f"{{name: p_tuning_v2, num_virtual_tokens: {len(ids)}, {words}}}"))
    text = jnp.array(make_tokenizer()("what is the", add_special_tokens=False).input_ids)
    behind = base(jnp.concatenate([jnp.array(ids), text])[None])[:, len(ids) :]
    assert jnp.allclose(model(text[None]), behind, atol=1e-4)
    assert jpeft.applied(model)[0].text_ids == tuple(ids)


def test_lora_starts_from_the_first_batches(llama: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(llama, "{name: lora, rank: 4, init: eva, eva_batches: 2, targets: [q_proj, down_proj]}")
    model, materials = made(path)
    base, task = materials.base.model(0), materials.examples(materials.base.model(0))
    ids = jnp.array(task.train[0].ids)[None]
    assert jnp.array_equal(model(ids), base(ids))
    ranks = jpeft.applied(model)[0].rank_pattern
    assert sum(ranks.values()) == 4 * 4
    assert len(set(ranks.values())) > 1

    length = batches.edges([len(example) for example in task.train])[-1]
    feed = batches.Batches(task.kind, task.train, 0)
    windows = batches.plan([len(example) for example in task.train], (length,), 8, 0, 0)
    seen = [feed(window, 8) for window in windows if len(window.rows) == 8][:2]
    assert len(seen) == 2
    method = jpeft.LoRA(rank=4, targets=["q_proj", "down_proj"])
    same = jpeft.eva(base, method, seen, call=task.kind.losses, rngs=jax.random.key(0))
    wanted, found = (jpeft.partition(one).adapter for one in (same, model))
    assert all(bool(jnp.array_equal(wanted[key], found[key])) for key in found)

    folder = finished(path, model, materials)
    (tmp_path / "rows.jsonl").unlink()
    assert jpeft.applied(session.open_run(folder).model)[0].rank_pattern == ranks  # it loads without the data


def test_a_mesh_changes_no_start(llama: Path, write: Callable[..., Path]) -> None:
    path = write(llama, "{name: lora, rank: 4, init: eva, eva_batches: 1, targets: [q_proj]}")
    spread = ["mesh.data=2", "mesh.fsdp=4", "mesh.rules={embed_tokens: [null, fsdp]}"]
    alone, cut = (jpeft.partition(made(path, *mesh)[0]) for mesh in ([], spread))
    assert len(cut.frozen["layers/self_attn/q_proj/kernel"].sharding.device_set) == 8
    for name, value in alone.adapter.items():
        assert np.allclose(np.asarray(cut.adapter[name]), value, atol=1e-4)


def test_a_plan_has_starts_from_what_it_cannot_see(llama: Path, write: Callable[..., Path]) -> None:
    for method, base in (("{name: lora, init: eva}", "null"), ("{name: lora, init: loftq}", "int8")):
        config = configs.load(write(llama, method, base=base))
        plain = configs.load(write(llama, "{name: lora}", base=base))
        planned, same = (jpeft.describe(adapted(one, Materials(one, abstract=True))) for one in (config, plain))
        assert planned.trainable == same.trainable


def test_lora_starts_from_what_quantisation_loses(llama: Path, write: Callable[..., Path]) -> None:
    path = write(llama, "[{name: lora, rank: 8, init: loftq}, {name: norm_tuning}]", base="int4")
    model, materials = made(path)
    wide, quantised = materials.base.unquantized(0), materials.base.model(0)
    ids = jnp.array(materials.examples(quantised).train[0].ids)[None]
    off = [float(jnp.abs(one(ids) - wide(ids)).mean()) for one in (model, quantised)]
    assert off[0] < 0.7 * off[1]
    adapter = jpeft.partition(model).adapter
    assert "norm/norm/scale" in adapter
    again = session.open_run(finished(path, model, materials)).model  # on what any run on int4 has as its base
    assert jnp.array_equal(again(ids), model(ids))


def test_one_prompt_for_several_tasks_and_then_one_each(
    bert: Path, write: Callable[..., Path], jsonl: Callable[..., Path]
) -> None:
    method = "{name: p_tuning_v2, num_virtual_tokens: 3}"
    other = jsonl([{"text": f"who is {n}", "answer": ("yes", "no")[n % 2]} for n in range(24)], "other.jsonl")
    both = f"data.mix={{{other}: 1.0}}"
    shared = write(bert, method, labels=True, folder="shared")
    model, materials = made(shared, both)
    parts = jpeft.partition(model)
    trained = {name: value + 1 for name, value in parts.adapter.items()}
    folder = finished(shared, jpeft.combine(parts.graphdef, trained, parts.buffers, parts.frozen), materials)
    key = next(name for name in trained if name.endswith("p_tuning_v2/keys"))
    heads = {name for name in trained if name.startswith("classifier")}
    assert heads

    start = f"training.start_from={folder}"
    own = write(bert, method, labels=True, folder="own")
    model, materials = made(own, start)
    assert materials.data.labels == sorted(COLOURS)  # the shared run has five, so this task has a new head
    found, fresh = jpeft.partition(model).adapter, jpeft.partition(made(own)[0]).adapter
    assert all(bool(jnp.array_equal(found[name], (fresh if name in heads else trained)[name])) for name in found)
    assert not jnp.array_equal(found[key], fresh[key])

    again, _ = made(own, start, both)
    kept = jpeft.partition(again).adapter
    assert all(
        bool(jnp.array_equal(kept[name], trained[name])) for name in trained
    )  # the same labels: the head as well
    with pytest.raises(JpeftError, match=r"is a run of another method: .* is \(2, 3, 4, 8\) there and \(2, 4, 4, 8\)"):
        made(own, start, "method.num_virtual_tokens=4")
    with pytest.raises(JpeftError, match=r"training\.start_from: nowhere is no finished run"):
        made(own, "training.start_from=nowhere")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("{name: prompt_tuning, init_text: a, init: random}", "init_text='a' says what to start from; leave init"),
        ("{name: prompt_tuning, init_text: ' '}", "has no token"),
        ("{name: prefix_tuning, init_text: a}", "init='text' needs reparameterize=False"),
        ("{name: lora, init_text: a}", "method.init_text: unknown key"),
        ("{name: lora, eva_batches: 3}", "eva_batches=3: it is a number of at least 1, beside init: eva"),
        ("[{name: bitfit}, {name: lora, init: eva}]", "init=eva: only the first method of a list starts so"),
        ("{name: lora, init: loftq}", "init=loftq makes up for what quantisation loses; let model.base"),
    ],
)
def test_starts_that_cannot_be(llama: Path, write: Callable[..., Path], method: str, said: str) -> None:
    with pytest.raises(JpeftError) as caught:
        configs.load(write(llama, method))
    assert said in str(caught.value)


def test_virtual_tokens_leave_room(llama: Path, write: Callable[..., Path]) -> None:
    config = configs.load(write(llama, "{name: p_tuning_v2, num_virtual_tokens: 128}"))
    materials = Materials(config, abstract=True)
    with pytest.raises(JpeftError, match=r"128 virtual tokens leave no room for text in a model of 128 positions"):
        materials.examples(adapted(config, materials))


def test_too_few_tokens_are_said_with_the_key(llama: Path, write: Callable[..., Path]) -> None:
    with pytest.raises(JpeftError, match=r"give more batches.*eva_batches is 1, and 1 were seen"):
        made(
            write(llama, "{name: lora, rank: 30, init: eva, eva_batches: 1, targets: [down_proj]}"),
            "training.batch_size=2",
        )
