"""verify-cache --server --against: how far are two servers from each other?"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kvtool.commands.verify import server_settings as server
from kvtool.commands.verify.server_report import nats, times
from kvtool.ending import End, until_ended
from kvtool.ui.cases import Case, status_of
from kvtool.ui.output import Output
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.core.servers.against import Comparison, Position


@dataclass
class AgainstReport:
    """Two servers at the same histories."""

    comparisons: list[Comparison]
    positions: list[Position]
    lossy: bool  # that they differ is meant
    resolved: dict[str, Any] = field(default_factory=dict)
    requests_sent: int = 0
    seconds: float = 0.0
    ended: End | None = None

    @property
    def apart(self) -> list[Comparison]:
        """The kinds of answers that differ by more than the servers' noise."""
        from kvtool.core.servers.against import APART

        return [found for found in self.comparisons if found.verdict == APART]

    @property
    def exit_code(self) -> int:
        """That of a signal; else 0 if they agree, or differ as was said."""
        if self.ended is not None:
            return self.ended.exit_code
        other = any(found.other_model for found in self.comparisons)
        return 0 if self.comparisons and not other and (self.lossy or not self.apart) else 1

    def word(self, found: Comparison) -> str:
        """The verdict of a kind."""
        return "lossy, as configured" if self.lossy and found in self.apart else found.verdict

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        said = [f"{found.kind}: {self._said(found)}" for found in self.comparisons]
        if any(found.other_model for found in self.comparisons):
            said.append("most likeliest tokens differ: is it the same model?")
        elif self.apart and not self.lossy:
            said.append("if one of them rounds on purpose, a q8_0 cache say, --lossy says so")
        if self.ended is not None:
            said.append(self.ended.value)
        return "; ".join(said) or "nothing was compared"

    def _said(self, found: Comparison) -> str:
        flips = f"{found.flips} of {found.positions} likeliest tokens differ"
        if found not in self.apart:
            return f"{found.verdict}, {flips}" if found.flips else found.verdict
        first = f", from token {found.first_apart} on" if found.first_apart is not None else ""
        return (
            f"{self.word(found)}, {nats(found.gap)} nats ({times(found.ratio)} times their noise), "
            f"KL {nats(found.kl)}, {flips}{first}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """A row for each kind."""
        return [{**asdict(found), "verdict": self.word(found)} for found in self.comparisons]

    def cases(self) -> list[Case]:
        """A case for answers without a cache, and one for those with."""
        found = []
        for one in self.comparisons:
            wrong = one.other_model or (one in self.apart and not self.lossy)
            said = self._said(one)
            found.append(Case(one.kind, status_of(not wrong, wrong), self.word(one), said))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        return {**vars(self), "comparisons": self.rows(), "conclusion": self.conclusion}


def run_against(settings: server.Settings, out: Output) -> AgainstReport:
    """Ask both servers for the same ids."""
    from kvtool.core.servers.against import compare, summaries
    from kvtool.core.servers.session import require_same

    assert settings.against is not None
    started = time.perf_counter()
    first = server.engine_at(settings, settings.server)
    second = server.engine_at(settings, settings.against)
    server.require_other(first, second, "--against")
    server.require_same_ids(first, second, "--against")
    before = [engine.identity() for engine in (first, second)]
    prompts = server.prompts_for(settings, first, out)
    found: list[Position] = []
    bars = out.progress(f"{first.name}, {second.name}", len(prompts))
    with bars as bar, until_ended() as outcome:

        def progress(words: str) -> None:
            bar.update(words)
            bar.advance()

        compare(first, second, prompts, progress, found, server.tail_of(settings))
        for engine, facts in zip((first, second), before, strict=True):
            require_same(engine, facts)
    return AgainstReport(
        summaries(found),
        found,
        settings.lossy,
        server.resolved(settings, first, None, prompts)
        | {"against_url": second.client.url, "against_engine": second.name},
        first.client.n_sent + second.client.n_sent,
        time.perf_counter() - started,
        outcome.how,
    )


def show_against(report: AgainstReport, out: Output) -> None:
    """A row for answers without a cache, and one for those with."""
    facts = report.resolved
    title = f"Logprobs of {facts['url']} against {facts['against_url']}, the same ids"
    columns = [
        Column("answers", "left", key=True),
        Column("verdict", "left", by_word=True),
        Column("gap, nats", brief="gap", spare=1),
        Column("noise", spare=2),
        Column("gap / noise", spare=3, brief="ratio"),
        Column("loss", spare=4),
        Column("KL"),
        Column("worst KL", spare=5),
        Column("flips"),
    ]
    cells = [
        [
            found.kind, report.word(found), nats(found.gap), nats(found.noise), times(found.ratio),
            f"{found.loss:+.1e}", nats(found.kl), nats(found.worst_kl),
            f"{found.flips} of {found.positions}",
        ]
        for found in report.comparisons
    ]  # fmt: skip
    out.caption = f"{facts['model']}, {report.requests_sent} requests, {report.seconds:.0f} s"
    if cells:
        out.table(title, columns, cells)
    out.verdict(None if report.ended else report.exit_code == 0, report.conclusion)
