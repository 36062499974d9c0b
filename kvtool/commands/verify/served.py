"""verify-logits --server: does a running engine compute what its weights say?"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvtool.commands.verify.options import MAX_REQUESTS, REQUEST_TIMEOUT, SERVER
from kvtool.commands.verify.server_dry import DryReport, dry_report, show_dry
from kvtool.config import RunConfig, check_float, check_int
from kvtool.errors import FileError, ServerError
from kvtool.reading import require_file
from kvtool.ui.cases import Case, status_of
from kvtool.ui.output import Output, present
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.reference.served import Verdict
    from kvtool.core.servers.engine import Engine

TAIL, N_PROMPTS = 24, 4
SHOWN = 8  # positions in the table; all are in the document

Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="Compare a running llama.cpp, vLLM or SGLang, without its cache, with the float64 run "
        "of --model, which it serves.",
        rich_help_panel=SERVER,
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        "--tokens",
        metavar="N",
        help="How many tokens of a server's own after each prompt are compared.",
        rich_help_panel=SERVER,
    ),
]


@dataclass(frozen=True)
class Settings:
    """All settings of verify-logits --server."""

    run: RunConfig
    server: str
    engine: str = ""
    prompt: str | None = None
    prompts: Path | None = None
    tokens: int = TAIL
    requests: int = MAX_REQUESTS
    timeout: float = REQUEST_TIMEOUT
    dry_run: bool = False
    plot: Path | None = None

    def __post_init__(self) -> None:
        check_int("--tokens", self.tokens, 2, 4096)
        check_int("--requests", self.requests, 1)
        check_float("--timeout", self.timeout, 0.0, open_low=True)
        if self.prompts is not None:
            require_file(self.prompts, "prompts, one a line", "--prompts")
        if self.plot is not None and not self.plot.parent.is_dir():
            raise FileError(f"--plot {self.plot}: the folder {self.plot.parent} does not exist")


@dataclass
class ServedReport:
    """All positions, and the conclusion from them."""

    positions: list[dict[str, Any]]
    verdict: str
    ratio: float
    worst_ratio: float
    controls: dict[str, float]
    first: dict[str, Any] | None
    rounding: str  # that is expected of the format
    tokens_agree: bool | None  # None: there was no tokenizer to ask
    requests_sent: int
    seconds: float
    resolved: dict[str, Any] = field(default_factory=dict)

    @property
    def right(self) -> bool | None:
        """Whether the server agrees; None: undecided."""
        if self.verdict == "cannot tell":
            return None
        return self.verdict == "agrees" and self.tokens_agree is not False

    @property
    def exit_code(self) -> int:
        """0 if it agrees, else 1."""
        return 0 if self.right else 1

    def pooled(self, name: str) -> float:
        """The root mean square over all positions, in nats."""
        values = [row[name] or 0.0 for row in self.positions]
        return float(sum(v * v for v in values) / len(values)) ** 0.5

    @property
    def flips(self) -> int:
        """Positions at which another token is the likeliest."""
        return sum(not row["same_top1"] for row in self.positions)

    @property
    def kl(self) -> float:
        """The mean over all positions, in nats."""
        return sum(row["kl"] for row in self.positions) / len(self.positions)

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        n, gap, expected = len(self.positions), self.pooled("gap"), self.pooled("expected")
        measured = (
            f"{gap:.1e} nats from the float64 run, of which rounding ({self.rounding}) explains "
            f"{expected:.1e}"
        )
        if self.tokens_agree is False:
            return f"differs: the server makes other tokens of a text than the model; {measured}"
        if self.verdict == "differs":
            at = self.first or {}
            return (
                f"differs from position {at.get('position')} of prompt {at.get('prompt')} on: "
                f"{measured}: {self.ratio:.3g} times less; top token other at {self.flips} of {n}"
            )
        seen = ", ".join(f"{name} {times:.3g}" for name, times in self.controls.items())
        if self.verdict == "cannot tell":
            return (
                f"cannot tell: {measured}, and most faults would be no larger (times that: {seen});"
                " a file of more bits, or kvtool promote, would show them"
            )
        return (
            f"agrees within its format's rounding at {n} positions: {measured}; mean KL "
            f"{self.kl:.1e} nats, top token the same at {n - self.flips} of {n} "
            f"(faults would be this many times rounding: {seen})"
        )

    def rows(self) -> list[dict[str, Any]]:
        """The positions."""
        return self.positions

    def cases(self) -> list[Case]:
        """A case for each position. All are judged together: of a server that differs the first
        beyond rounding fails, and the others neither pass nor fail."""
        first = self.first or {}
        at = (first.get("prompt"), first.get("position"))
        found = []
        for row in self.positions:
            wrong = self.right is False and (row["prompt"], row["position"]) == at
            said = self.conclusion if wrong else "all positions are judged together"
            status = status_of(bool(self.right), wrong)
            name = f"prompt {row['prompt']}, position {row['position']}"
            found.append(Case(name, status, self.verdict, said))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        more = {"mean_kl": self.kl, "flips": self.flips, "gap": self.pooled("gap")}
        more |= {"expected": self.pooled("expected"), "noise": self.pooled("noise")}
        return {**vars(self), **more, "conclusion": self.conclusion}


def present_served(settings: Settings, out: Output) -> NoReturn:
    """Compare, or print the requests of a dry run. Raises typer.Exit and ServerError."""
    if settings.dry_run:
        present("verify-logits.server.dry-run", settings, run_dry, show_dry, out)
    if (path := settings.plot) is not None:
        out.draw_later(path, draw)
    present("verify-logits.server", settings, run, show, out, draw)


def run_dry(settings: Settings, out: Output) -> DryReport:
    """The report of a dry run. Only requests that identify the server are sent."""
    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.machine import prepare
    from kvtool.core.servers.client import Client
    from kvtool.core.servers.dry import DryEngine
    from kvtool.core.servers.engines import connect
    from kvtool.core.servers.texts import Prompt

    client = Client(settings.server, settings.timeout, settings.requests)
    dry = DryEngine(connect(client, settings.engine))
    import torch

    device, _ = prepare(settings.run)
    loaded = checkpoint.load(settings.run.model, device, torch.float32)
    dry.arm = "whether the tokenizer is the same"
    _same_tokens(dry, loaded)
    dry.arm = "prompts"
    for number, ids in enumerate(_prompts(settings, dry, loaded, out)):
        dry.arm = f"prompt {number + 1}"
        Prompt(dry, number, ids, settings.tokens)
    return dry_report(dry, settings.requests)


def run(settings: Settings, out: Output) -> ServedReport:
    """Ask the server, then compute the same text here."""
    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.machine import prepare
    from kvtool.core.reference import reference, served
    from kvtool.core.servers.client import Client
    from kvtool.core.servers.engines import connect

    started = time.perf_counter()
    client = Client(settings.server, settings.timeout, settings.requests)
    engine = connect(client, settings.engine)
    import torch

    device, _ = prepare(settings.run)
    loaded = checkpoint.load(settings.run.model, device, torch.float64, check=True)
    reference.check_decoder(loaded.config)
    agree = _same_tokens(engine, loaded)
    prompts = _prompts(settings, engine, loaded, out)
    with out.progress(engine.name, len(prompts) + 2) as bar:

        def progress(words: str) -> None:
            bar.update(words)
            bar.advance()

        n_vocab = loaded.config.vocab_size
        found = served.ask(engine, prompts, settings.tokens, n_vocab, progress)
        progress("float64")
        served.run_exact(loaded.model, found)
        stored, block = loaded.stored_dtype, _block(loaded.stored_dtype)
        facts, tokenizer = loaded.facts, loaded.tokenizer
        del loaded
        progress("with its rounding")
        working = checkpoint.load(settings.run.model, device, torch.float32, check=True).model
        served.run_rounded(working, found, stored, block)
    positions = served.positions(found)
    rows = [{**vars(row), "piece": tokenizer.decode([row.token])} for row in positions]
    return _report(
        served.judge(found, positions), rows, agree,
        rounding=served.rounding.described(stored, block),
        requests_sent=client.n_sent,
        seconds=time.perf_counter() - started,
        resolved={
            **facts, "device": str(device), "url": client.url, "engine": engine.name,
            "served": Path(engine.model).name or engine.model,
            "prompt_tokens": [len(ids) for ids in prompts], "tail": settings.tokens,
        },
    )  # fmt: skip


def _report(
    verdict: Verdict, rows: list[dict[str, Any]], agree: bool | None, **more: Any
) -> ServedReport:
    first = None if verdict.first is None else vars(verdict.first)
    told = (verdict.verdict, verdict.ratio, verdict.worst, verdict.controls, first)
    rounding = more.pop("rounding")
    return ServedReport(rows, *told, rounding, agree, **more)


def _block(stored: str) -> int:
    """How many values a block of a format has; 1 for those that have none."""
    from kvtool.core.checkpoint.gguf.formats import FORMATS

    return next((f.block for f in FORMATS.values() if f.name == stored), 1)


def _same_tokens(engine: Engine, loaded: Checkpoint) -> bool | None:
    """Whether both tokenize a text to the same ids; None if one of them cannot."""
    from kvtool.core.servers.prompts import TEXTS

    if not loaded.reads_text:
        return None
    try:
        return engine.tokenize(TEXTS[0]) == loaded.tokenizer.encode(TEXTS[0])
    except ServerError:
        return None


def _prompts(
    settings: Settings, engine: Engine, loaded: Checkpoint, out: Output
) -> list[list[int]]:
    """The ids of all prompts: the model's own tokenizer makes them, where it has one."""
    from kvtool.core.reference.reference import check_length
    from kvtool.core.servers.prompts import LENGTHS, TEXTS, built_in, ids_of, read_prompts

    tokenizer, n_prompts = loaded.tokenizer, N_PROMPTS
    if settings.prompts is not None:
        read = read_prompts(settings.prompts, out.note)
        if loaded.reads_text:
            read = [tokenizer.encode(p) if isinstance(p, str) else p for p in read]
        found = ids_of(engine, read)
    elif settings.prompt is not None:
        found = [tokenizer.encode(settings.prompt)]
    elif loaded.reads_text:
        pairs = zip(TEXTS[:n_prompts], LENGTHS, strict=False)
        found = [tokenizer.encode(text)[:n] for text, n in pairs]
    else:
        found = built_in(engine, n_prompts)
    for ids in found:
        check_length("--prompts", len(ids) + settings.tokens, loaded.config.context)
    return found


