"""JUnit's XML: what its readers take from it is what the report says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cli_probe import Ran, refused
from kvtool.commands.verify.report import CacheReport
from kvtool.ui.junit import to_junit
from report_cases import HOSTILE, PLANTED, REPORTS, content_of, row
from small_models import save_decoder

# What junit-10.xsd of Jenkins' xUnit plugin allows, which is the strictest of its readers here.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "testsuites": ({"name", "time", "tests", "failures", "disabled", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "group", "time", "disabled", "skipped"}
        | {"timestamp", "hostname", "id", "package", "file", "log", "url", "version"},
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": (
        {"name", "classname", "assertions", "time", "timestamp", "status", "class", "file", "line"},
        {"skipped", "failure", "error", "system-out", "system-err"},
    ),
    "failure": ({"type", "message"}, set()),
    "skipped": ({"type", "message"}, set()),
    "system-out": (set(), set()),
}


def read(command: str, report: Any, **settings: Any) -> ElementTree.Element:
    text = to_junit(content_of(command, report, **settings), report)
    return ElementTree.fromstring(text.encode())


def require_valid(element: ElementTree.Element) -> None:
    attributes, children = ALLOWED[element.tag]
    assert set(element.attrib) <= attributes
    for child in element:
        assert child.tag in children
        require_valid(child)


@pytest.mark.parametrize("name", REPORTS)
def test_a_suite_fails_where_the_exit_code_is_not_0_and_counts_its_cases(name: str) -> None:
    command, report = REPORTS[name]
    root = read(command, report)
    require_valid(root)
    (suite,) = root
    cases = suite.findall("testcase")
    counts = [len(cases), len(suite.findall("*/failure")), len(suite.findall("*/skipped"))]
    assert [int(suite.attrib[key]) for key in ("tests", "failures", "skipped")] == counts
    assert (counts[1] > 0) == (report.exit_code != 0)
    assert len({case.attrib["name"] for case in cases}) == len(cases) >= len(report.rows()) // 2
    assert all(case.attrib["classname"] == f"{command}.all" for case in cases)
    assert all(found.attrib["message"] for found in suite.iterfind("testcase/*"))


def test_a_failure_has_the_words_of_the_finding_and_a_skipped_case_its_reason() -> None:
    (suite,) = read(*REPORTS["bug"], target="my/decoder.py:build")
    right, wrong, planted = suite.findall("testcase")
    assert (len(right), len(planted)) == (0, 0)
    assert wrong.attrib["name"] == "static, default kernels, decode"
    assert wrong.attrib["classname"] == "verify-cache.decoder.py:build"
    (failure,) = wrong
    assert failure.attrib["type"] == "bug"
    assert failure.attrib["message"] == (
        "bug, step 3; it differs; where: layer 1, head 0; what: keys one slot too far"
    )
    assert (failure.text or "").splitlines()[-1] == "gap 1.0e-01, gap float64 1.0e-01"
    (suite,) = read(*REPORTS["right"])
    said = [found.attrib["message"] for found in suite.iterfind("testcase/skipped")]
    assert said[0] == "unsupported: cannot crop" and "compared with" in said[1]
    (suite,) = read(*REPORTS["ended"])
    said = [found.attrib["message"] for found in suite.iterfind("testcase/skipped")]
    assert said == ["not run: interrupted"] * 2


def test_settings_are_properties_with_their_whole_names() -> None:
    (suite,) = read(*REPORTS["right"], caches=["static", "paged:page=4"])
    found = {each.attrib["name"]: each.attrib["value"] for each in suite.iter("property")}
    assert found["settings.run.dtype"] == "float32"
    assert found["settings.caches"] == '["static", "paged:page=4"]'
    assert "environment.torch" in found


def test_what_strangers_wrote_is_text_and_nothing_else() -> None:
    wrong = dataclasses.replace(
        row(HOSTILE, "bug"), scenario=HOSTILE, evidence=HOSTILE, place=HOSTILE, bugs=[HOSTILE]
    )
    report = CacheReport([wrong], PLANTED, 3, "float32")
    root = read("verify-cache", report, server=HOSTILE, prompt=HOSTILE)
    require_valid(root)
    found = [text for each in root.iter() for text in (*each.attrib.values(), each.text or "")]
    text = "".join(found)
    assert "</failure>]]><script>" in text
    assert not any(sign in text for sign in "\x1b\u202e\ufffe")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), n_layers=1)


def test_a_command_writes_its_cases(kv: Callable[..., Ran], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.xml"
    words = ["--caches", "static", "--kernels", "default", "--scenarios", "decode", "--tokens", "4"]
    given = ["--model", str(model), "--device", "cpu", "--output", str(path)]
    ran = kv(*words, *given, command="verify-cache")
    assert ran.code == 0, ran.err
    names = [case.attrib["name"] for case in ElementTree.parse(path).iter("testcase")]
    assert names == ["static, default kernels, decode", "the planted bug is found"]


def test_bench_has_cases_only_where_a_limit_decides(kv: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    message = refused(kv("--output", str(path), command="bench"))
    assert message == f"--output {path}: needs --fail-if. A case is a row that a limit decides."
    (suite,) = read(*REPORTS["bench slower"])
    first, second, new = suite.findall("testcase")
    assert (first.attrib["name"], len(first)) == ("static at 100 tokens", 0)
    assert second[0].attrib["message"].startswith("median 100.0 -> 200.0 ms")
    assert new[0].tag == "skipped"
