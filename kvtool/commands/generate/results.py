"""The results of generate, one for each prompt, and their rows and lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtool.commands.generate.settings import Settings
    from kvtool.core.decoding.generation import Continuation


@dataclass
class Result:
    """One prompt and its continuation."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    ended: bool  # by the model, not by --max-tokens
    rank: int = 1  # among the --n-best of a prompt
    log_prob: float = 0.0  # nats, of all new tokens by the model itself, however they were chosen
    score: float | None = None  # of beam search: log_prob with the length penalty
    number: int = 1  # of the prompt
    ids: list[int] = field(default_factory=list)  # of the new tokens, the end token included

    @classmethod
    def of(cls, prompt: str, ids: list[int], found: Continuation, number: int) -> Result:
        """The result of the `number`-th prompt, which has the tokens `ids`."""
        return cls(
            prompt, found.text, len(ids), len(found.ids), found.ended, found.rank,
            found.log_prob, found.score, number, found.ids,
        )  # fmt: skip

    def row(self) -> dict[str, Any]:
        """The result's row in a document."""
        return {name: value for name, value in vars(self).items() if name != "ids"}


@dataclass
class GenerateReport:
    """All results, in the order of the prompts."""

    results: list[Result]
    seconds: float
    tokens_per_second: float
    cache: str
    cache_bytes: int  # the largest, keys and values of a source included
    reused_tokens: int = 0  # of the prompt, from --load-cache
    exit_code: int = 0
    resolved: dict[str, Any] = field(default_factory=dict)  # the settings that were left open

    @property
    def conclusion(self) -> str:
        """The speed, and the memory of the cache."""
        n_new = sum(result.new_tokens for result in self.results)
        return (
            f"{n_new} tokens in {self.seconds:.2f} s ({self.tokens_per_second:,.0f} tokens/s), "
            f"{self.cache} cache: {self.cache_bytes / 2**20:.2f} MiB"
        )

    def rows(self) -> list[dict[str, Any]]:
        """The results without their tokens."""
        return [result.row() for result in self.results]

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        return {**vars(self), "results": self.rows(), "conclusion": self.conclusion}


def blank(number: int) -> Result:
    """The result of a blank line."""
    return Result("", "", 0, 0, False, number=number)


def lines_of_results(results: list[Result], settings: Settings) -> list[str]:
    """Each result as one line. Those of --n-best have their rank and score before the text, and the
    number of their prompt before these if there may be several; tabs between."""
    lines = []
    several = settings.input_file is not None or results[-1].number > 1
    for result in results:
        columns = [one_line(result.text)]
        if settings.n_best > 1 and result.score is not None:
            columns = [str(result.rank), f"{result.score:.4f}", *columns]
            columns = [str(result.number), *columns] if several else columns
        lines.append("\t".join(columns))
    return lines


def one_line(text: str) -> str:
    """`text` with line breaks and backslashes escaped, so that each result is one line."""
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")
