"""kvtool evaluate: the scores of a saved model on pairs, or its perplexity on a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool.commands.generate.prompts import warn_unknown
from kvtool.commands.generate.results import one_line
from kvtool.commands.train.report import cell, score_columns
from kvtool.config import LENGTH_PENALTY, GenerateConfig, RunConfig, check_int
from kvtool.ending import End, Ended, until_ended
from kvtool.errors import FileError, UsageError
from kvtool.files import write_durable
from kvtool.reading import read_text
from kvtool.ui import options as o
from kvtool.ui.documents import check_writable
from kvtool.ui.option_rules import Rule, needs, require
from kvtool.ui.output import Output, present

if TYPE_CHECKING:
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.decoding.beam import Beam, Hypothesis

PAIRS, TEXT = "Pairs (encoder-decoders)", "Text (decoders)"
MAX_CONTEXT = 1024  # of a window, unless asked for more: the work grows with its square
SEPARATOR = " ||| "
BAR = "&#124;"  # as Moses writes a bar that is part of a text
RULES: tuple[Rule, ...] = (
    needs("--beams", "--length-penalty", "It ranks their results.", "needs --beams 2 or more"),
    needs("--hypotheses", "--n-best", "They are written there."),
)


@dataclass(frozen=True)
class Settings:
    """Everything that evaluate was asked for."""

    data: str
    run: RunConfig
    beams: int = 1
    length_penalty: float | None = None  # None: LENGTH_PENALTY
    n_best: int = 1
    hypotheses: Path | None = None
    context: int | None = None  # None: the model's, MAX_CONTEXT at most

    def __post_init__(self) -> None:
        require(RULES, self.of_pairs)
        if not self.data:
            raise UsageError("--data: is missing", "Give a text, or pairs: source TAB target.")
        penalty = LENGTH_PENALTY if self.length_penalty is None else self.length_penalty
        GenerateConfig(beams=self.beams, length_penalty=penalty, n_best=self.n_best)
        if self.context is not None:
            check_int("--context", self.context, 2)  # one token predicts nothing
        if self.hypotheses is not None:
            check_writable(self.hypotheses, "--hypotheses")

    @property
    def of_pairs(self) -> dict[str, bool]:
        """The options that only pairs take, and whether they were given."""
        return {
            "--beams": self.beams > 1,
            "--length-penalty": self.length_penalty is not None,
            "--n-best": self.n_best > 1,
            "--hypotheses": self.hypotheses is not None,
        }


@dataclass
class EvaluateReport:
    """The scores, and what was made of each source."""

    scores: list[dict[str, Any]]
    unit: str  # what was evaluated: "sources" or "tokens"
    count: int
    seconds: float
    resolved: dict[str, Any] = field(default_factory=dict)
    total: int = 0  # how much there was to evaluate
    ended: End | None = None  # by what, so that the scores are of a part

    @property
    def exit_code(self) -> int:
        """0, or that of a signal."""
        return 0 if self.ended is None else self.ended.exit_code

    @property
    def conclusion(self) -> str:
        """How much was evaluated, and how fast; what ended it."""
        return "; ".join(said for said in (self.speed, self.ended_text) if said)

    @property
    def speed(self) -> str:
        """How much was evaluated, and how fast."""
        rate = self.count / self.seconds
        what = self.unit if self.count != 1 else self.unit.removesuffix("s")
        return f"{self.count:,} {what} in {self.seconds:.1f} s ({rate:,.0f} {self.unit}/s)"

    @property
    def ended_text(self) -> str:
        """What the scores are of because a signal ended the run; "" if none did."""
        if self.ended is None:
            return ""
        part = "shortest" if self.unit == "sources" else "first"
        left = f"of the {part} {self.count:,} of {self.total:,} {self.unit} alone"
        return f"{self.ended.value}, so the scores are {left}"

    def rows(self) -> list[dict[str, Any]]:
        """The scores."""
        return self.scores

    def to_dict(self) -> dict[str, Any]:
        """What the document says."""
        return {**vars(self), "exit_code": self.exit_code, "conclusion": self.conclusion}


@dataclass(frozen=True)
class Evaluated:
    """What one model scored on one file."""

    row: dict[str, Any]
    total: int  # sources or tokens that there were; the row has how many of them are scored
    ended: End | None


def run(settings: Settings, out: Output) -> EvaluateReport:
    """Decode and score pairs with an encoder-decoder; predict a text with a decoder. What a signal
    leaves is scored, if it is anything."""
    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.machine import prepare

    device, dtype = prepare(settings.run)
    if settings.context is not None:
        checkpoint.require_context(settings.run.model, "--context", settings.context)
    loaded = checkpoint.load(settings.run.model, device, dtype)
    started = time.perf_counter()
    if loaded.source_tokenizer is not None:
        found = evaluate_pairs(settings, loaded, out)
    else:
        found = evaluate_text(settings, loaded, out)
    unit = "sources" if "sources" in found.row else "tokens"
    seconds = time.perf_counter() - started
    resolved = {**loaded.facts, "device": str(device)}
    n = found.row[unit]
    return EvaluateReport([found.row], unit, n, seconds, resolved, found.total, found.ended)


def evaluate_pairs(settings: Settings, loaded: Checkpoint, out: Output) -> Evaluated:
    """The scores of decoding all sources. Raises UsageError for an option that pairs do not take,
    and for libraries that are missing."""
    from kvtool.core.decoding.beam import Beam
    from kvtool.core.training.pairs import load_evaluation
    from kvtool.core.training.scoring import error_rate_name, require_libraries, score_outputs

    assert loaded.source_tokenizer is not None
    if settings.context is not None:
        raise UsageError("--context: is of decoders", "Leave it out: sources are read whole.")
    require_libraries("evaluate")
    name, pairs, notes = load_evaluation(settings.data)
    for note in notes:
        out.note(note)
    penalty = settings.length_penalty
    beam = Beam(settings.beams, LENGTH_PENALTY if penalty is None else penalty, settings.n_best)
    warn_unknown(loaded.source_tokenizer, [pair.source for pair in pairs], out)
    found, ended = decode_sources(loaded, [pair.source for pair in pairs], beam, out)
    texts = [loaded.tokenizer.decode(best[0].ids) for best in found if best]
    references = [pair.targets for pair, best in zip(pairs, found, strict=True) if best]
    score = score_outputs(loaded.tokenizer, references, texts)
    rate = error_rate_name(loaded.tokenizer, (text for pair in pairs for text in pair.targets))
    if (path := settings.hypotheses) is not None:
        lines = list(hypothesis_lines(settings.n_best, loaded.tokenizer.decode, found))
        out.later(lambda report, document: write_hypotheses(path, lines, out))
    row = {
        "data": name,
        "sources": score.n,
        "decoding": "greedy" if settings.beams == 1 else f"beam {settings.beams}",
        **score_columns(score, rate),
        "exact %": 100 * score.n_exact / score.n,
    }
    return Evaluated(row, len(pairs), ended)


def decode_sources(
    loaded: Checkpoint, texts: list[str], beam: Beam, out: Output
) -> tuple[list[list[Hypothesis]], End | None]:
    """The best targets of each source, and what ended the search before all had theirs: the others
    have none. Raises Ended if it ended before any had."""
    from kvtool.core.decoding.sources import search

    assert loaded.source_tokenizer is not None
    sources = loaded.source_tokenizer.encode_batch(texts)
    found: list[list[Hypothesis]] = [[] for _ in sources]

    def keep(rows: list[int], best: list[list[Hypothesis]]) -> None:
        for i, hypotheses in zip(rows, best, strict=True):
            found[i] = hypotheses
        bar.advance(len(rows))

    with out.progress("decoding", len(sources)) as bar, until_ended() as outcome:
        search(loaded.model, sources, beam, on_batch=keep)
    if outcome.how and not any(found):
        raise Ended(outcome.how)
    return found, outcome.how


def hypothesis_lines(
    n_best: int, decode: Callable[[list[int]], str], found: list[list[Hypothesis]]
) -> Iterator[str]:
    """The text made of each source, a line each; of several the n best as Moses writes them: the
    source's number from 0, the text, its log probability in nats, and the score that ranks it. A
    source that was not decoded has an empty line, or none in a list of the n best."""
    for number, ranked in enumerate(found):
        if n_best == 1 and not ranked:
            yield ""
        for one in ranked[:n_best]:
            text = one_line(decode(one.ids))
            if n_best == 1:
                yield text
                continue
            figures = [f"logprob= {one.log_prob:.4f}", f"{one.score:.4f}"]
            yield SEPARATOR.join([str(number), text.replace("|", BAR), *figures])


def write_hypotheses(path: Path, lines: list[str], out: Output) -> None:
    """Write the file of --hypotheses."""
    write_durable(path, "".join(f"{line}\n" for line in lines).encode())
    out.note(f"written to {path}")


def evaluate_text(settings: Settings, loaded: Checkpoint, out: Output) -> Evaluated:
    """How well each token of a text is predicted from those before it. Raises UsageError for an
    option that a text does not take, and FileError for a text with nothing to predict."""
    import torch

    from kvtool.core.text.tokenizer import require_room
    from kvtool.core.training.lm import LMScore, score_text
    from kvtool.core.training.pairs import CMUDICT

    for flag, given in settings.of_pairs.items():
        if given:
            raise UsageError(f"{flag}: is of encoder-decoders", "Leave it out: a text is read.")
    where = f"--data {settings.data}"
    if settings.data == CMUDICT:
        raise UsageError(f"{where}: is pairs (the model continues texts)", "Give a UTF-8 text.")
    text = read_text(Path(settings.data), "a text to evaluate on", "--data")
    require_room(where, text)
    context = settings.context or min(loaded.config.context, MAX_CONTEXT)
    ids = torch.tensor(loaded.tokenizer.encode(text), device=next(loaded.model.parameters()).device)
    if len(ids) < 2:
        raise FileError(
            f"{where}: leaves nothing to predict (tokens: {len(ids)}, expected 2 or more)"
        )
    n_done, total = 0, 0.0

    def keep(n_tokens: int, nats: float) -> None:
        nonlocal n_done, total
        n_done, total = n_done + n_tokens, total + nats
        bar.advance(n_tokens)

    with out.progress("predicting", len(ids) - 1) as bar, until_ended() as outcome:
        score_text(loaded.model, loaded.tokenizer, ids, context, keep)
    if outcome.how and not n_done:
        raise Ended(outcome.how)
    score = LMScore.of(loaded.tokenizer, ids[1 : n_done + 1], total)
    row = {
        "data": Path(settings.data).name,
        "context": context,
        "tokens": score.n_tokens,
        "nats/token": score.nats_per_token,
        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
        "bits/char": score.bits_per_char,
        "bits/byte": score.bits_per_byte,
    }
    return Evaluated(row, len(ids) - 1, outcome.how)


def require_data(model: str, data: str) -> None:
    """Raise FileError for a model or data that is not there, before torch is loaded."""
    from kvtool.core.training.pairs import CMUDICT, data_path

    named = None if data == CMUDICT else data_path(data)
    o.require_inputs(model, ("--data", named, "a text, or pairs"))


def show(report: EvaluateReport, out: Output) -> None:
    """The scores, the settings of those that have any, and how long it took."""
    names = [name for name in report.scores[0] if name != "signatures"]
    out.table("Scores", names, [[cell(row[name]) for name in names] for row in report.scores])
    for name, signature in report.scores[0].get("signatures", {}).items():
        out.text(f"{name}|{signature}")
    out.text(report.speed)
    if report.ended:
        out.warn(report.ended_text)


def command(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE|cmudict",
            help="For an encoder-decoder lines of source TAB target, or the test words of the "
            "embedded dictionary; for a decoder a UTF-8 text.",
        ),
    ] = "",
    beams: Annotated[
        int,
        typer.Option(
            "--beams", metavar="N", help="Search with N beams; 1 is greedy.", rich_help_panel=PAIRS
        ),
    ] = 1,
    length_penalty: Annotated[float | None, o.length_penalty(PAIRS)] = None,
    hypotheses: Annotated[
        Path | None,
        typer.Option(
            "--hypotheses",
            metavar="FILE",
            help="Write what was made of each source, a line each.",
            rich_help_panel=PAIRS,
        ),
    ] = None,
    n_best: Annotated[
        int,
        typer.Option(
            "--n-best",
            metavar="N",
            help="Write the N best of each with their scores, as Moses does: number ||| text ||| "
            "logprob= nats ||| score.",
            rich_help_panel=PAIRS,
        ),
    ] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="N",
            show_default=f"the model's, at most {MAX_CONTEXT:,}",
            help="Tokens of a window. Windows overlap by half.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    model: o.Model = "",
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    threads: o.Threads = 0,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    output_file: o.OutputFile = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Score a saved model: on pairs its decoded targets, on a text its perplexity.

    Targets of characters or symbols get error rates and exact matches; other text
    gets BLEU and chrF (sacreBLEU). A repeated source has several right targets.

      kvtool evaluate --model g2p-1x1 --data cmudict --beams 4

      kvtool evaluate --data text.txt --json
    """
    out = Output(as_json, output_file, quiet, verbose)
    settings = Settings(
        data,
        RunConfig(model, device, dtype, threads, seed),
        beams,
        length_penalty,
        n_best,
        hypotheses,
        context,
    )
    require_data(model, data)
    present("evaluate", settings, run, show, out)
