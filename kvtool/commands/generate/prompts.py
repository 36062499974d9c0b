"""Where generate finds its prompts: an option, a file, lines of a file, or stdin."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvtool.errors import CapacityError, UsageError
from kvtool.reading import read_text
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.commands.generate.settings import Settings
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.decoding.generation import Generator
    from kvtool.core.text.chat import Piece
    from kvtool.core.text.tokenizer import Tokenizer

MAX_INPUT_BYTES = 2**26  # bytes of all prompts
MAX_LINES = 1_000_000
LONGEST_PROMPT = 2**24  # characters; the longest contexts hold a million tokens
MAX_NAMED = 5  # unknown pieces, blank lines, special tokens
LAST_LINE_END = re.compile(r"(\r\n|\r|\n)\Z")
LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines would also split at form feeds and others


@dataclass
class Prompts:
    """The texts to start from; `lines` if each stood on a line of its own, some perhaps blank."""

    texts: list[str]
    lines: bool
    where: str  # for errors
    end: str = ""  # of the one text, which is no part of the prompt

    def by_line(self) -> Prompts:
        """Each line of the one text as a text. Raises UsageError if all are blank."""
        return _lines(self.texts[0] + self.end, self.where)

    def is_blank(self, index: int) -> bool:
        """Whether a prompt is blank, which only a line of several may be."""
        return self.lines and not self.texts[index].strip()


def read_prompts(prompt: str | None, prompt_file: Path | None, input_file: Path | None) -> Prompts:
    """Find the prompts. Raises UsageError where there are none, FileError for a bad file."""
    if input_file is not None:
        text = read_text(input_file, "a file of prompts", "--input", most=MAX_INPUT_BYTES)
        return _lines(text, str(input_file))
    if prompt is not None:
        return Prompts([prompt], False, "--prompt")
    if prompt_file is not None:
        text = read_text(prompt_file, "a prompt", "--prompt-file", most=MAX_INPUT_BYTES)
        require_length(text, str(prompt_file))
        return Prompts([non_empty(text, str(prompt_file))], False, str(prompt_file))
    # A line break at the end is from `echo`; one in a file was put there.
    given = read_stdin()
    text = non_empty(LAST_LINE_END.sub("", given), "stdin")
    require_length(text, "stdin")
    return Prompts([text], False, "stdin", end=given[len(text) :])


def encode_all(
    prompts: Prompts,
    chats: list[list[Piece]] | None,
    loaded: Checkpoint,
    generator: Generator,
    settings: Settings,
) -> list[list[int]]:
    """Token ids of every prompt, or of it as a chat template wrote it; [] of a blank line.

    Raises CapacityError for one that does not fit.
    """
    reader, spelled = loaded.source_tokenizer or loaded.tokenizer, settings.special_tokens
    encoded: list[list[int]] = []
    for index, text in enumerate(prompts.texts):
        if prompts.is_blank(index):
            encoded.append([])
            continue
        ids = reader.encode_pieces(chats[index]) if chats else reader.encode(text, spelled)
        try:
            generator.require_fit(ids, text, index)
        except CapacityError as error:
            if settings.input_file is None or loaded.source_tokenizer is not None:
                raise
            where = f"{settings.input_file}: line {index + 1}"
            raise CapacityError(f"{where}: {error.message}", error.hint) from error
        encoded.append(ids)
    return encoded


def _lines(text: str, where: str) -> Prompts:
    lines = lines_of(text)
    if not any(line.strip() for line in lines):
        plural = "" if len(lines) == 1 else "s"
        found = f"{len(lines):,} blank line{plural}" if lines else "no line"
        raise UsageError(f"{where}: holds no prompt (found {found})")
    if len(lines) > MAX_LINES:
        raise UsageError(f"{where}: holds {len(lines):,} lines (expected {MAX_LINES:,} or fewer)")
    for number, line in enumerate(lines, start=1):
        require_length(line, f"{where}: line {number:,}")
    return Prompts(lines, True, where)


def require_length(text: str, where: str) -> None:
    """Raise UsageError for a prompt that is longer than any model's context."""
    if len(text) > LONGEST_PROMPT:
        raise UsageError(
            f"{where}: has {len(text):,} characters (expected {LONGEST_PROMPT:,} or fewer)"
        )


def note_blank(prompts: Prompts, out: Output) -> None:
    """Say which lines have no prompt; a blank line stands for each in the results."""
    blank = [i + 1 for i in range(len(prompts.texts)) if prompts.is_blank(i)]
    if blank:
        lines = "line" if len(blank) == 1 else "lines"
        shown = ", ".join(f"{i:,}" for i in blank[:MAX_NAMED])
        more = f" and {len(blank) - MAX_NAMED:,} more" if len(blank) > MAX_NAMED else ""
        out.note(f"{prompts.where}: {lines} {shown}{more} blank, and so in the results")


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
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise UsageError(f"stdin: has more than {MAX_INPUT_BYTES:,} bytes (expected prompts)")
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
    """Warn of pieces of the prompts outside the vocabulary."""
    found = list(dict.fromkeys(piece for text in texts for piece in tokenizer.unknown(text)))
    if found:
        more = f" and {len(found) - MAX_NAMED:,} more" if len(found) > MAX_NAMED else ""
        out.warn(f"not in the vocabulary: {', '.join(map(repr, found[:MAX_NAMED]))}{more}")
