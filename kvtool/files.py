"""Files that survive a crash, locks, and the folders of models. Imports no torch."""

from __future__ import annotations

import difflib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from kvtool.errors import FileError
from kvtool.folders import Folder, open_lock, write_at
from kvtool.hub import cache_folder, cached_snapshot
from kvtool.reading import nearest, opened

PACKAGE = Path(__file__).resolve().parent


def write_durable(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old file or the new one, never a part.

    As `write_at`, but through a symbolic link, whose target is replaced. Raises FileError.
    """
    target = Path(os.path.realpath(path))
    try:
        with Folder.at(target.parent) as folder:
            write_at(folder.handle, target.name, data)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror})") from error


def json_bytes(data: Any) -> bytes:
    """Indented JSON with a line break at its end. Raises ValueError on NaN."""
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def take_lock(path: Path, where: str, kind: str, folder: Folder | None = None) -> io.TextIOWrapper:
    """Open `path`, made if it is not there, so that no other process can until it is closed; in an
    open `folder` the file of that name. A link is not followed, and nothing is changed in the file.

    Raises FileError that begins with `where`, for a `kind`, a file say, that is in use.
    """
    import fcntl

    name, handle = (path, None) if folder is None else (path.name, folder.handle)
    lock = open_lock(name, where, handle)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = _holder(lock) or "unknown"
        lock.close()
        raise FileError(
            f"{where}: in use by pid {pid}", f"Wait for it, or use another {kind}."
        ) from error
    except OSError as error:
        lock.close()
        raise FileError(f"{where}: cannot be locked ({error.strerror})") from error
    if not _is_at(name, handle, lock):  # its last owner has removed it meanwhile
        lock.close()
        return take_lock(path, where, kind, folder)
    return lock


def _is_at(name: str | Path, folder: int | None, file: io.TextIOWrapper) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(name, dir_fd=folder))
    except FileNotFoundError:
        return False


def _holder(lock: io.TextIOWrapper) -> str:
    """The process that holds a lock: what it wrote into the file, or what the system knows."""
    lock.seek(0)
    written = lock.read(20).strip()
    if written.isdigit():
        return written
    end = f":{os.fstat(lock.fileno()).st_ino}"  # devices are numbered in another way on some disks
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return ""
    fields = (line.split() for line in lines)
    found = [f[4] for f in fields if len(f) > 5 and f[1] == "FLOCK" and f[5].endswith(end)]
    return next((pid for pid in found if int(pid) > 0), "")


# --- what runs and benchmarks are called

LOCK, RUN, LOG, PLOT, EVENTS = ".lock", "run.json", "log.jsonl", "loss.png", "tensorboard"
CHECKPOINTS = BEST, LAST = "best", "last"
STATE = re.compile(r"state-(\d{9})-([0-9a-f]{16})\.pt")
SAVED = (".benchmarks", "kvtool")  # where bench keeps runs: folders below the one that one is in
NAME = re.compile(r"[\w.-]+")


def is_of_run(path: Path, run: Path) -> bool:
    """Whether what is, or would be, at `path` is what training writes into the folder of a run."""
    try:
        inside = Path(os.path.realpath(path)).relative_to(os.path.realpath(run))
    except ValueError:
        return False
    first = inside.parts[0] if inside.parts else ""
    own = (LOCK, RUN, LOG, PLOT, EVENTS, *CHECKPOINTS)
    return first in own or bool(STATE.fullmatch(first))


def saved_run(text: str) -> Path:
    """The file of a benchmark by its name, or by its path."""
    path = Path(text)
    return Path(*SAVED, f"{text}.json") if NAME.fullmatch(text) and not path.is_file() else path


# --- models


def weights_folder() -> Path:
    """Where the shipped models are: in an installed wheel, or beside the package in a checkout."""
    inside = PACKAGE / "weights"
    return inside if inside.is_dir() else PACKAGE.parent / "weights"


def shipped_models() -> list[str]:
    """The names that --model takes besides a path."""
    folder = weights_folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file())


DEFAULT_MODEL = "shakespeare-2l"
CHECKPOINT_FOLDER = (
    "A checkpoint is a folder with config.json, model.safetensors and tokenizer.json, or a GGUF "
    "file."
)
GGUF, MAGIC = ".gguf", b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, or is called so: then reading it says what it is instead."""
    if path.suffix.lower() == GGUF:
        return path.is_file()
    try:
        with opened(path, "a model") as file:
            return file.read(4) == MAGIC
    except FileError:
        return False


def _gguf_within(folder: Path) -> Path:
    """A folder of a checkpoint, or the one GGUF file in it. Raises FileError for several."""
    if (folder / "config.json").exists():
        return folder
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise FileError(f"--model {folder}: cannot be read ({error.strerror})") from error
    found = [entry for entry in entries if entry.suffix.lower() == GGUF and entry.is_file()]
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found[:4])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise FileError(
            f"--model {folder}: holds {len(found)} GGUF files ({names}{more})", "Name one of them."
        )
    return found[0] if found else folder


def model_folder(name: str) -> Path:
    """The folder of a checkpoint, or its GGUF file: `name` as a shipped model, as a path, or as a
    repository that is in Hugging Face's cache. Raises FileError."""
    name = name or DEFAULT_MODEL
    if name in shipped_models():  # whatever lies where the user stands: that is ./name
        return weights_folder() / name
    path = Path(name)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"--model {name[:60]}: cannot be opened ({reason})") from error
    if not path.exists():
        snapshot = cached_snapshot(name)
        if snapshot is None:
            raise _no_model(name, path)
        return _gguf_within(snapshot)
    if (path / "best" / "config.json").is_file() and not (path / "config.json").exists():
        raise FileError(
            f"--model {name}: is the folder of a run (expected a checkpoint)",
            f"Give its best: {path / 'best'}.",
        )
    if path.is_dir():
        return _gguf_within(path)
    if not is_gguf(path):
        raise FileError(
            f"--model {name}: is a file (expected a checkpoint folder, or GGUF)",
            CHECKPOINT_FOLDER,
        )
    return path


def _no_model(name: str, path: Path) -> FileError:
    known = shipped_models()
    if close := difflib.get_close_matches(name.lower(), known, n=1):
        return FileError(f"--model {name}: not found", f"Did you mean {close[0]}?")
    if name.count("/") == 1 and not path.parent.exists():  # as the hub names repositories
        return FileError(
            f"--model {name}: is neither a folder nor in the cache {cache_folder()}",
            f"kvtool downloads nothing; if it is on the hub: hf download {name}",
        )
    hint = nearest(path) or f"Give a folder, or one of: {', '.join(known)}."
    return FileError(f"--model {name}: not found", hint)
