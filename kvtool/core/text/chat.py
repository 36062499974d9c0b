"""Chat templates: the format in which a checkpoint expects a conversation.

A folder of Hugging Face has a Jinja template in a file of its own or in tokenizer_config.json. The
template is rendered as in transformers, by `chat_worker` in a process with limits. This file
imports no torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtool.errors import FileError, KvtoolError, UsageError
from kvtool.reading import parse_json, read_json_object, read_text, short

TEMPLATE, CONFIG, LEGACY = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
TOKENS = "special_tokens_map.json"  # of older folders
WORKER = Path(__file__).with_name("chat_worker.py")
SECONDS = 2  # of CPU time, for up to a thousand conversations
WAIT_SECONDS = 120  # of real time, since a busy machine may delay the process
NBYTES = 1 << 29
CHARACTERS = 1 << 20  # of one rendered text, beyond the messages themselves
MAX_TEMPLATE_BYTES = 1 << 22  # bytes; the longest real templates have a hundredth of it
DEFAULT = "default"
REASONS = {
    "time": "takes more than {seconds} s of processor time",
    "slow": "is not done after {seconds} s",
    "memory": f"takes more than {NBYTES >> 20} MiB of memory",
    "long": f"writes more than {CHARACTERS:,} characters",
    "deep": "calls itself too often",
    "failed": "cannot write this conversation",
    "nothing": "writes nothing for this conversation",
    "ended": "ended the process that rendered it",
}
PASSED_ON = ("TZ", "LD_LIBRARY_PATH")  # for the local time, and for libraries of Python itself

Message = dict[str, str]  # role and content
Piece = tuple[str, bool]  # a text, and whether it is plain text without special tokens


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, the special tokens that it may name, and its file."""

    source: str
    variables: Mapping[str, str]
    path: Path


def read_template(folder: Path) -> ChatTemplate:
    """The template of a checkpoint's folder: chat_template.jinja, else in tokenizer_config.json.

    The order is that of transformers. Raises FileError for a damaged template, and UsageError if
    there is none.
    """
    config = _object(folder / CONFIG, "settings of a tokenizer")
    variables = _named_tokens(folder, config)
    if os.path.lexists(folder / TEMPLATE):
        path = folder / TEMPLATE
        found = read_text(path, "a chat template", most=MAX_TEMPLATE_BYTES)
        return ChatTemplate(found, variables, path)
    legacy = _object(folder / LEGACY, "a chat template")
    for path, data in ((folder / CONFIG, config), (folder / LEGACY, legacy)):
        if data.get("chat_template") is not None:
            return ChatTemplate(_chosen(path, data["chat_template"]), variables, path)
    raise UsageError(
        f"--chat: {folder} has no chat template (neither {TEMPLATE} nor one in {CONFIG})",
        "Leave --chat out, or take an instruct model, which brings one.",
    )


def _object(path: Path, what: str) -> dict[str, Any]:
    return read_json_object(path, what) if os.path.lexists(path) else {}


def _chosen(path: Path, found: Any) -> str:
    """The template, or the one called default if the file has several."""
    if isinstance(found, str):
        return found
    try:
        names = [str(entry["name"]) for entry in found]
        texts = [entry["template"] for entry in found if entry["name"] == DEFAULT]
    except (TypeError, KeyError):
        raise FileError(f"{path}: chat_template is neither a text nor a list of them") from None
    if len(texts) > 1:
        raise FileError(f"{path}: chat_template has {len(texts)} texts called {DEFAULT}")
    if not texts or not isinstance(texts[0], str):
        there = short(", ".join(names) or "none")
        raise FileError(f"{path}: chat_template has no text called {DEFAULT} (found {there})")
    return texts[0]


