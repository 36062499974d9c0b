"""Where generate finds its prompts: an option, a file, lines of a file, or stdin."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvtool.errors import UsageError
from kvtool.files import read_text
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.core.text import Tokenizer

MOST_NAMED = 5  # unknown pieces
LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines would also split at form feeds and others


@dataclass
class Prompts:
    """The texts to start from; `lines` if each stood on a line of its own."""

    texts: list[str]
    lines: bool


def read_prompts(prompt: str | None, prompt_file: Path | None, input_file: Path | None) -> Prompts:
    """Find the prompts. Raises UsageError where there are none, FileError for a bad file."""
    if input_file is not None:
        lines = lines_of(read_text(input_file, "a file of prompts", "--input"))
        empty = next((i for i, line in enumerate(lines, start=1) if not line), None)
        if empty is not None:
            raise UsageError(f"{input_file}: line {empty}: is empty (expected a prompt)")
        if not lines:
            raise UsageError(f"{input_file}: holds no line (expected prompts)")
        return Prompts(lines, lines=True)
    if prompt is not None:
        return Prompts([prompt], lines=False)
    if prompt_file is not None:
        text = read_text(prompt_file, "a prompt", "--prompt-file")
        return Prompts([non_empty(text.removesuffix("\n"), str(prompt_file))], lines=False)
    return Prompts([non_empty(read_stdin().removesuffix("\n"), "stdin")], lines=False)


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends."""
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def read_stdin() -> str:
    """The text on stdin. Raises UsageError on a terminal, or for bytes that are not UTF-8."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "--prompt: is missing (stdin is a terminal)",
            "Give --prompt TEXT or --prompt-file FILE, or pipe a text in.",
        )
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise UsageError(f"stdin: is not UTF-8 ({found})", "Convert it to UTF-8.") from error


def non_empty(text: str, where: str) -> str:
    """Raise UsageError for an empty prompt."""
    if not text:
        raise UsageError(f"{where}: is empty (expected a prompt)")
    return text


def warn_unknown(tokenizer: Tokenizer, texts: list[str], out: Output) -> None:
    """Name what the model cannot read of the prompts."""
    found = list(dict.fromkeys(piece for text in texts for piece in tokenizer.unknown(text)))
    if found:
        more = f" and {len(found) - MOST_NAMED:,} more" if len(found) > MOST_NAMED else ""
        out.warn(f"not in the vocabulary: {', '.join(map(repr, found[:MOST_NAMED]))}{more}")
