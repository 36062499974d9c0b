"""What verify-cache --server --dry-run prints: each request that would be sent."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.ui.cases import Case, not_run
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.core.servers.dry import DryEngine

Sent = tuple[str, tuple[str, dict[str, Any]]]  # for which arm, and a path with its body


def dry_report(dry: DryEngine, allowed: int, others: Sequence[DryEngine] = ()) -> DryReport:
    """The report of a dry engine's requests. allowed: how many requests may be sent to a server.
    others: the second server, if there is one."""
    n_sent, asked = dry.client.n_sent, dry.requests_made
    n_identifying = n_sent + dry.n_identity
    more = max(0, len(asked) + n_identifying - allowed)
    second = [dry_report(other, allowed) for other in others]
    return DryReport(dry.client.url, dry.name, asked, n_sent, more, n_identifying, second)


@dataclass
class DryReport:
    """Requests that were not sent. -1 stands for an id that the server would have answered."""

    url: str
    engine: str
    requests: list[Sent]
    n_sent: int  # to find out what the server is
    n_too_many: int  # above --requests
    n_identifying: int  # `n_sent`, and those before and after all others
    second: list[DryReport]  # of --promoted or --against
    exit_code: int = 0

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        said = [found.counted for found in (self, *self.second)]
        return "; ".join([*said, "-1 stands for an id that a server will answer"])

    @property
    def counted(self) -> str:
        """How many requests one server would get."""
        said = (
            f"{len(self.requests)} requests to {self.url}, none of which was sent, and "
            f"{self.n_identifying} that identify the server ({self.engine}), of which "
            f"{self.n_sent} sent now"
        )
        return f"{said}; {self.n_too_many} more than --requests allows" if self.n_too_many else said

    def cases(self) -> list[Case]:
        """A skipped case for each request."""
        names = [f"{i}: {arm}, {path}" for i, (arm, (path, _)) in enumerate(self.requests, 1)]
        return not_run(names, "a dry run sends nothing")

    def rows(self) -> list[dict[str, Any]]:
        """A row for each request."""
        return [
            {"to": found.url, "for": arm, "path": path, "body": json.dumps(body)}
            for found in (self, *self.second)
            for arm, (path, body) in found.requests
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        requests = [
            {"for": arm, "method": "POST", "path": path, "body": body}
            for arm, (path, body) in self.requests
        ]
        second = [found.to_dict() for found in self.second]
        return {
            **vars(self), "requests": requests, "second": second, "conclusion": self.conclusion,
        }  # fmt: skip


def brief(text: str) -> str:
    """A body with a count in place of many placeholder ids.

    >>> brief('{"prompt": [5, -1, -1, -1]}')
    '{"prompt": [5, -1 (3 times)]}'
    """
    return re.sub(r"-1(, -1)+", lambda run: f"-1 ({run[0].count('-1')} times)", text)


def show_dry(report: DryReport, out: Output) -> None:
    """Print a line for each request, as it would be sent, below a line for its arm."""
    for found in (report, *report.second):
        if report.second:
            out.text(f"# to {found.url}")
        last = ""
        for arm, (path, body) in found.requests:
            if arm != last:
                out.text(f"# {arm}")
                last = arm
            out.text(f"POST {path} {brief(json.dumps(body))}", wrap=False)
    out.verdict(None, report.conclusion)
