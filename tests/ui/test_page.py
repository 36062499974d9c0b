"""--output report.html: a page that needs nothing from elsewhere, and in which texts are texts."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cli_probe import HANGS, Ran
from kvtool.commands.bench.show import draw as draw_bench
from kvtool.commands.bench.show import show as show_bench
from kvtool.commands.verify import logits, self_test, served, server_against, server_report, sweep
from kvtool.commands.verify.report import CacheReport
from kvtool.commands.verify.show import gaps_plot
from kvtool.commands.verify.show import show as show_checks
from kvtool.errors import FileError
from kvtool.ui import plots
from kvtool.ui.page import SCRIPT, picture, to_page, told_by
from report_cases import HOSTILE, PLANTED, REPORTS, content_of, row
from small_models import save_decoder

VOID = {"meta", "br", "path", "use"}
SHOWS: dict[str, Callable[[Any, Any], None]] = {
    "verify-cache": show_checks,
    "verify-cache.sweep": sweep.show,
    "verify-cache.self-test": self_test.show,
    "verify-cache.server": server_report.show,
    "verify-cache.against": server_against.show_against,
    "verify-logits": logits.show,
    "verify-logits.server": served.show,
    "bench": show_bench,
}


class Page(HTMLParser):
    """Reads a page; fails for tags that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def page_of(command: str, report: Any, svg: str = "", **settings: Any) -> Page:
    told = told_by(SHOWS[command], report)
    text = to_page(content_of(command, report, **settings), told, svg)
    require_alone(text)
    return Page(text)


def require_alone(text: str) -> None:
    """Fail for whatever a browser would load, and for a script that is not ours."""
    page = Page(text)
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [found["content"] for _, found in page.tags if "http-equiv" in found]
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert policies == [allowed]
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "a", "form")
        for name, value in attributes.items():
            assert name not in ("src", "action", "formaction", "data") and name[:2] != "on"
            assert not (name.endswith("href") and not str(value).startswith("#"))
    style = "".join(re.findall(r"<style>(.*?)</style>|style=\"(.*?)\"", text, re.DOTALL)[0])
    assert "url(" not in style and "@import" not in style


def shown(report: Any, name: str) -> Any:
    facts = {"verify-cache.server": {"engine": "vLLM", "url": "http://a"}, "bench": {}}
    more = {"verify-cache.against": {"url": "a", "against_url": "b", "model": "m"}}
    more["verify-logits.server"] = {"engine": "vLLM"}
    resolved = {**facts, **more}.get(name)
    return dataclasses.replace(report, resolved=resolved) if resolved else report


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_has_every_row_the_conclusion_and_the_settings(name: str) -> None:
    command, report = REPORTS[name]
    page = page_of(command, shown(report, command), dtype="bfloat16")
    n_rows = len(report.rows())
    settings = next(i for i, found in enumerate(page.rows) if found == ["setting", "value"])
    assert len(page.rows[:settings]) >= n_rows + 1
    assert ["settings.dtype", "bfloat16"] in page.rows[settings:]
    said = report.sentences if command == "bench" else [report.conclusion]
    assert all(sentence in "".join(page.texts) for sentence in said)


def test_every_check_has_a_row_of_its_own() -> None:
    checks = [row("static", scenario=f"scenario-{i}") for i in range(30)]
    page = page_of("verify-cache", CacheReport(checks, PLANTED, 3, "float32"))
    cells = {cell for found in page.rows for cell in found}
    assert {f"scenario-{i}" for i in range(30)} <= cells


def test_what_strangers_wrote_is_text_and_nothing_else() -> None:
    wrong = dataclasses.replace(
        row(HOSTILE, "bug"), scenario=HOSTILE, evidence=HOSTILE, place=HOSTILE, bugs=[HOSTILE]
    )
    report = CacheReport([wrong], PLANTED, 3, "float32", resolved={"model": f"/{HOSTILE}"})
    page = page_of("verify-cache", report, prompt=HOSTILE)
    text = "".join(page.texts)
    assert "</failure>]]><script>alert(1)</script>\"'&" in text
    assert "\x1b" not in text and "\u202e" not in text


def test_a_plot_stands_in_the_page_and_loads_nothing() -> None:
    report = REPORTS["bench slower"][1]
    svg = picture(lambda found, path: draw_bench(found, path, HOSTILE), report)
    assert svg.startswith("<svg") and "http" not in svg and "script" not in svg
    page = page_of("bench", report, svg)
    assert ("svg" in [tag for tag, _ in page.tags]) and len(page.rows) > 4
    wrong = REPORTS["bug"][1]
    assert picture(lambda found, path: gaps_plot(found, path, {}), wrong).startswith("<svg")
    other = CacheReport([row(scenario="crop")], PLANTED, 3, "float32")
    assert picture(lambda found, path: gaps_plot(found, path, {}), other) == ""


def test_a_command_writes_its_page_with_its_plot(
    kv: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    model = save_decoder(tmp_path / "model", n_layers=1)
    words = ["--caches", "static", "--kernels", "default", "--scenarios", "decode", "--tokens", "4"]
    given = ["--model", str(model), "--device", "cpu", "--output", str(path)]
    ran = kv(*words, *given, command="verify-cache")
    assert ran.code == 0, ran.err
    page = Page(path.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("svg") == 1

    def fail(*_: Any, **__: Any) -> None:
        raise FileError("the plot: cannot be drawn")

    monkeypatch.setattr(plots, "gap_plot", fail)
    ran = kv(*words, *given, command="verify-cache")
    assert (ran.code, "cannot be drawn" in ran.err) == (2, True)
    again = Page(path.read_text(encoding="utf-8"))
    assert "svg" not in [tag for tag, _ in again.tags] and again.rows[:3] == page.rows[:3]


DOM = """
const texts = %s;
const body = {order: [], append(row) { this.order.push(row.cells[0].textContent); }};
body.rows = texts.map(text => ({cells: [{textContent: text}]}));
const head = {cellIndex: 0, sort: null, closest: () => ({tBodies: [body]}),
  getAttribute() { return this.sort; }, setAttribute(_, to) { this.sort = to; },
  removeAttribute() { }};
head.parentNode = {cells: [head]};
const button = {parentNode: head};
globalThis.document = {querySelectorAll: () => [button]};
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_a_column_sorts_by_its_numbers_and_what_was_not_measured_comes_last() -> None:
    texts = ["-", "1,000.5", "~1.9 s", "9.0", "2e-3", "30 of 40"]
    ends = "button.onclick(); const up = body.order; body.order = []; button.onclick();"
    code = DOM % json.dumps(texts) + SCRIPT + ends + "console.log(JSON.stringify([up, body.order]))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=HANGS)
    up, down = json.loads(done.stdout)
    numbers = ["2e-3", "9.0", "30 of 40", "1,000.5"]
    assert up == [*numbers, "-", "~1.9 s"] and down == [*reversed(numbers), "-", "~1.9 s"]
