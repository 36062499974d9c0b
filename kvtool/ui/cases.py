"""A report's checks as cases, each passed, failed or skipped: for JUnit and for annotations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Status(Enum):
    """The end of a case. A skipped one was not run, or nothing can be said of it."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Case:
    """A check with its status; of a passed one the rest need not be given."""

    name: str
    status: Status
    verdict: str = ""  # in a word or two
    message: str = ""  # why it failed or was skipped, in a line
    detail: str = ""  # the evidence, in lines
    seconds: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the check found something wrong."""
        return self.status == Status.FAILED


def status_of(right: bool, wrong: bool) -> Status:
    """Passed if right, failed if wrong, else skipped."""
    if right:
        return Status.PASSED
    return Status.FAILED if wrong else Status.SKIPPED


def not_run(names: Iterable[str], why: str) -> list[Case]:
    """A skipped case for each check that was not run."""
    return [Case(name, Status.SKIPPED, "not run", f"not run: {why}") for name in names]


def cases_of(content: Mapping[str, Any], report: Any) -> list[Case]:
    """All cases of a report. One more says why the exit code is not 0 where no case does, so that
    no reader of the cases takes for right what is not."""
    found: list[Case] = list(report.cases())
    if content["exit_code"] and not any(case.failed for case in found):
        said = str(content.get("conclusion", ""))
        found.append(Case("verdict", Status.FAILED, "no verdict", said, said))
    return found


def subject_of(content: Mapping[str, Any]) -> str:
    """What was checked: the model, the user's decoder, a server, or all types of transformers."""
    settings, facts = content.get("settings") or {}, content.get("measured_on") or {}
    resolved = content.get("resolved") or {}
    target = settings.get("target") and str(settings["target"]).replace("\\", "/").split("/")[-1]
    known = (target, settings.get("server"), facts.get("model"), resolved.get("model"))
    return str(next(filter(None, known), "") or "all")


def flat(content: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The leaves below these names, with their whole path; lists are JSON."""
    for name in names:
        value = content.get(name)
        if isinstance(value, Mapping):
            below = {f"{name}.{key}": item for key, item in value.items()}
            yield from flat(below, list(below))
        elif value is not None:
            yield name, value if isinstance(value, str) else json.dumps(value)
