"""The settings of generate, and which of its options contradict or need each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvtool.config import LENGTH_PENALTY, GenerateConfig, RunConfig, check_int
from kvtool.ui.documents import check_writable
from kvtool.ui.option_rules import contradicts, needs, require

SEARCH = (
    needs("--beams", "--length-penalty", "It ranks their results.", "needs --beams 2 or more"),
)
PROMPTS = (
    needs("--chat", "--system", "It is a message of a conversation."),
    contradicts("--prompt-file", "--prompt", "Give one of them."),
    contradicts("--input", "--prompt --prompt-file", "Give one of them."),
)
CACHE_FILES = (
    contradicts("--input", "--save-cache --load-cache", "It serves one prompt."),
    contradicts("--beams", "--save-cache --load-cache", "It serves one prompt."),
)
DRAWING = (
    needs(
        "--attention-plot",
        "--attention-layer",
        "Give --attention-plot FILE as well.",
        "nothing is drawn",
    ),
)


@dataclass(frozen=True)
class Settings:
    """All settings of generate; None: the kind of model decides."""

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

    @property
    def how(self) -> GenerateConfig:
        """The settings that decide how tokens are chosen."""
        return GenerateConfig(
            self.max_tokens, self.temperature, self.top_k, self.top_p, self.cache, self.kernels,
            self.beams, self.length_penalty, self.n_best, self.run.seed,
        )  # fmt: skip

    @property
    def given(self) -> dict[str, object]:
        """The given options, for the rules."""
        return {
            "--system": self.system is not None,
            "--chat": self.chat,
            "--prompt": self.prompt is not None,
            "--prompt-file": self.prompt_file,
            "--input": self.input_file,
            "--beams": self.beams > 1,
            "--save-cache": self.save_cache,
            "--load-cache": self.load_cache,
            "--attention-plot": self.attention_plot,
            "--attention-layer": self.attention_layer is not None,
        }

    def __post_init__(self) -> None:
        _ = self.how  # whose values are checked as it is made
        require(PROMPTS, self.given)
        for flag, path in (
            ("--output", self.text_file),
            ("--attention-plot", self.attention_plot),
            ("--save-cache", self.save_cache),
        ):
            if path is not None:
                check_writable(path, flag)
        require(CACHE_FILES, self.given)
        if self.attention_layer is not None:
            check_int("--attention-layer", self.attention_layer, 1)
        require(DRAWING, self.given)
