"""Files that survive a crash, and paths that are what they claim to be. Imports no torch."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from kvtool.errors import FileError
from kvtool.hub import cache_folder, cached_snapshot

PACKAGE = Path(__file__).resolve().parent
FIXED_NAMES = ("config.json", "tokenizer.json", "source.json", "target.json", "model.safetensors")


def write_durable(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old file or the new one, never a part.

    A temporary file in the same folder is written, synced, and renamed over `path` (through a
    symbolic link, whose target is replaced); then the folder is synced. Raises FileError.
    """
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, durably. Raises FileError, and ValueError on NaN."""
    write_durable(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take_lock(path: Path, where: str, kind: str) -> io.TextIOWrapper:
    """Open `path`, made if it is not there, so that no other process can until it is closed.

    Raises FileError that begins with `where`, for a `kind`, a file say, that is in use.
    """
    import fcntl

    try:
        lock = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError as error:
        raise FileError(f"{where}: cannot be written ({error.strerror})") from error
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
    if not _is_at(path, lock):  # whoever held it has removed it meanwhile
        lock.close()
        return take_lock(path, where, kind)
    return lock


def _is_at(path: Path, file: io.TextIOWrapper) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
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


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _named(path: Path, flag: str) -> str:
    return f"{flag} {path}" if flag else str(path)


def require_file(path: Path, what: str, flag: str = "") -> Path:
    """Return `path`, which `flag` gave, if it is a regular, non-empty file; else raise FileError
    saying what it is."""
    where = _named(path, flag)
    try:
        info = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            lost = f"{where}: is a link to {os.readlink(path)}, which does not exist"
            raise FileError(f"{lost} (expected {what})") from None
        hint = nearest(path) or "Check the path."
        raise FileError(f"{where}: not found (expected {what})", hint) from None
    except OSError as error:
        raise FileError(f"{where}: {what} cannot be opened ({error.strerror})") from error
    if stat.S_ISDIR(info.st_mode):
        raise FileError(f"{where}: is a folder (expected {what})")
    if not stat.S_ISREG(info.st_mode):
        raise FileError(f"{where}: is not a regular file (expected {what})")
    if info.st_size == 0:
        raise FileError(f"{where}: is empty, 0 bytes (expected {what})")
    return path


def nearest(path: Path) -> str:
    """Name the files beside `path` with similar names in a sentence, the most similar first; "" for
    none, and for a name that a checkpoint's file must have."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except FileNotFoundError:
        return f"The folder {path.parent} does not exist either." if str(path.parent) != "." else ""
    except OSError:
        return ""
    if path.name in FIXED_NAMES:
        return ""
    # Two names are alike for their suffix alone: what stands before it must be similar too.
    stems = difflib.get_close_matches(path.stem, {Path(n).stem for n in names}, n=9, cutoff=0.7)
    similar = [name for name in names if Path(name).stem in stems]
    close = difflib.get_close_matches(path.name, similar, n=3)
    found = " or ".join(str(path.parent / name) for name in close)
    return f"Did you mean {found}?" if close else ""


def read_text(path: Path, what: str, flag: str = "") -> str:
    """Read UTF-8 text without a byte order mark. Raises FileError with a bad byte's offset."""
    data = read_bytes(path, what, flag)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = _named(path, flag)
        raise FileError(
            f"{where}: is not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})",
            "Convert it to UTF-8 first.",
        ) from error


def read_bytes(path: Path, what: str, flag: str = "") -> bytes:
    """Read a whole regular file, which `flag` gave. Raises FileError."""
    require_file(path, what, flag)
    try:
        return path.read_bytes()
    except OSError as error:
        where = _named(path, flag)
        raise FileError(f"{where}: {what} cannot be read ({error.strerror})") from error


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file that holds one object. Raises FileError with the line of a syntax error."""
    try:
        data = json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise FileError(f"{path}: holds no JSON object (found {type(data).__name__})")
    return data


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
    "A checkpoint is a folder with config.json, model.safetensors and tokenizer.json."
)


def model_folder(name: str) -> Path:
    """The folder of a checkpoint: `name` as a path, as a shipped model, or as a repository that is
    in Hugging Face's cache. Raises FileError."""
    name = name or DEFAULT_MODEL
    path = Path(name)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"--model {name[:60]}: cannot be opened ({reason})") from error
    if not path.is_dir() and name in shipped_models():
        return weights_folder() / name
    if not path.exists():
        snapshot = cached_snapshot(name)
        if snapshot is None:
            raise _no_model(name, path)
        return snapshot
    if (path / "best" / "config.json").is_file() and not (path / "config.json").exists():
        raise FileError(
            f"--model {name}: is the folder of a run (expected a checkpoint)",
            f"Give its best: {path / 'best'}.",
        )
    if not path.is_dir():
        raise FileError(
            f"--model {name}: is a file (expected a checkpoint folder)",
            CHECKPOINT_FOLDER,
        )
    return path


def _no_model(name: str, path: Path) -> FileError:
    known = shipped_models()
    if close := difflib.get_close_matches(name, known, n=1):
        return FileError(f"--model {name}: not found", f"Did you mean {close[0]}?")
    if name.count("/") == 1 and not path.parent.exists():  # as the hub names repositories
        return FileError(
            f"--model {name}: is neither a folder nor in the cache {cache_folder()}",
            f"kvtool downloads nothing; if it is on the hub: hf download {name}",
        )
    hint = nearest(path) or f"Give a folder, or one of: {', '.join(known)}."
    return FileError(f"--model {name}: not found", hint)
