"""generate with instruct models: conversations, and prompts that spell special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtool.commands.generate.prompts import MAX_NAMED
from kvtool.errors import UsageError
from kvtool.reading import read_json_object
from kvtool.ui.options import utf8_text
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.commands.generate.settings import Settings
    from kvtool.core.checkpoint.checkpoint import Checkpoint
    from kvtool.core.text.chat import ChatTemplate, Piece

INSTRUCT = "Instruct models"

Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="The prompt is a user's message, and the model's own chat template is put around it.",
        rich_help_panel=INSTRUCT,
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        "--system",
        metavar="TEXT",
        show_default="the template's own",
        help="With --chat: the system message.",
        callback=utf8_text,
        rich_help_panel=INSTRUCT,
    ),
]
SpecialTokens = Annotated[
    bool,
    typer.Option(
        "--special-tokens",
        help="Where a prompt spells a special token, such as <|im_end|>, it is that token, and not "
        "text.",
        rich_help_panel=INSTRUCT,
    ),
]


def write_chats(
    folder: Path, texts: list[str], settings: Settings, out: Output
) -> list[list[Piece]]:
    """Each text as a user's message in the chat template of a checkpoint's folder.

    Needs no model, and so no torch. Raises UsageError and FileError.
    """
    from kvtool.core.text import chat

    template, specials = _template(folder)
    conversations = [chat.conversation(text, settings.system) for text in texts]
    written = chat.render(template, conversations, [] if settings.special_tokens else specials)
    for text, pieces in zip(texts, written, strict=True):
        if text.strip() and not any(piece for piece, _ in pieces):
            raise chat.refusal(template, "nothing")
        out.detail(f"as the template writes it: {''.join(text for text, _ in pieces)!r}")
    return written


def _template(folder: Path) -> tuple[ChatTemplate, list[str]]:
    """The template of a checkpoint, and the special tokens that a message must not spell."""
    from kvtool.core.text import chat
    from kvtool.core.text.tokenizer import Tokenizer

    if folder.is_file():
        from kvtool.core.checkpoint.gguf import tokens
        from kvtool.core.checkpoint.gguf.header import GGUFHeader

        header = GGUFHeader(folder)
        return tokens.read_template(header), tokens.read_tokenizer(header).special_tokens
    _refuse_pairs(folder)
    template = chat.read_template(folder)
    return template, Tokenizer.load(folder / "tokenizer.json").special_tokens


def _refuse_pairs(folder: Path) -> None:
    config = folder / "config.json"
    kind = read_json_object(config, "a configuration") if config.is_file() else {}
    if kind.get("model_type") == "kvtool-seq2seq":
        raise UsageError(
            f"--chat: {folder} is an encoder-decoder, which takes a source and not a conversation",
            "Leave --chat out.",
        )


def judge_special_tokens(
    loaded: Checkpoint, texts: list[str], settings: Settings, out: Output
) -> None:
    """Warn of parts of prompts that read like special tokens but are encoded as text. Raises
    UsageError for --special-tokens where there are none."""
    if loaded.source_tokenizer is not None:
        if settings.special_tokens:
            raise UsageError(
                f"--special-tokens: {loaded.path} is an encoder-decoder, whose sources have none",
                "Leave it out.",
            )
        return
    if settings.special_tokens and not loaded.tokenizer.special_tokens:
        raise UsageError(
            f"--special-tokens: the tokenizer of {loaded.path} has none", "Leave it out."
        )
    written = "\n".join([settings.system or "", *texts])
    found = loaded.tokenizer.special_tokens_in(written)
    if found and not settings.special_tokens:
        more = f" and {len(found) - MAX_NAMED:,} more" if len(found) > MAX_NAMED else ""
        out.note(
            f"encoded as text: {', '.join(found[:MAX_NAMED])}{more}; "
            "--special-tokens makes special tokens of them"
        )