def _named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a template by name: bos_token, eos_token and others."""
    data = dict(config)
    if "added_tokens_decoder" not in config:  # as in transformers: then the older file counts
        data.update(_object(folder / TOKENS, "special tokens"))
    extra = data.get("extra_special_tokens")
    named = {name: value for name, value in data.items() if name.endswith("_token")}
    named.update(extra if isinstance(extra, dict) else {})
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def conversation(text: str, system: str | None) -> list[Message]:
    """The messages of a prompt: the system message if there is one, then `text` by the user."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def render(
    template: ChatTemplate, conversations: Sequence[Sequence[Message]], specials: Sequence[str] = ()
) -> list[list[Piece]]:
    """Render each conversation by the template, up to the beginning of the answer.

    If a message contains one of `specials`, that part becomes a piece marked as plain text. So a
    message cannot end itself or begin another. Raises UsageError for a template that refuses a
    conversation, fails, or exceeds its limits of time, memory or length.
    """
    said = [message["content"] for messages in conversations for message in messages]
    opening, closing = _unused_pair([template.source, *template.variables.values(), *said])
    spelled = re.compile(
        "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)"
    )
    marked = [
        [
            {**message, "content": spelled.sub(rf"{opening}\g<0>{closing}", message["content"])}
            for message in messages
        ]
        for messages in conversations
    ]
    texts = _render_elsewhere(template, marked, sum(map(len, said)))
    # A template may cut a text between two marks: then drop the mark that is left.
    marks = re.compile(f"{opening}([^{opening}{closing}]*){closing}|[{opening}{closing}]")
    return [_pieces(marks.split(text)) for text in texts]


def _unused_pair(texts: Sequence[str]) -> tuple[str, str]:
    """Two private-use characters that occur in none of the texts."""
    used = set().union(*texts)
    free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
    found = list(zip(free, free, strict=False))
    if not found:
        raise UsageError("the prompt has every character for private use", "Take one out.")
    return found[0]


def _pieces(split: Sequence[str | None]) -> list[Piece]:
    return [(text, i % 2 == 1) for i, text in enumerate(split) if text]


def _render_elsewhere(
    template: ChatTemplate, conversations: Sequence[Sequence[Message]], n_said: int
) -> list[str]:
    """The texts from chat_worker. Ctrl-C, SIGTERM and any error here end its process."""
    seconds = seconds_for(len(conversations))
    asked = {
        "path": [_package_folder("jinja2"), _package_folder("markupsafe")],
        "source": template.source,
        "variables": dict(template.variables),
        "conversations": conversations,
        "seconds": seconds,
        "nbytes": NBYTES + 64 * n_said,
        "characters": CHARACTERS + 10 * n_said,
    }
    try:
        code, output = _run_worker(json.dumps(asked).encode())
    except subprocess.TimeoutExpired:
        raise refusal(template, "slow", WAIT_SECONDS) from None
    try:
        found = _answer(output, len(conversations))
    except ValueError:
        why = "time" if code == -signal.SIGXCPU else "ended"
        raise refusal(template, why, seconds) from None
    if not isinstance(found, dict):
        return found
    error = refusal(template, found["error"], seconds, found["said"])
    if conversations[0][0]["role"] == "system" and "system" in error.message.lower():
        raise UsageError(error.message, "Leave --system out.")
    raise error


def _answer(output: bytes, n: int) -> list[str] | dict[str, str]:
    """The worker's output: `n` texts, or an error. Raises ValueError if it is neither, since then
    the template wrote it."""
    found = parse_json(output)
    match found:
        case {"texts": [*texts]} if len(texts) == n and all(isinstance(t, str) for t in texts):
            return texts
        case {"error": str(error), "said": str(said)} if error in REASONS:
            return {"error": error, "said": said}
    raise ValueError("the worker answered otherwise")


def _run_worker(data: bytes) -> tuple[int, bytes]:
    """Run the worker in a new interpreter, which ends with this call -> exit code and output."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in PASSED_ON if name in os.environ},
        cwd="/",
    ) as process:
        try:
            output, _ = process.communicate(data, WAIT_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process.returncode, output


def seconds_for(n_conversations: int) -> int:
    """The CPU time, in seconds, that a template may take."""
    return SECONDS + n_conversations // 1000


def _package_folder(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise KvtoolError(f"--chat: needs the package {name}", f"pip install {name}")
    return str(Path(spec.origin).parent.parent)


def refusal(template: ChatTemplate, why: str, seconds: int = 0, said: str = "") -> UsageError:
    """The error for a template that could not be used; `why` is a key of REASONS."""
    reason = REASONS[why].format(seconds=seconds)
    if why == "failed" and said.strip():
        reason += f" ({said.rstrip('. ')})"
    return UsageError(
        f"--chat: the template in {template.path} {reason}",
        "Leave --chat out, and write the prompt as the model expects it.",
    )
