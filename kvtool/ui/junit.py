"""A report as JUnit's XML, in what GitHub's actions, GitLab and Jenkins read of it.

There is no one schema. This is what Jenkins' (junit-10.xsd of its xUnit plugin) allows: a suite
with its properties and a case for each check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from kvtool.ui.cases import Case, Status, cases_of, flat, subject_of
from kvtool.ui.inert import in_a_line, visible

PROLOG = '<?xml version="1.0" encoding="UTF-8"?>\n'
NO_XML = re.compile("[\ufffe\uffff]")  # the characters that XML 1.0 has not and `visible` leaves


def to_junit(content: Mapping[str, Any], report: Any) -> str:
    """The text of the document: a suite for the run, a case for each check."""
    command = str(content["schema"]).removeprefix("kvtool.").removesuffix("/1")
    cases, subject = cases_of(content, report), subject_of(content)
    seconds = content.get("seconds") or sum(case.seconds or 0.0 for case in cases)
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.failed for case in cases)),
        "errors": "0",
    }
    root = ElementTree.Element("testsuites", {"name": "kvtool", **counts, "time": _time(seconds)})
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": _line(f"kvtool {command.replace('.', ' ')}: {subject}"),
            **counts,
            "skipped": str(sum(case.status == Status.SKIPPED for case in cases)),
            "time": _time(seconds),
            # Without its zone, which is UTC: readers of Ant's format refuse one.
            "timestamp": str(content["environment"]["time"])[:19],
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in flat(content, ("settings", "resolved", "environment")):
        ElementTree.SubElement(properties, "property", {"name": _line(name), "value": _line(value)})
    for case in cases:
        _add(suite, case, _line(f"{command}.{subject}"))
    if said := str(content.get("conclusion", "")):
        ElementTree.SubElement(suite, "system-out").text = _text(said)
    ElementTree.indent(root)
    return f"{PROLOG}{ElementTree.tostring(root, encoding='unicode')}\n"


def _add(suite: ElementTree.Element, case: Case, class_name: str) -> None:
    facts = {"classname": class_name, "name": _line(case.name)}
    if case.seconds is not None:
        facts["time"] = _time(case.seconds)
    found = ElementTree.SubElement(suite, "testcase", facts)
    if case.status == Status.SKIPPED:
        ElementTree.SubElement(found, "skipped", {"message": _line(case.message)})
    elif case.failed:
        said = {"type": _line(case.verdict), "message": _line(case.message)}
        ElementTree.SubElement(found, "failure", said).text = _text(case.detail or case.message)


def _time(seconds: float) -> str:
    return f"{seconds:.3f}"


def _line(text: str) -> str:
    return NO_XML.sub(_escape, in_a_line(text))


def _text(text: str) -> str:
    return NO_XML.sub(_escape, visible(text))


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
