"""A report as a document: JSON that any reader accepts, CSV, or a Markdown table.

JSON holds texts as they are. In CSV and Markdown they are inert: no spreadsheet takes one for a
formula, and no renderer for HTML, a link or an image.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from kvtool.errors import FileError, UsageError
from kvtool.ui.environment import cache_settings, caption, environment, measured_on, peak_memory
from kvtool.ui.inert import visible

SUFFIXES = (".json", ".csv", ".md")
PAGE = ".html"
OF_CHECKS = (*SUFFIXES, ".xml", PAGE)  # of reports that have cases
# What begins a formula (OWASP, CSV Injection), also in full width, where a cell may begin: a
# spreadsheet that expects other separators than commas sees one behind ; and in each line.
FORMULA = re.compile(r"(^|[;\t\n])(?=[ \"]*[=+\-@\t\uff1d\uff0b\uff0d\uff20])")
MARKS = re.compile(r"[\\`*\[\]|#~]|^>")  # of Markdown
ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", "@": "&#64;"})  # without < there is no HTML
ADDRESSES = re.compile(r"\b(https?|ftp|mailto|xmpp):|\bwww\.", re.IGNORECASE)  # are made links


class Report(Protocol):
    """What a command's work returns: a dataclass; `to_dict()` may stand in for its fields.

    If it has them, `resolved` is what `measured_on` describes, `load` what was done there, for CSV
    and Markdown, `more_rows()` further tables of Markdown by their headings, and `conclusion` in
    the document is what Markdown ends with. `cases()` has a Case for each check, for OF_CHECKS.
    """

    @property
    def exit_code(self) -> int:
        """0: done, or all is right; 1: the answer is no; or that of a signal."""
        ...

    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The result as flat rows, for CSV and Markdown."""
        ...


