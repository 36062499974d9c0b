"""The report of verify-cache --server: a row for each arm, in a table and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.ending import End
from kvtool.ui.cases import Case, not_run, status_of
from kvtool.ui.output import Output
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.core.servers.verdict import ArmVerdict

GROWN = 2.0  # times the noise; above it the server is said to be busy


@dataclass
class VisitReport:
    """All arms, and the conclusion from them."""

    arms: list[ArmVerdict]
    resolved: dict[str, Any] = field(default_factory=dict)
    requests_sent: int = 0
    seconds: float = 0.0
    grown: float = 1.0  # times the noise at the end, over that of the beginning
    cut: tuple[int, int] = (0, 0)  # requests without a cache that were cut short, and all
    spent: bool = False  # --requests, before everything was asked
    stopped: str = ""  # by which error, before everything was asked
    not_run: list[str] = field(default_factory=list)
    not_asked: list[str] = field(default_factory=list)  # that were not chosen
    ended: End | None = None

    def of(self, *verdicts: str) -> list[ArmVerdict]:
        """The arms with one of these verdicts."""
        return [arm for arm in self.arms if arm.verdict in verdicts]

    @property
    def exit_code(self) -> int:
        """That of a signal; 2 if the server failed; else 0 if something is right and nothing speaks
        against it, else 1."""
        from kvtool.core.servers.verdict import WRONG

        if self.ended is not None:
            return self.ended.exit_code
        if self.stopped:
            return 2
        right = any(arm.right for arm in self.arms)
        return 0 if right and not self.of(*WRONG) else 1

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        parts = [*self._against(), *self._unknown(), *self._for()] or ["nothing was checked"]
        if self.grown > GROWN:
            parts.append(
                f"asked once more at the end, the first request differed by {self.grown:.1f} times "
                "the noise: the server is busy with others"
            )
        if self.cut[0]:
            n, of = self.cut
            parts.append(f"{n:,} of {of:,} answers without a cache are shorter than was asked for")
        if self.spent:
            parts.append("all requests that --requests allows were sent")
        if self.stopped:
            parts.append(f"then the server failed: {self.stopped}")
        if self.ended is not None:
            parts.append(self.ended.value)
        left = [*self.not_run, *self.not_asked]
        left += [f"{arm.arm} ({arm.evidence})" for arm in self._of_no_use()]
        return "; ".join([*parts, f"not run: {', '.join(left)}"] if left else parts)

    def _of_no_use(self) -> list[ArmVerdict]:
        from kvtool.core.servers.verdict import UNSUPPORTED

        return self.of(UNSUPPORTED)

    def _against(self) -> list[str]:
        from kvtool.core.servers.verdict import BEYOND, BUG, CONTRARY

        said = [f"{a.arm}: contradicts itself, {a.evidence}" for a in self.of(CONTRARY)]
        for verdict, words in ((BUG, "a bug"), (BEYOND, "beyond the engine's own noise")):
            if arms := self.of(verdict):
                names = _names([f"{a.arm} ({a.evidence})" if a.evidence else a.arm for a in arms])
                said.append(f"{words} in {names}: {_size(arms)}{_begins(arms)}")
        return said

    def _unknown(self) -> list[str]:
        from kvtool.core.servers.verdict import HIDDEN, NOT_REACHED, VACUOUS

        said = {HIDDEN: "cannot tell", VACUOUS: "proved nothing", NOT_REACHED: "not reached"}
        groups: dict[tuple[str, str], list[str]] = {}
        for arm in self.of(*said):
            groups.setdefault((said[arm.verdict], arm.evidence), []).append(arm.arm)
        return [f"{_names(arms)}: {words}, {why}" for (words, why), arms in groups.items()]

    def _for(self) -> list[str]:
        from kvtool.core.servers.verdict import IDENTICAL, LOSSY, ROUNDING, WITHIN

        said = []
        if arms := self.of(ROUNDING):
            in_f32 = max(a.promoted_ratio or 0 for a in arms)
            said.append(
                f"{_names([a.arm for a in arms])}: rounding, in F32 too at most {times(in_f32)} of "
                "the engine's own noise"
            )
        if arms := self.of(WITHIN):
            most = max(arms, key=lambda a: a.ratio or 0)
            allowed = f", where {most.limit:g} is the limit" if (most.ratio or 0) > 1 else ""
            said.append(
                f"{_names([a.arm for a in arms])}: within the engine's own noise, at most "
                f"{most.ratio:.2f} of it ({most.arm}{allowed})"
            )
        if arms := self.of(IDENTICAL):
            said.append(f"{_names([a.arm for a in arms])}: identical to a request without a cache")
        said += [f"{a.arm}: lossy by design, by {a.gap:.2g} nats" for a in self.of(LOSSY)]
        return said

    @property
    def advice(self) -> str:
        """What to do next, or nothing."""
        from kvtool.core.servers.verdict import BEYOND, HIDDEN, NOT_TOLD, VACUOUS

        if any(arm.evidence == NOT_TOLD for arm in self.of(VACUOUS)):
            return _to_tell_reuse(self.resolved)
        if self.grown > GROWN:
            return "Ask again while nobody else uses the server."
        if self.of(BEYOND, HIDDEN) and "promoted_url" not in self.resolved:
            how = "serve the model with --dtype float32 too"
            if self.resolved.get("engine") == "llama.cpp":
                how = "kvtool promote MODEL.gguf --out F32.gguf, serve that too"
            return f"the same numbers in float32 decide: {how}, and add --promoted URL"
        return ""

    def rows(self) -> list[dict[str, Any]]:
        """A row for each arm."""
        return [
            {**{k: v for k, v in asdict(arm).items() if k != "gaps"}, "right": arm.right}
            for arm in self.arms
        ]

    def cases(self) -> list[Case]:
        """A case for each arm, also for those that were not asked."""
        from kvtool.core.servers.verdict import WRONG

        found = []
        for arm in self.arms:
            size = "" if arm.ratio is None else f"{times(arm.ratio)} times the noise, "
            size += "" if arm.gap is None else f"{nats(arm.gap)} nats"
            said = "; ".join(filter(None, [arm.verdict, arm.evidence, size + _begins([arm])]))
            status = status_of(arm.right, arm.verdict in WRONG)
            found.append(Case(arm.arm, status, arm.verdict, said))
        why = self.stopped or (self.ended.value if self.ended else "--requests were sent")
        left = [name.removesuffix(" (--thorough)") for name in self.not_asked]
        return found + not_run(self.not_run, why) + not_run(left, "add --thorough")

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        return {
            **{k: v for k, v in vars(self).items() if k != "arms"},
            "arms": [{**asdict(arm), "right": arm.right} for arm in self.arms],
            "conclusion": self.conclusion,
            "advice": self.advice,
        }


def _to_tell_reuse(facts: dict[str, Any]) -> str:
    """The setting that makes an engine report reused tokens."""
    from kvtool.core.servers.engines import ENGINES

    kind = ENGINES.get(facts.get("engine", ""))
    return "" if kind is None else str(kind[1].to_tell_reuse)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)


def _size(arms: Sequence[ArmVerdict]) -> str:
    """The size of the fault in words, on the promoted server if that decided."""
    from kvtool.core.servers.verdict import BUG

    if arms[0].verdict == BUG:
        most = max(arms, key=lambda a: (a.promoted_ratio or 0, a.promoted_worst or 0))
        sizes = (most.promoted_ratio, most.promoted_gap)
        if sizes[0] is not None and sizes[0] <= most.limit:  # in few requests alone
            sizes = (most.promoted_worst, most.promoted_worst_gap)
        return _finite(
            most, len(arms) > 1, sizes[0],
            f"{times(sizes[0])} times the noise in F32, {nats(sizes[1])} nats",
        )  # fmt: skip
    most = max(arms, key=lambda a: max(a.worst or 0, a.tail or 0))
    rare = most.ratio is not None and most.ratio <= most.limit
    seldom = (most.worst, most.worst_gap) if most.tail is None else (most.tail, most.tail_gap)
    ratio, gap = seldom if rare else (most.ratio, most.gap)
    said = f"{'up to ' * rare}{times(ratio)} times it, {nats(gap)} nats"
    if most.fault and gap is not None:
        said += f" ({times(gap / most.fault)} of a wrong token)"
    if not rare:
        said += f", up to {times(most.worst)} times in a request"
    said = _finite(most, len(arms) > 1, most.worst, said)
    in_f32 = most.promoted_ratio
    return said if in_f32 is None else f"{said}; {times(in_f32)} times the noise in F32"


def _finite(arm: ArmVerdict, several: bool, size: float | None, said: str) -> str:
    """What is said of a size, unless it is that of NaN."""
    if size is None or math.isfinite(size):
        return said
    where = f" ({arm.arm})" if several else ""
    return f"its logprobs with the cache are not a number{where}"


def _begins(arms: Sequence[ArmVerdict]) -> str:
    first = min((a.first_beyond for a in arms if a.first_beyond is not None), default=None)
    return "" if first is None else f", from token {first} on"


def times(value: float | None) -> str:
    """A ratio in words."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def nats(value: float | None) -> str:
    """A distance in nats, in words."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN"
    return f"{value:.1e}" if value else "0"


def show(report: VisitReport, out: Output) -> None:
    """A row for each arm, and what to do next."""
    facts = report.resolved
    title = f"Cached against cold logprobs of {facts.get('engine', '')} at {facts.get('url', '')}"
    columns = [
        Column("arm", "left", key=True),
        Column("verdict", "left"),
        Column("tokens reused", spare=1),
        Column("noise, nats", spare=2, brief="noise"),
        Column("cached gap"),
        Column("wrong token", spare=2, brief="wrong"),
        Column("gap / noise", brief="ratio", spare=3),
    ]
    promoted = any(arm.promoted for arm in report.arms)
    if promoted:
        columns.append(Column("in F32"))
    columns.append(Column("from token", spare=4))
    cells = []
    for arm in report.arms:
        row = [
            arm.arm, arm.verdict, "-" if arm.reused is None else str(arm.reused), nats(arm.floor),
            nats(arm.gap), nats(arm.fault), times(arm.ratio),
            *([times(arm.promoted_ratio)] if promoted else []),
            "-" if arm.first_beyond is None else str(arm.first_beyond),
        ]  # fmt: skip
        cells.append(row)
    out.caption = _about(report)
    if cells:
        out.table(title, columns, cells)
    unfinished = report.ended or report.stopped
    out.verdict(None if unfinished else report.exit_code == 0, report.conclusion)
    if report.advice:
        out.hint(report.advice)


def _about(report: VisitReport) -> str:
    facts = report.resolved
    n = len(facts.get("prompt_tokens", []))
    return (
        f"{facts.get('model', '')}, {n} prompt{'s' * (n != 1)}, {report.requests_sent} requests, "
        f"{report.seconds:.0f} s"
    )


def draw(report: VisitReport, path: Path) -> bool:
    """The plot of the gap by position, beside the noise and the size of a fault -> whether there is
    something to draw."""
    from kvtool.ui.noise_plot import ArmSeen, noise_plot

    panels = [
        ArmSeen(
            arm.arm,
            arm.verdict,
            [(gap.history, gap.gap) for gap in arm.gaps],
            [(gap.history, gap.floor) for gap in arm.gaps],
            arm.fault,
        )
        for arm in report.arms
        if arm.gaps
    ]
    facts = report.resolved
    title = f"Cached against cold logprobs, {facts['engine']}, {_about(report)}"
    return noise_plot(path, panels, title)
