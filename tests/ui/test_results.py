"""Results of kvtool.verify and kvtool.generate, as people and notebooks see them."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import kvtool
from kvtool.core.decoding.generation import Continuation
from kvtool.core.verify import api
from kvtool.errors import UsageError
from kvtool.results import Generated, Verification
from report_cases import HOSTILE, checked

ROOT = Path(__file__).resolve().parents[2]


def verification(*checks: Any, name: str = "Mine") -> Verification:
    planted = checked("planted bug", "bug").finding
    return Verification(name, "float32", tuple(checks), planted)


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ([checked("Mine", "rounding"), checked("Mine", "identical")], "rounding only"),
        ([checked("Mine", "identical")], "identical, bit for bit"),
        ([checked("Mine", "rounding"), checked("Mine", "bug")], "BUG in decode from step 3 on"),
        ([checked("paged", "bug")], "BUG in paged, decode from step 3 on"),
        ([checked("Mine", "precision")], "rounding, or the model's own precision"),
        ([checked("Mine", "error")], "ERROR in decode"),
        ([checked("Mine", "unsupported")], "nothing was checked"),
    ],
)
def test_a_repr_begins_with_the_verdict(checks: list[Any], verdict: str) -> None:
    found = verification(*checks)
    assert repr(found) == f"<Verification: {verdict}; Mine, float32>"
    assert f"<b>{verdict.replace(chr(39), '&#x27;')}</b>" in found._repr_html_()


def test_a_dict_is_json_and_has_the_fields_of_the_commands_document() -> None:
    found = verification(checked("Mine", "bug")).to_dict()
    (check,) = json.loads(json.dumps(found, allow_nan=False))["checks"]
    assert (found["ok"], check["verdict"], check["layer"]) == (False, "bug", 1)
    assert found["control"]["verdict"] == "bug"


def test_a_plot_is_shown_and_written(tmp_path: Path) -> None:
    found = verification(checked("Mine", "bug"))
    shown = found.plot(tmp_path / "gap.png")
    assert shown._repr_html_().startswith("<svg") and "http" not in shown._repr_html_()
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="there is no gap to draw"):
        verification(checked("Mine", "bug", scenario="crop"), name="none").plot()


@pytest.mark.parametrize("name", ["gap.gif", "gap", "."])
def test_a_plot_of_another_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"is not a plot format.*\.png, \.svg or \.pdf"):
        verification(checked("Mine", "bug")).plot(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_of_several_prompts_a_notebook_tells_whose_a_text_is() -> None:
    ranks = [1, 2, 1, 2]
    found = [Continuation([1], f"text {i}", True, -1.0, rank) for i, rank in enumerate(ranks)]
    assert ">prompt<" not in Generated(found[:2])._repr_html_()
    rows = re.findall(r"<tr><td>(\d)</td><td>(\d)</td>", Generated(found)._repr_html_())
    assert rows == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match="model: int is no model of kvtool's"):
        kvtool.generate(3, "R", 4)  # type: ignore[arg-type]


def test_texts_in_a_notebook_are_texts() -> None:
    text = verification(checked(HOSTILE, "bug"), name=HOSTILE)._repr_html_()
    text += Generated([Continuation([1], HOSTILE, True, -1.0)])._repr_html_()
    assert "<script" not in text and "&lt;script" in text and "\x1b" not in text


def test_generated_text_is_short_in_a_repr_and_whole_in_a_dict() -> None:
    found = Generated([Continuation([1, 2], "a\n" * 99, False, -2.5, score=float("nan"))], 8)
    assert repr(found).startswith("<Generated: 'a") and repr(found).endswith("...', 2 tokens>")
    assert len(repr(found)) < 120
    assert found.to_dict()["results"][0] == {
        "ids": [1, 2], "text": "a\n" * 99, "ended": False, "log_prob": -2.5, "rank": 1,
        "score": None,
    }  # fmt: skip
    assert "by the limit" in found._repr_html_()


def test_the_functions_keep_their_signatures_and_are_listed() -> None:
    assert inspect.signature(kvtool.verify) == inspect.signature(api.verify)
    assert "bug or rounding" in (kvtool.verify.__doc__ or "")
    assert {"verify", "generate"} <= set(dir(kvtool))


def test_the_notebook_of_the_docs_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    page = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    cells = re.findall(r"^```python\n(.+?)^```$", page, re.MULTILINE | re.DOTALL)
    space: dict[str, Any] = {}
    for cell in cells:
        exec(compile(cell, "docs/notebook.md", "exec", dont_inherit=True), space)
        if not (last := cell.splitlines()[-1]).startswith("assert"):  # a notebook shows it
            assert "<" in eval(last, space)._repr_html_()
    assert len(cells) == 5
