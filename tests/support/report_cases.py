"""Reports of every command that judges, right and wrong ones and some that ended early."""

from __future__ import annotations

from typing import Any

from kvtool.commands.bench.compare import Change, Comparison, Limit
from kvtool.commands.bench.report import BenchReport
from kvtool.commands.bench.report import Row as BenchRow
from kvtool.commands.verify.logits import LogitsReport
from kvtool.commands.verify.report import CacheReport, NotRun, Row
from kvtool.commands.verify.self_test import SelfTestReport
from kvtool.commands.verify.served import ServedReport
from kvtool.commands.verify.server_against import AgainstReport
from kvtool.commands.verify.server_report import VisitReport
from kvtool.commands.verify.sweep import SweepReport
from kvtool.core.bench.traffic import Bandwidth
from kvtool.core.servers.against import APART
from kvtool.core.servers.against import Comparison as Servers
from kvtool.core.servers.verdict import ArmVerdict
from kvtool.core.verify.check import Checked
from kvtool.core.verify.compare import Gap
from kvtool.core.verify.finding import Diagnosis, Finding
from kvtool.core.verify.hf.task import Swept
from kvtool.core.verify.mutants.selftest import Trial
from kvtool.ending import End
from kvtool.ui.documents import document

HOSTILE = "\x1b[2J</td></failure>]]><script>alert(1)</script>\"'&\n::error::x%0A\u202e\ufffe"


def checked(cache: str = "static", verdict: str = "identical", **more: Any) -> Checked:
    """A check of a kind of cache in `decode`, or in another scenario."""
    wrong = 3 if verdict == "bug" else None
    gap = Gap(8, 8 if wrong is None else 3, wrong, 0.1 if wrong else 0.0, 9e5 if wrong else 0.0)
    gap = gap._replace(by_step=(0.0, gap.relative))
    found = Diagnosis(1, "attention", (0,), "layer 1, head 0", ("keys one slot too far",))
    finding = Finding(
        more.get("scenario", "decode"), verdict, more.get("evidence", ""),
        working=gap, float64=gap, first_wrong=wrong, diagnosis=found if wrong else Diagnosis(),
    )  # fmt: skip
    return Checked(cache, "default", cache != "none", finding)


def row(cache: str = "static", verdict: str = "identical", **more: Any) -> Row:
    """The row of such a check."""
    return Row.of(checked(cache, verdict, **more))


PLANTED = row("planted bug", "bug")
POSITION = {
    "prompt": 0, "position": 4, "token": 7, "max_difference": 1e-6, "ulps": 3.0, "piece": "a",
    "gap_float64": 1e-15, "same_top1": True, "kl": 0.0,
}  # fmt: skip
SERVED = {**POSITION, "gap": 0.5, "expected": 0.1, "noise": None}


def trial(name: str, caught: bool) -> Trial:
    return Trial(name, 5, "", "crop", "bug", "bug" if caught else "rounding", caught=caught)


def bench(comparison: Comparison | None = None) -> BenchReport:
    rows = [
        BenchRow(
            n, "kvtool", kind, n / 100, 0.1, 100.0, 1.5, 2048, 2048, 0.1, 0.01, 4096, [n / 100]
        )
        for n in (10, 100)
        for kind in ("none", "static")
    ]
    return BenchReport(
        rows, {"static": 10}, 1, 32, None, "default", Bandwidth([1e9, 1e9], None), {}, 1.0,
        comparison=comparison or Comparison(),
    )  # fmt: skip


def compared(*regressions: str) -> BenchReport:
    changes = [Change(10, "kvtool", "static", 0.1, 0.2), Change(100, "kvtool", "static", 1.0, 1.0)]
    limits = (Limit("median", 10, True),)
    return bench(
        Comparison("old", limits, changes, list(regressions), [], ["none at 10 tokens: new"])
    )


def swept(name: str, verdict: str, reason: str = "") -> Swept:
    return Swept(name, verdict, verdict in ("identical", "rounding"), reason, 1e-7, seconds=1.5)


