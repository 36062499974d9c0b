"""What GitHub Actions takes of a command: annotations, and the summary of a step.

Source: docs.github.com, "Workflow commands for GitHub Actions".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtool.errors import FileError
from kvtool.ui.cases import cases_of
from kvtool.ui.inert import in_a_line, visible

SUMMARY = "GITHUB_STEP_SUMMARY"  # names a file of Markdown
SHOWN = 10  # annotations of a kind: GitHub shows no more of a step
MAX_SUMMARY = 2**20  # bytes: GitHub drops the whole of a larger one


def annotation(kind: str, title: str, message: str, file: str = "") -> str:
    """The line of an annotation: kind is error, warning or notice.

    >>> annotation("error", "a: b, c", "100 %\\nwrong", "my.py")
    '::error file=my.py,title=a%3A b%2C c::100 %25%0Awrong'
    """
    named = {"file": file, "title": title}
    known = ",".join(f"{name}={_property(value)}" for name, value in named.items() if value)
    return f"::{kind} {known}::{_data(message)}"


def annotated(content: Mapping[str, Any], report: Any) -> list[str]:
    """An error for each case that failed, the last of them for all that are not shown, and a
    notice of the verdict."""
    name = _name(content)
    target = str((content.get("settings") or {}).get("target") or "")
    file = target.rpartition(":")[0]
    file = "" if os.path.isabs(file) else file  # it is looked for in the repository
    failed = [case for case in cases_of(content, report) if case.failed]
    shown = failed if len(failed) <= SHOWN else failed[: SHOWN - 1]
    lines = [
        annotation("error", f"{name}: {case.name}", case.detail or case.message, file)
        for case in shown
    ]
    if more := failed[len(shown) :]:
        names = "\n".join(case.name for case in more)
        lines.append(annotation("error", f"{name}: {len(more)} more", names, file))
    return [*lines, annotation("notice", name, str(content.get("conclusion", "")))]


def error_annotation(command: str, error: Exception) -> str:
    """The annotation for work that could not be done."""
    return annotation("error", _name({"schema": f"kvtool.{command}/1"}), str(error))


def add_summary(text: str) -> None:
    """Append Markdown to the summary of the step, if GitHub has named its file; what would make it
    too large is cut at a line. Raises FileError."""
    path = os.environ.get(SUMMARY)
    if not path:
        return
    try:
        with Path(path).open("ab") as file:
            room = MAX_SUMMARY - file.tell() - 1
            file.write(_cut(text.encode(), room) + b"\n")
    except OSError as error:
        raise FileError(f"{SUMMARY} {path}: cannot be written ({error.strerror})") from error


def _cut(text: bytes, room: int) -> bytes:
    """The text, or its first lines and a word about the others."""
    if len(text) <= room:
        return text
    note = b"\n\nThe rest is too long for a summary.\n"
    return text[: max(0, text.rfind(b"\n", 0, max(0, room - len(note))))] + note


def _name(content: Mapping[str, Any]) -> str:
    return str(content["schema"]).removesuffix("/1").replace(".", " ")


def _data(text: str) -> str:
    return visible(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(in_a_line(text)).replace(":", "%3A").replace(",", "%2C")
