"""Language modelling beyond plain causal rows: packing, encoder-decoders, masked tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft import JpeftError
from tests.train.conftest import make_tokenizer
from tests.train.test_tasks import WORDS, prepared, run
from tests.zoo import MODELS
from train import use
from train.batches import Batches, Window, edges, plan
from train.examples import Example, Reader
from train.packing import pack
from train.schema import DataConfig
from train.step import inputs
from train.tasks import TASKS, task_of


def texts(lengths: list[int]) -> list[Example]:
    made = []
    for row, length in enumerate(lengths):
        ids = np.random.default_rng(row).integers(5, 60, size=length).astype(np.int32)
        made.append(Example(ids, np.arange(length) > 0, row))
    return made


def test_packing_keeps_every_token_and_wastes_little() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(2, 30, size=200)]
    examples = texts(lengths)
    rows = pack(examples, 32)
    assert all(len(row) <= 32 for row in rows)
    assert len(rows) < 1.1 * sum(lengths) / 32
    found = sorted((row.ids[row.segments == s].tolist() for row in rows for s in set(row.segments.tolist())), key=str)
    assert found == sorted((example.ids.tolist() for example in examples), key=str)
    assert sum(row.targets.sum() for row in rows) == sum(example.targets.sum() for example in examples)
    again = pack(texts(lengths), 32)
    assert all(np.array_equal(one.ids, other.ids) for one, other in zip(rows, again, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_packed_row_gives_what_each_text_gives_alone(name: str) -> None:
    """Logits and losses, also behind a prefix, which every segment sees."""
    examples = texts([5, 9, 3, 7])
    (row,) = pack(examples, 24)
    model = MODELS[name].make("float32")
    for adapted in (model, jpeft.PrefixTuning(num_virtual_tokens=3)(model, rngs=1)):
        batch = Batches(TASKS["text"], [row])(Window((0,), 24), 1)
        alone = Batches(TASKS["text"], examples)(Window((0, 1, 2, 3), 24), 4)
        packed, logits = (np.asarray(adapted(**inputs(one))) for one in (batch, alone))
        for number, example in enumerate(examples):
            segment = packed[0][: len(row)][row.segments == number + 1]
            np.testing.assert_allclose(segment, logits[number, : len(example)], atol=2e-5, rtol=1e-4)
        if adapted is model:
            losses = [jax.jit(TASKS["text"].losses)(adapted, one)[0] for one in (batch, alone)]
            np.testing.assert_allclose(losses[0].sum(), losses[1].sum(), rtol=1e-5)


def test_a_packed_run(llama: Path, jsonl: Callable[..., Path], config_file: Any, tmp_path: Path) -> None:
    path = jsonl([{"text": f"the {WORDS[n % 3]} is"} for n in range(72)])
    data = f"source: {path}, text: text"
    plain = run(config_file, llama, data, tmp_path / "plain", "evaluation: {metrics: [perplexity]}\n")
    packed = run(config_file, llama, f"{data}, packing: true", tmp_path / "packed")
    assert len(packed.losses) < len(plain.losses) / 3
    assert packed.before.metrics["loss"] == pytest.approx(plain.before.metrics["loss"], rel=1e-5)
    assert packed.after.metrics["loss"] < packed.before.metrics["loss"]
    assert list(plain.after.metrics) == ["perplexity", "loss"]
    packing = task_of(DataConfig(source="x", text="text", packing=True))
    prompted = jpeft.PromptTuning(num_virtual_tokens=2)(jpeft.models.load(llama), rngs=0)
    packing.check_model(jpeft.strip(prompted))
    with pytest.raises(JpeftError, match=r"data\.packing: the method puts virtual tokens into each row"):
        packing.check_model(prompted)


def test_an_encoder_decoder(t5: Path, jsonl: Callable[..., Path], config_file: Any, tmp_path: Path) -> None:
    rows = [{"text": f"the {WORDS[n % 3]} is", "answer": WORDS[n % 3]} for n in range(60)]
    data = f'source: {jsonl(rows)}, prompt: "say {{text}}", completion: "{{answer}}"'
    more = "evaluation: {metrics: [exact_match, chrf, rougeL, perplexity], every: 100}\n"
    folder = tmp_path / "run"
    result = run(config_file, t5, data, folder, more, task=", task: seq2seq-lm")
    assert list(result.after.metrics) == ["exact_match", "chrf", "rougeL", "perplexity", "loss"]
    assert result.after.metrics["loss"] < 0.7 * result.before.metrics["loss"]
    (said,) = use.generate(folder, ["the red is"], max_new_tokens=6)
    assert said in result.after.answers

    # The loss is that of the decoder's tokens behind the start token, and what is written follows from the logits.
    task = prepared(head="seq2seq-lm", source=str(jsonl(rows)), prompt="text", completion="answer", test_size=4)
    model = jpeft.models.load(t5, task="seq2seq-lm")
    batch = {key: jnp.asarray(value) for key, value in Batches(task.kind, task.test)(Window((0, 1), 16), 3).items()}
    losses, _ = task.kind.losses(model, batch)
    for at, example in enumerate(task.test[:2]):
        assert example.label[-1] == 2
        logits = model(jnp.asarray(example.ids)[None], decoder_input_ids=jnp.asarray([[0, *example.label[:-1]]]))[0]
        shares = np.asarray(logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True)))
        wanted = -shares[np.arange(len(example.label)), example.label].sum()
        np.testing.assert_allclose(losses[at], wanted, rtol=1e-4)
        assert batch["weights"][at] == len(example.label)
    assert float(losses[2]) == float(batch["weights"][2]) == 0.0


def test_rows_of_an_encoder_decoder_that_do_not_fit_are_counted() -> None:
    reader = Reader(make_tokenizer(), 4)
    (example,) = reader.pair("the red is the red is", "the", 0)
    assert len(example) == 4
    assert reader.pair("the", "the red is the red", 0) == []
    assert reader.pair("", "the", 0) == []
    reader.pair("the", "", 0)
    assert list((+reader.counts).values()) == [1, 1, 1, 1]


def masking_tokenizer(**given: Any) -> Any:
    tokenizer = make_tokenizer(**given)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def test_masks_are_drawn_from_seed_epoch_and_row(jsonl: Callable[..., Path]) -> None:
    tokenizer = masking_tokenizer(bos=True)
    kind = task_of(DataConfig(source="x", text="text"), "masked-lm")
    reader = Reader(tokenizer, 64)
    read = kind.reader(None, reader)  # type: ignore[arg-type]
    examples = [example for row in range(40) for example in read({"text": " the red blue" * 18}, row)]
    lengths = [len(example) for example in examples]

    def batch(seed: int | None, epoch: int, window: tuple[int, ...] = tuple(range(40))) -> Any:
        return Batches(kind, examples, seed)(Window(window, 64, epoch), 40)

    one = batch(3, 1)
    assert all(np.array_equal(one[name], batch(3, 1)[name]) for name in one)
    for other in (batch(3, 0), batch(2, 1), batch(None, 0), batch(0, 0)):
        assert not np.array_equal(one["positions"], other["positions"])
    assert np.array_equal(batch(None, 0)["input_ids"], batch(None, 5)["input_ids"])
    for seed in range(8):  # held-out rows share no mask with training ones
        assert not np.array_equal(batch(None, 0)["input_ids"][seed], batch(seed, 0)["input_ids"][0])
    # Of its place in the epoch a row's mask does not depend.
    assert np.array_equal(one["input_ids"][7], batch(3, 1, (7,))["input_ids"][0])
    assert {window.epoch for window in plan(lengths, edges(lengths), 8, 3, 5)} == {5}

    # 15% of what is not special; of those 80% masked, 10% random, 10% as they were.
    whole = np.stack([example.ids for example in examples])
    chosen = np.zeros(whole.shape, bool)
    for at in range(40):
        chosen[at, one["positions"][at][one["labels"][at] >= 0]] = True
        assert np.array_equal(one["labels"][at][one["labels"][at] >= 0], whole[at][chosen[at]])
    assert not chosen[:, 0].any()  # <s>
    assert (chosen.sum(1) == round(0.15 * (whole.shape[1] - 1))).all()
    seen = one["input_ids"][:, : whole.shape[1]]
    assert np.array_equal(seen[~chosen], whole[~chosen])
    masked = np.mean(seen[chosen] == tokenizer.mask_token_id)
    same = np.mean(seen[chosen] == whole[chosen])
    assert 0.74 < masked < 0.86
    assert 0.06 < same < 0.15
    with pytest.raises(JpeftError, match="no mask token"):
        kind.reader(None, Reader(make_tokenizer(), 64))  # type: ignore[arg-type]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_that_fills_in_masks(
    bert: Path, jsonl: Callable[..., Path], config_file: Any, tmp_path: Path, streamed: bool
) -> None:
    tokenizer = masking_tokenizer()
    config = {**jpeft.models.load(bert, task="base").config.raw, "vocab_size": len(tokenizer)}
    folder = tmp_path / "model"
    jpeft.models.save(jpeft.models.from_config(config, task="masked-lm", rngs=nnx.Rngs(0)), folder)
    tokenizer.save_pretrained(folder)
    path = jsonl([{"text": f"the {WORDS[n % 3]} is" * 2} for n in range(60)])
    data = f"source: {path}, text: text" + ", streaming: true, chunk: 24" * streamed
    steps = ["training.epochs=~", "training.max_steps=24"] if streamed else []
    result = run(config_file, folder, data, tmp_path / "run", "", ", task: masked-lm", *steps)
    assert result.after.metrics["loss"] < 0.9 * result.before.metrics["loss"]
    (said,) = use.generate(tmp_path / "run", ["the <mask> is"])
    assert said.startswith("the")
    with pytest.raises(JpeftError, match="no <mask> to fill in"):
        list(use.generate(tmp_path / "run", ["the red is"]))