def against(verdict: str) -> AgainstReport:
    found = Servers("with a cache", verdict, 4, 0.1, 0.01, 10.0, 0.0, 0.0, 0.0, 1, 7)
    return AgainstReport([found], [], lossy=False)


SLOWER = "static at 10 tokens: median 100.0 -> 200.0 ms (+100%), beyond the limit of 10 % (median)"
BUG = row("static", "bug", evidence="it differs")
UNSUPPORTED = row("static", "unsupported", scenario="crop", evidence="cannot crop")
VAIN = row("paged", "vacuous", evidence="no token was read from it")
REPORTS: dict[str, tuple[str, Any]] = {
    "right": (
        "verify-cache",
        CacheReport([row(), UNSUPPORTED, row("none", "no cache")], PLANTED, 3, "float32"),
    ),
    "bug": ("verify-cache", CacheReport([row("dynamic"), BUG], PLANTED, 3, "float32")),
    "in vain": ("verify-cache", CacheReport([row(), VAIN], PLANTED, 3, "float32")),
    "blind": ("verify-cache", CacheReport([row()], row("planted bug"), 3, "float32")),
    "nothing": ("verify-cache", CacheReport([UNSUPPORTED], PLANTED, 3, "float32")),
    "ended": (
        "verify-cache",
        CacheReport(
            [row()],
            None,
            3,
            "float32",
            ended=End.INTERRUPTED,
            not_run=[NotRun("paged", "exact", "crop")],
        ),
    ),
    "sweep": (
        "verify-cache.sweep",
        SweepReport([swept("gpt2", "rounding"), swept("odd", "not built", "no timm")], "5", 2.0),
    ),
    "sweep with a bug": (
        "verify-cache.sweep",
        SweepReport([swept("gpt2", "bug", "step 3")], "5", 2.0),
    ),
    "self-test": ("verify-cache.self-test", SelfTestReport([trial("a", True)], [], 1.0, False)),
    "self-test missed": (
        "verify-cache.self-test",
        SelfTestReport([trial("a", False)], [], 1.0, False),
    ),
    "server": (
        "verify-cache.server",
        VisitReport(
            [ArmVerdict("fork", "within noise", ratio=0.5, gap=0.1)],
            not_asked=["long (--thorough)"],
        ),
    ),
    "server with a bug": (
        "verify-cache.server",
        VisitReport([ArmVerdict("fork", "beyond noise", ratio=9.0, gap=0.1)]),
    ),
    "server failed": (
        "verify-cache.server",
        VisitReport([ArmVerdict("fork", "identical")], stopped="gone"),
    ),
    "servers alike": ("verify-cache.against", against("alike")),
    "servers apart": ("verify-cache.against", against(APART)),
    "logits": ("verify-logits", LogitsReport([POSITION], True, 1e-12, "file", "float32")),
    "wrong logits": (
        "verify-logits",
        LogitsReport(
            [POSITION, {**POSITION, "position": 5, "gap_float64": 0.1}],
            True,
            1e-12,
            "file",
            "float32",
        ),
    ),
    "other tokens": ("verify-logits", LogitsReport([POSITION], False, 1e-12, "file", "float32")),
    "served": (
        "verify-logits.server",
        ServedReport([SERVED], "agrees", 1.0, 1.0, {}, None, "F16", True, 1, 1.0),
    ),
    "served wrong": (
        "verify-logits.server",
        ServedReport([SERVED], "differs", 9.0, 9.0, {}, SERVED, "F16", True, 1, 1.0),
    ),
    "served unknown": (
        "verify-logits.server",
        ServedReport([SERVED], "cannot tell", 9.0, 9.0, {}, None, "F16", True, 1, 1.0),
    ),
    "bench within": ("bench", compared()),
    "bench slower": ("bench", compared(SLOWER)),
}


def content_of(command: str, report: Any, **settings: Any) -> dict[str, Any]:
    """The document of a report."""
    return document(command, {"run": {"dtype": "float32"}, **settings}, report)