def show(report: ServedReport, out: Output) -> None:
    """The positions with the largest gaps, the faults, and the conclusion."""
    columns = [
        Column("prompt", key=True),
        Column("position", key=True),
        Column("token", "left"),
        Column("gap, nats"),
        Column("expected"),
        Column("own noise"),
        Column("KL, nats"),
        Column("top-1", "left"),
    ]
    largest = sorted(report.positions, key=lambda row: -row["gap"])[:SHOWN]
    rows = [
        [
            str(row["prompt"]),
            str(row["position"]),
            repr(row["piece"]),
            f"{row['gap']:.1e}",
            f"{row['expected']:.1e}",
            "-" if row["noise"] is None else f"{row['noise']:.1e}",
            f"{row['kl']:.1e}",
            "same" if row["same_top1"] else "differs",
        ]
        for row in sorted(largest, key=lambda row: (row["prompt"], row["position"]))
    ]
    n = len(report.positions)
    title = f"{report.resolved['engine']} against float64, the {len(rows)} largest gaps of {n}"
    out.table(title, columns, rows)
    out.verdict(report.right, report.conclusion)


def draw(report: ServedReport, path: Path) -> bool:
    """The plot of the gap by position, a panel a prompt, beside what rounding explains -> whether
    there is something to draw."""
    from kvtool.ui.noise_plot import ArmSeen, Words, noise_plot

    faults = [times for name, times in report.controls.items() if name.startswith("a token")]
    fault = min(faults) * report.pooled("expected") if faults else None
    panels = []
    for number in dict.fromkeys(row["prompt"] for row in report.positions):
        rows = [row for row in report.positions if row["prompt"] == number]
        gaps = [(row["position"], row["gap"]) for row in rows]
        expected = [(row["position"], max(row["expected"], row["noise"] or 0.0)) for row in rows]
        panels.append(ArmSeen(f"prompt {number + 1}", report.verdict, gaps, expected, fault))
    title = f"{report.resolved['served']}, {report.resolved['engine']} against float64"
    words = Words("rounding", "a wrong token", "server against float64")
    return noise_plot(path, panels, title, words)
