"""Models that Hugging Face's tools have put into their cache; nothing is ever downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvtool.errors import FileError
from kvtool.reading import read_text, short

REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
LONGEST_REFERENCE = 1000  # bytes
COMMIT = re.compile(r"[0-9a-f]{7,64}")


def offline() -> None:
    """Have Hugging Face's libraries download nothing, whatever a folder asks for; before they are
    imported."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"


def cache_folder() -> Path:
    """Where that cache is: HF_HUB_CACHE, or HF_HOME/hub, or ~/.cache/huggingface/hub.

    Raises FileError for a variable that begins with the home of nobody.
    """
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return _expanded(os.environ[variable], variable)
    if home := os.environ.get("HF_HOME"):
        return _expanded(home, "HF_HOME") / "hub"
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(general, "XDG_CACHE_HOME") / "huggingface" / "hub"


def _expanded(folder: str, variable: str) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        who = short(Path(folder).parts[0])
        raise FileError(
            f"{variable}={short(folder)}: there is no home folder for {who}",
            f"Set {variable} to a folder.",
        ) from error


def cached_snapshot(name: str) -> Path | None:
    """The folder of the newest main revision of `org/name` that is in the cache; None if the
    repository is not there, or `name` cannot be one.

    Raises FileError for a repository that is there without that revision.
    """
    # No "--", "..", or trailing ".": the hub allows none, and folders are named after the rest.
    if not REPOSITORY.fullmatch(name) or "--" in name or ".." in name or name.endswith("."):
        return None
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    if not os.path.isdir(folder):  # which also says no for a name that no folder can have
        return None
    reference = folder / "refs" / "main"
    hint = f"Complete it with: hf download {name}"
    try:
        commit = read_text(reference, "the name of a commit", most=LONGEST_REFERENCE).strip()
    except FileError:
        raise FileError(f"--model {name}: {reference} cannot be read", hint) from None
    if not COMMIT.fullmatch(commit):
        raise FileError(f"--model {name}: {reference} names no commit", hint)
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        raise FileError(f"--model {name}: {snapshot} is not in the cache", hint)
    return snapshot
