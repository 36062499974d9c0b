"""Parses --target FILE.py:NAME. Imports no torch, and runs nothing."""

from __future__ import annotations

from pathlib import Path

from kvtool.errors import FileError, UsageError

FLAG = "--target"


def parse_spec(spec: str) -> tuple[Path, str]:
    """The file, which is there, and the name in it. Raises UsageError and FileError."""
    text, colon, name = spec.rpartition(":")
    if not (text and colon and name.isidentifier()):
        raise UsageError(f"{FLAG}: {spec!r} is not FILE.py:NAME", "For example my_decoder.py:build")
    path = Path(text)
    if not path.is_file():
        other = "is no file of text" if path.exists() else "there is no such file"
        problem = "is a folder" if path.is_dir() else other
        raise FileError(f"{path}: {problem}", f"{FLAG} takes FILE.py:NAME.")
    return path, name
