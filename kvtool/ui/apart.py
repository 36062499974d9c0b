"""Checks that no output of a command is one of its inputs, or another of its outputs.

Every option that names a file or folder is in one of the two tables here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvtool.errors import FileError, UsageError
from kvtool.files import is_of_run, model_folder, saved_run
from kvtool.reading import read_json_object

# Of a model's folder, what one of the programs that load it reads.
OF_A_MODEL = (
    "*config.json", "*.index.json", "model*.safetensors", "pytorch_model*.bin", "model.pt",
    "tokenizer*", "source.json", "target.json", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.*", "spiece.model", "reference.safetensors",
)  # fmt: skip
FILES = "--output"  # may name several, a flag before each: a shell makes many names of r.*
RUN = "--out"  # a folder, of which training writes some entries


def _one(value: Any) -> list[Path]:
    return [Path(value)] if isinstance(value, (str, Path)) else list(map(Path, value))


def _of_model(value: Any) -> list[Path]:
    """The files in a model's folder that are read, and the shards that an index names."""
    found: list[Path] = []
    with contextlib.suppress(FileError, OSError, RuntimeError, ValueError):  # loading it says why
        if Path(str(value)).is_file():  # a GGUF file, or a config.json alone
            return _one(value)
        folder = model_folder(str(value))
        if folder.is_file():
            return [folder]
        entries = sorted(folder.iterdir())
        found = [e for e in entries if any(fnmatch(e.name, known) for known in OF_A_MODEL)]
        for index in [entry for entry in found if entry.name.endswith(".index.json")]:
            shards = read_json_object(index, "an index of weights").get("weight_map")
            names = list(shards.values()) if isinstance(shards, dict) else []
            found += [entry for entry in entries if entry.name in names and entry not in found]
    return found


READ: dict[str, Callable[[Any], list[Path]]] = {
    "--model": _of_model,
    "--target": lambda value: _one(str(value).rpartition(":")[0]),
    "--compare": lambda value: [saved_run(str(value))],
    "--data": _one,
    "--valid": _one,
    "--test": _one,
    "--input": _one,
    "--prompt-file": _one,
    "--prompts": _one,
    "model": _one,  # an argument: the file to promote
    "--text": _one,
    "--reference": _one,
    "--load-cache": _one,
}
WRITTEN: dict[str, Callable[[Any], list[Path]]] = {
    "--output": _one,
    "--plot": _one,
    "--attention-plot": _one,
    "--hypotheses": _one,
    "--save-cache": _one,
    "--save-reference": _one,
    "--resume": _one,  # a file; of training it is a switch
    "--save": lambda value: [saved_run(str(value))],
}
# These are read whole before they are replaced, by what they held and more, or by what the user
# asks to compare with the next time.
IN_PLACE = ({"--save-cache", "--load-cache"}, {"--save", "--compare"})


def check_apart(given: Mapping[str, Any]) -> None:
    """Refuse to write over a file that the same command reads, keeps results in or writes already.

    given: what options name, those of the tables among them; the same file may be named by other
    paths and links. Raises UsageError.
    """
    named = {f: v for f, v in given.items() if isinstance(v, (str, Path)) or (v and f == FILES)}
    written = {flag: WRITTEN[flag](named[flag]) for flag in WRITTEN if flag in named}
    if not written and RUN not in named:
        return
    read = {flag: READ[flag](named[flag]) for flag in READ if flag in named}
    for flag, paths in written.items():
        for i, path in enumerate(paths):
            for other, others in {**read, **written}.items():
                if {flag, other} in IN_PLACE:
                    continue
                if any(_same(path, one) for one in (others if other != flag else paths[:i])):
                    raise _lost(flag, path, other, "a" if other == "--model" else "the")
    for flag, paths in {**read, **written}.items():
        for path in paths:
            if RUN in named and is_of_run(path, Path(named[RUN])):
                raise _lost(flag, path, RUN, "a")


def _lost(flag: str, path: Path, other: str, article: str) -> UsageError:
    return UsageError(
        f"{flag} {path}: is {article} file of {other} too, which would be lost",
        "Give another file.",
    )


def _same(one: Path, other: Path) -> bool:
    """Whether both are one regular file, which need not be there yet; a terminal can take both."""
    try:
        if one.exists() and not one.is_file():
            return False
        same = os.path.realpath(one) == os.path.realpath(other)
        return same or (one.exists() and other.exists() and one.samefile(other))
    except (OSError, ValueError):  # opening it refuses it
        return False


def named(params: Iterator[Any] | list[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What the options of a command were given, by their first names; the default model too."""
    return {
        param.opts[0]: values.get(param.name)
        for param in params
        if param.opts[0] in (RUN, *READ, *WRITTEN) and not getattr(param, "is_flag", False)
    }
