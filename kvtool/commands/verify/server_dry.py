"""What verify-cache --server --dry-run prints: each request that would be sent."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.ui.cases import Case, not_run
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.core.servers.dry import DryEngine

Sent = tuple[str, tuple[str, dict[str, Any]]]  # for which arm, and a path with its body


def dry_report(dry: DryEngine, allowed: int) -> DryReport:
    """The report of a dry engine's requests. allowed: how many requests may be sent."""
    n_sent, asked = dry.client.n_sent, dry.requests_made
    more = max(0, len(asked) + n_sent - allowed)
    return DryReport(dry.client.url, dry.name, asked, n_sent, more)


@dataclass
class DryReport:
    """Requests that were not sent. -1 stands for an id that the server would have answered."""

    url: str
    engine: str
    requests: list[Sent]
    n_sent: int  # to find out what the server is
    n_too_many: int  # above --requests
    exit_code: int = 0

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        said = (
            f"{len(self.requests)} requests to {self.url}, none of which was sent; {self.n_sent} "
            f"identified the server ({self.engine}); -1 stands for an id that it will answer"
        )
        return f"{said}; {self.n_too_many} more than --requests allows" if self.n_too_many else said

    def cases(self) -> list[Case]:
        """A skipped case for each request."""
        names = [f"{i}: {arm}, {path}" for i, (arm, (path, _)) in enumerate(self.requests, 1)]
        return not_run(names, "a dry run sends nothing")

    def rows(self) -> list[dict[str, Any]]:
        """A row for each request."""
        return [
            {"for": arm, "path": path, "body": json.dumps(body)}
            for arm, (path, body) in self.requests
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        requests = [
            {"for": arm, "method": "POST", "path": path, "body": body}
            for arm, (path, body) in self.requests
        ]
        return {**vars(self), "requests": requests, "conclusion": self.conclusion}


def brief(text: str) -> str:
    """A body with a count in place of many placeholder ids.

    >>> brief('{"prompt": [5, -1, -1, -1]}')
    '{"prompt": [5, -1 (3 times)]}'
    """
    return re.sub(r"-1(, -1)+", lambda run: f"-1 ({run[0].count('-1')} times)", text)


def show_dry(report: DryReport, out: Output) -> None:
    """Print a line for each request, as it would be sent, below a line for its arm."""
    last = ""
    for arm, (path, body) in report.requests:
        if arm != last:
            out.text(f"# {arm}")
            last = arm
        out.text(f"POST {path} {brief(json.dumps(body))}", wrap=False)
    out.verdict(None, report.conclusion)
