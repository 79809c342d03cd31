"""The pages in docs/ and the README: their Python blocks run in order, and what they claim of the code is so."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

import jpeft
from jpeft.models import families
from tests import zoo
from tests.conformance import test_methods as conformance
from train.batches import Batches, Window
from train.examples import Example
from train.files import Rows
from train.metrics import METRICS
from train.schema import DataConfig
from train.tasks import TASKS, task_of

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [page for page in (*sorted(DOCS.glob("*.md")), ROOT / "README.md") if page.is_file()]
# A block that cannot run here, such as one that downloads a model, opens with ```python no-run.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def run(page: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module that a page's blocks make, run in order; errors are reported at the page's own lines."""
    text = page.read_text(encoding="utf-8")
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look up their module there
    for block in BLOCK.finditer(text):
        if block[1] == "python":
            before = text.count("\n", 0, block.start(2))
            exec(compile("\n" * before + block[2], str(page), "exec"), vars(module))
    return module


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the pages write goes to a folder of its own, and what they register is forgotten."""
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(jpeft.METHODS), mock.patch.dict(TASKS):
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != DOCS or "adding" not in page.name], ids=str)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(page, monkeypatch)


def test_the_method_of_the_page_keeps_its_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    page = run(DOCS / "adding-a-method.md", monkeypatch)
    method = page.Rescale(targets=[lambda name, module: name.endswith("up")], layers=[1, 2])
    recorded = method.recorded(page.model)
    assert recorded == (page.Rescale(targets=[r"^layers\.1\.up$", r"^layers\.2\.up$"]),)
    assert jpeft.partition(recorded[0](page.model, rngs=0)).adapter.keys() == {"layers/up/rescale/factor"}

    monkeypatch.setitem(zoo.ENTRIES, "page", zoo.Entry(page.Rescale()))
    conformance.test_starts_as_the_base("user-stack-remat", "page")
    conformance.test_stripping_gives_the_base_back("user-stack-remat", "page")
    conformance.test_low_precision_base("user-stack-remat", "page")
    for model in ("user-stack-remat", "shapes"):
        conformance.test_merging_computes_the_same(model, "page")
        conformance.test_rows_with_adapters_of_their_own(model, "page")


def test_the_task_of_the_page_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    page = run(DOCS / "adding-a-task.md", monkeypatch)
    data = DataConfig(source="rows.jsonl", text="text", label="label", problem_type="count")
    kind = task_of(data)
    assert type(kind) is page.Counts
    rows = Rows(None, lambda index: f"line {index}", "rows.jsonl")
    label = kind.label(rows)
    examples = [Example(np.arange(3), np.zeros(3, bool), row, label(row, row)) for row in (4, 1)]
    with pytest.raises(jpeft.JpeftError, match="line 7: column 'label' holds -1, not a count"):
        label(-1, 7)

    # The rate that is likeliest for a count is the count, and a row that fills up a batch has no loss.
    batch = Batches(kind, examples)(Window((0, 1), 8), 3)
    slope = jax.grad(lambda x: kind.losses(lambda **inputs: x, batch)[0].sum())(np.log([[4.0], [1.0], [9.0]]))
    np.testing.assert_allclose(slope, 0.0, atol=1e-5)
    _, found = kind.losses(lambda **inputs: np.log([[4.0], [2.0], [9.0]]), batch)
    said = [kind.guess(np.asarray(one), example, {}) for one, example in zip(found, examples, strict=False)]
    right = [kind.right(example, {}) for example in examples]
    assert METRICS[kind.measure][kind.metrics[0]](right, said) == pytest.approx(0.5)
    assert kind.agree(*([kind.shown(value, {}) for value in side] for side in (said, right))) == [True, False]


@pytest.mark.parity
def test_the_family_of_the_page_equals_its_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = run(DOCS / "adding-a-model.md", monkeypatch)
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.setitem(families._MODULES, "seed_oss", "seed_oss")
    monkeypatch.setitem(sys.modules, "jpeft.models.seed_oss", page)
    config = transformers.AutoConfig.for_model(**{**page.config, "model_type": "seed_oss"}, attention_out_bias=True)
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    peer.save_pretrained(tmp_path / "peer")
    ids = np.arange(2 * 7).reshape(2, 7)
    with torch.no_grad():
        expected = peer(torch.tensor(ids)).logits.numpy()
    model = jpeft.models.load(tmp_path / "peer")
    assert np.abs(np.asarray(model(ids)) - expected).max() <= 1e-5 * np.abs(expected).max()
    again = transformers.AutoModelForCausalLM.from_pretrained(
        jpeft.models.save(model, tmp_path / "saved"), attn_implementation="eager"
    )
    with torch.no_grad():
        assert np.array_equal(again.eval()(torch.tensor(ids)).logits.numpy(), expected)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


@every_page
def test_changes_shown_still_apply(page: Path) -> None:
    """Every line of context in a diff stands in one file of the repository, in that order."""
    sources = [file.read_text(encoding="utf-8") for name in ("jpeft", "tests") for file in (ROOT / name).rglob("*.py")]
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block[1] == "diff":
            lines = [line[1:] for line in block[2].splitlines() if line[:1] == " "]
            context = re.compile(".*".join(re.escape(line + "\n") for line in lines), re.DOTALL)
            assert any(context.search(source) for source in sources), block[2]


def test_every_file_in_the_layout_exists() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8").split("## The package")[1]
    folders: list[str] = []
    for line in text.split("```")[1].splitlines():
        depth, names = (
            (len(line) - len(line.lstrip())) // 2,
            re.findall(r"[\w]+(?:\.py|/)", re.split(r" {3,}", line.strip())[0]),
        )
        for name in names:
            if name.endswith("/"):
                folders[depth:] = [name]
            assert (ROOT / "".join(folders[:depth]) / name).exists(), line


def imports(folder: str) -> set[str]:
    found: set[str] = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("folder", "stranger"), [("jpeft", "train"), ("jpeft/methods", "jpeft.models"), ("jpeft/models", "jpeft.methods")]
)
def test_arrows_point_one_way(folder: str, stranger: str) -> None:
    assert not [name for name in imports(folder) if name == stranger or name.startswith(f"{stranger}.")]