def jsonable(value: Any) -> Any:
    """`value` in JSON's own types: NaN and infinities become None, tensors and arrays lists.

    >>> jsonable({"gap": float("nan"), "file": Path("a.json"), "steps": (1, 2)})
    {'gap': None, 'file': 'a.json', 'steps': [1, 2]}
    """
    if isinstance(value, Enum):
        return jsonable(value.value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: jsonable(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # arrays, tensors, and the scalars of both
        return jsonable(value.tolist())
    if hasattr(value, "item"):
        return jsonable(value.item())
    return str(value)  # paths, dtypes, devices


def document(command: str, settings: Any, report: Report) -> dict[str, Any]:
    """Everything known about one run, ready for json.dumps."""
    to_dict = getattr(report, "to_dict", None)
    return {
        "schema": f"kvtool.{command}/1",
        "settings": jsonable(settings),
        "environment": jsonable(environment()),
        "measured_on": measured_on(settings, getattr(report, "resolved", {})),
        "peak_bytes": peak_memory(),
        "exit_code": report.exit_code,
        **jsonable(to_dict() if to_dict else report),
    }


def to_json(content: Mapping[str, Any]) -> str:
    """The text of a document, without NaN and infinities. Raises ValueError for them."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A header and a line for every row; what is missing or not finite is an empty field. A text
    that begins as a formula has an apostrophe in front."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = columns_of(rows)
    writer.writerow(map(_no_formula, columns))
    for row in rows:
        found = {str(key): _flat(value) for key, value in row.items()}
        writer.writerow(_no_formula(found.get(name, "")) for name in columns)
    return text.getvalue()


def _no_formula(cell: Any) -> Any:
    """A cell as it is, or a text with an apostrophe wherever a formula could begin.

    >>> _no_formula("=1+1"), _no_formula("a;-b"), _no_formula(-1)
    ("'=1+1", "a;'-b", -1)
    """
    return FORMULA.sub(r"\1'", visible(cell)) if isinstance(cell, str) else cell


def to_markdown(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    about: str = "",
    conclusion: str = "",
    more: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> str:
    """A heading, what it is about, a table, more of them under their headings, and what follows
    from them; numbers have six significant digits."""
    parts = [f"# {_plain(title)}", _plain(about), _table(rows)]
    for heading, others in (more or {}).items():
        parts += [f"## {_plain(heading)}", _table(others)]
    return "\n\n".join(part for part in (*parts, _plain(conclusion)) if part) + "\n"


def _plain(text: str) -> str:
    """A line of Markdown that shows `text` and means nothing.

    >>> print(_plain("<b>[a|b]"))
    &lt;b>\\[a\\|b\\]
    """
    line = " ".join(visible(text).splitlines())
    line = MARKS.sub(r"\\\g<0>", line).translate(ENTITIES)
    return ADDRESSES.sub(lambda found: f"{found[0][:-1]}&#{ord(found[0][-1])};", line)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = columns_of(rows)
    lines = [list(map(_plain, columns)), ["---"] * len(columns)]
    lines += [[_short(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if columns else "No rows."


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names in all rows, in the order in which they first appear."""
    return list(dict.fromkeys(str(name) for row in rows for name in row))


def _flat(value: Any) -> Any:
    plain = jsonable(value)
    if plain is None:
        return ""
    return json.dumps(plain) if isinstance(plain, (bool, list, dict)) else plain


def _short(value: Any) -> str:
    plain = _flat(value)
    return f"{plain:.6g}" if isinstance(plain, float) else _plain(str(plain))


def render(path: Path, content: Mapping[str, Any], report: Report) -> bytes:
    """The bytes of the document that the suffix of `path` asks for."""
    suffix = path.suffix.lower()
    rows, load = report.rows(), getattr(report, "load", {})
    if suffix == ".json":
        text = to_json(content)
    elif suffix == ".xml":
        from kvtool.ui.junit import to_junit  # not for help, which is to be instant

        text = to_junit(content, report)
    elif suffix == ".csv":
        # What is said once in other formats stands in every row, so that files can be joined.
        text = to_csv([{**row, **_others({**load, **_facts(content, row)}, row)} for row in rows])
    else:
        text = markdown(content, report)
    return text.encode()


def markdown(content: Mapping[str, Any], report: Report) -> str:
    """The report as Markdown."""
    load = getattr(report, "load", {})
    title = str(content["schema"]).removesuffix("/1").replace(".", " ", 1)
    facts = caption(content["measured_on"], n_digits=64)
    said = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in load.items() if v is not None)
    about = "; ".join(part for part in (facts, said) if part)
    more = report.more_rows() if hasattr(report, "more_rows") else {}
    return to_markdown(title, report.rows(), about, str(content.get("conclusion", "")), more)


def _facts(content: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about a row, with the cache settings of its own kind alone."""
    facts, resolved = dict(content["measured_on"]), content.get("resolved") or {}
    if "cache_settings" in resolved:
        facts["cache_settings"] = cache_settings(resolved, str(row.get("cache", "")))
    return facts


def _others(facts: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in row}


def check_destination(path: Path, suffixes: Sequence[str], flag: str = "--output") -> None:
    """Refuse a file that could not be written, before the work that it is meant for.

    Raises UsageError for a suffix other than `suffixes`, FileError for a folder, and for a file in
    one that is missing or read-only.
    """
    if path.suffix.lower() not in suffixes and not path.is_dir():
        found = path.suffix or "no suffix"
        raise UsageError(
            f"{flag} {path}: unknown format (found {found}, expected {', '.join(suffixes)})",
            f"Try {flag} {path.with_suffix('.json')}.",
        )
    check_writable(path, flag)


def check_writable(path: Path, flag: str) -> None:
    """Raise FileError for a file that could not be written, whatever its format."""
    if path.is_dir():
        raise FileError(f"{flag} {path}: is a folder (expected a file)")
    if path.exists() and not path.is_file():  # a file would take the place of a device
        raise FileError(f"{flag} {path}: is not a regular file (expected one, or none yet)")
    if _is_stdout(path):  # what is written there would replace what was said
        raise FileError(f"{flag} {path}: is where stdout goes", "Give another file.")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise FileError(f"{flag} {path}: the folder {folder} does not exist", "Create it first.")
    try:
        tempfile.TemporaryFile(
            dir=folder
        ).close()  # asking for permission says yes on a read-only disk
    except OSError as error:
        raise FileError(f"{flag} {path}: cannot be written ({error.strerror})") from error


def _is_stdout(path: Path) -> bool:
    """Whether a file is the one that stdout is written to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError, AttributeError):  # it is not there yet, or stdout is no file
        return False
