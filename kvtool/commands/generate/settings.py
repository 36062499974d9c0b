"""What generate was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvtool.config import RunConfig, check_float, check_int
from kvtool.errors import UsageError
from kvtool.ui.documents import check_writable

LENGTH_PENALTY = 0.6


@dataclass(frozen=True)
class Settings:
    """Everything that generate was asked for; None means that the kind of model decides."""

    run: RunConfig
    prompt: str | None
    prompt_file: Path | None
    input_file: Path | None
    max_tokens: int | None
    temperature: float | None
    top_k: int
    top_p: float
    cache: str
    kernels: str = "default"
    beams: int = 1
    length_penalty: float = LENGTH_PENALTY
    n_best: int = 1
    text_file: Path | None = None  # --output, if it is a .txt
    attention_plot: Path | None = None
    attention_layer: int | None = None  # None: the last
    save_cache: Path | None = None
    load_cache: Path | None = None
    chat: bool = False
    system: str | None = None  # None: what the template says
    special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_int("--max-tokens", self.max_tokens, 1)
        if self.temperature is not None:
            check_float("--temperature", self.temperature, 0.0)
        check_int("--top-k", self.top_k, 0)
        check_float("--top-p", self.top_p, 0.0, 1.0, open_low=True)
        check_int("--beams", self.beams, 1, 1000)
        check_float("--length-penalty", self.length_penalty, 0.0, 10.0)
        check_int("--n-best", self.n_best, 1)
        if self.system is not None and not self.chat:
            raise UsageError("--system: needs --chat", "It is a message of a conversation.")
        if self.n_best > self.beams:
            raise UsageError(
                f"--n-best: {self.n_best} of {self.beams} beams", "Give as many --beams at least."
            )
        if self.beams > 1 and (self.temperature or self.top_k or self.top_p < 1.0):
            flag = "--temperature" if self.temperature else "--top-k" if self.top_k else "--top-p"
            raise UsageError(f"{flag}: contradicts --beams", "Beam search draws nothing.")
        given = {
            "--prompt": self.prompt,
            "--prompt-file": self.prompt_file,
            "--input": self.input_file,
        }
        named = [flag for flag, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{named[0]}: contradicts {named[1]}", "Give one of them.")
        if self.text_file is not None:
            check_writable(self.text_file, "--output")
        if self.attention_plot is not None:
            check_writable(self.attention_plot, "--attention-plot")
        if self.save_cache is not None:
            check_writable(self.save_cache, "--save-cache")
        for flag, path in (("--save-cache", self.save_cache), ("--load-cache", self.load_cache)):
            other = "--input" if self.input_file is not None else "--beams"
            if path is not None and (self.input_file is not None or self.beams > 1):
                raise UsageError(f"{flag}: contradicts {other}", "It serves one prompt.")
        if self.attention_layer is not None:
            check_int("--attention-layer", self.attention_layer, 1)
            if self.attention_plot is None:
                raise UsageError(
                    "--attention-layer: nothing is drawn", "Give --attention-plot FILE as well."
                )
