"""How a training run ended: its figures, and how they are shown."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.training.scoring import Score, TextScore
    from kvtool.core.training.train import Position


# What the figures of text are called; those of a target spelt in characters or symbols are rates.
TEXT_HEADINGS = {"bleu": "BLEU", "bleu_lc": "BLEU lc", "chrf": "chrF"}


@dataclass
class TrainReport:
    """How a run ended; figures of the best checkpoint are in `scores`, and `prompt` is a text that
    it can start from."""

    steps: int
    epochs: int
    tokens: int
    seconds: float
    parameters: int
    best_step: int
    best: Path
    sha256: str
    scores: list[dict[str, Any]]
    prompt: str
    exit_code: int = 0

    @classmethod
    def of(
        cls, at: Position, best: Checkpoint, scores: list[dict[str, Any]], prompt: str
    ) -> TrainReport:
        """The report of a run that ended at `at`."""
        parameters = sum(p.numel() for p in best.model.parameters())
        return cls(
            at.step, at.epoch, at.tokens, at.seconds, parameters, at.best_step, best.path,
            best.sha256, scores, prompt,
        )  # fmt: skip

    @property
    def resolved(self) -> dict[str, Any]:
        """The data of the scores."""
        return {"model": str(self.best), "sha256": self.sha256}

    @property
    def conclusion(self) -> str:
        """How long the run trained, and its best scores."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.steps:,} steps, {self.tokens:,} tokens in {self.seconds:,.0f} s "
            f"({rate:,.0f} tokens/s), {self.parameters:,} parameters; "
            f"best at step {self.best_step:,}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """The scores of the best checkpoint."""
        return self.scores

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        return {**vars(self), "conclusion": self.conclusion}


def score_columns(score: Score | TextScore, error_rate: str) -> dict[str, Any]:
    """The figures of a score by their headings, and their settings if they have any. error_rate:
    the name of the token error rate."""
    from kvtool.core.training.scoring import figures

    names = (
        TEXT_HEADINGS if score.signatures else {n: f"{n.upper()} %" for n in ("wer", error_rate)}
    )
    found = figures(score, error_rate)
    columns: dict[str, Any] = {heading: found[name] for name, heading in names.items()}
    if score.signatures:
        columns["signatures"] = {names[name]: text for name, text in score.signatures.items()}
    return columns


def cell(value: Any) -> str:
    """A value of a row, as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str("" if value is None else value)


def signatures(scores: list[dict[str, Any]]) -> list[str]:
    """The signature of each figure in sacreBLEU's form, and its data."""
    parts: dict[str, dict[str, None]] = {}
    for row in scores:
        for name, signature in row.get("signatures", {}).items():
            parts.setdefault(f"{name}|{signature}", {})[row["part"]] = None
    return [f"{signature} ({', '.join(of)})" for signature, of in parts.items()]


def show(report: TrainReport, out: Output) -> None:
    """The final table and where to find the model."""
    names = dict.fromkeys(name for row in report.scores for name in row if name != "signatures")
    rows = [[cell(row.get(name)) for name in names] for row in report.scores]
    out.table("best checkpoint", list(names), rows)
    for line in signatures(report.scores):
        out.text(line)
    out.text(report.conclusion)
    out.text(f"checkpoint: {report.best}", wrap=False)
    out.text(f"loss curve: {report.best.parent / 'loss.png'}", wrap=False)
    command = ["kvtool", "generate", "--model", str(report.best), "--prompt", report.prompt]
    out.hint(shlex.join(command))
