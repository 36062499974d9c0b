"""A folder that is held open, where nothing is reached through a link; and durable writing.

A run that somebody handed over may have links, FIFOs and hard links where its files are expected:
what is written or read there stays in the folder. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from pathlib import Path

from kvtool.errors import FileError
from kvtool.reading import MAX_TEXT_BYTES, read_whole, require_regular

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
HERE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # nobody waits for the other end of a FIFO
LINK, OTHER = "a link", "neither a file nor a folder"


class Folder:
    """An open folder; its methods take names of entries, and raise FileError that names them."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self.handle = handle

    @classmethod
    def at(cls, path: Path) -> Folder:
        """The folder that the user named, perhaps by a link. Raises OSError."""
        return cls(path, os.open(path, FOLDER))

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = -1

    def names(self) -> set[str]:
        """Of its entries. Raises OSError."""
        return set(os.listdir(self.handle))

    def require_own(self, name: str, expected: str, folder: bool | None = None) -> None:
        """Raise FileError for an entry that is a link, or neither a file nor a folder; one of the
        two, if `folder` says which."""
        try:
            mode = os.lstat(name, dir_fd=self.handle).st_mode
        except OSError:
            return  # opening it will tell
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            found = LINK if stat.S_ISLNK(mode) else OTHER
            raise FileError(f"{self.path / name}: is {found} (expected {expected})")
        if folder is not None and stat.S_ISDIR(mode) != folder:
            found = "a file" if folder else "a folder"
            raise FileError(f"{self.path / name}: is {found} (expected {expected})")

    def below(self, name: str, make: bool = False) -> Folder:
        """A folder in it, made if there is none and it is to be."""
        path = self.path / name
        self.require_own(name, "a folder")
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=self.handle)
            return Folder(path, os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=self.handle))
        except OSError as error:
            verb = "made" if make else "opened"
            raise FileError(f"{path}: cannot be {verb} ({error.strerror})") from error

    def read(self, name: str, what: str, most: int = MAX_TEXT_BYTES) -> bytes:
        """A regular file of up to `most` bytes."""
        path = self.path / name
        self.require_own(name, what)
        try:
            handle = os.open(name, os.O_RDONLY | HERE, dir_fd=self.handle)
            with open(handle, "rb") as file:
                require_regular(file, str(path), what)
                return read_whole(file, str(path), what, most)
        except OSError as error:
            raise FileError(f"{path}: {what} cannot be read ({error.strerror})") from error

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, durably; a link in its place is replaced itself."""
        try:
            write_at(self.handle, name, data)
        except OSError as error:
            raise FileError(f"{self.path / name}: cannot be written ({error.strerror})") from error

    def append(self, name: str, data: bytes) -> None:
        """Add to a file that has no other name, or a new one."""
        path = self.path / name
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | HERE
            with open(os.open(name, flags, 0o666, dir_fd=self.handle), "ab") as file:
                require_alone(file.fileno(), str(path))
                file.write(data)
        except OSError as error:
            raise FileError(f"{path}: cannot be written ({error.strerror})") from error

    def size(self, name: str) -> int:
        """Of a file, in bytes."""
        self.require_own(name, "a file")
        try:
            return os.lstat(name, dir_fd=self.handle).st_size
        except OSError as error:
            raise FileError(f"{self.path / name}: cannot be opened ({error.strerror})") from error

    def rename(self, name: str, to: str) -> None:
        """Give an entry another name, in place of what has it."""
        try:
            os.replace(name, to, src_dir_fd=self.handle, dst_dir_fd=self.handle)
        except OSError as error:
            where = f"{self.path / name}: cannot be renamed to {to}"
            raise FileError(f"{where} ({error.strerror})") from error

    def remove(self, name: str) -> None:
        """Remove a file, if that is possible."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.handle)


def require_alone(handle: int, where: str) -> None:
    """Raise FileError unless an open file is a regular one of one name: what is appended or emptied
    would be so elsewhere too."""
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{where}: is not a regular file (expected one to write to)")
    if found.st_nlink > 1:
        raise FileError(
            f"{where}: has another name elsewhere, a hard link (expected a file of its own)",
            "Put a copy in its place.",
        )


def write_at(folder: int, name: str, data: bytes) -> None:
    """Replace an entry of an open folder by a file with `data`, so that a crash leaves the old or
    the new one, never a part: a temporary file in the same folder is written, synced and renamed
    over it; then the folder is synced. Raises OSError."""
    mode = None
    with contextlib.suppress(FileNotFoundError):
        before = os.lstat(name, dir_fd=folder).st_mode
        mode = before & 0o777 if stat.S_ISREG(before) else None
    temporary = f".{name}.{secrets.token_hex(4)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | HERE
    handle = os.open(temporary, flags, 0o666 if mode is None else 0o600, dir_fd=folder)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            if mode is not None:
                os.fchmod(handle, mode)
            os.fsync(handle)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    os.fsync(folder)


def open_lock(name: str | Path, where: str, folder: int | None = None) -> io.TextIOWrapper:
    """A file to lock, made if it is not there; nothing in it is changed. Raises FileError."""
    try:
        handle = os.open(name, os.O_RDWR | os.O_CREAT | HERE, 0o666, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileError(f"{where}: is {LINK} (expected a file)") from error
        raise FileError(f"{where}: cannot be written ({error.strerror})") from error
    try:
        require_alone(handle, where)
    except FileError:
        os.close(handle)
        raise
    return open(handle, "r+", encoding="utf-8", errors="replace")
