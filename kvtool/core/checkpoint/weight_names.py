"""Where a checkpoint's folder has its weights, and what may lie there instead. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvtool.errors import FileError
from kvtool.reading import opened, quoted, read_json_object, short

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_NAME = 256  # characters; no file system has longer names

# What a download may leave in place of the file. No valid file of kvtool begins like these.
LOOKALIKES = {
    b"version https://git-lfs": ("a Git LFS pointer", "Run git lfs pull to fetch the file itself."),
    b"<!doctype": ("an HTML page", "Download the file itself, not the page that shows it."),
    b"<html": ("an HTML page", "Download the file itself, not the page that shows it."),
}


def refuse_lookalike(path: Path, what: str) -> None:
    """Raise FileError unless `path` is a file, and no Git LFS pointer or web page in its place."""
    with opened(path, what) as file:
        head = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, (found, hint) in LOOKALIKES.items():
        if head.startswith(start):
            raise FileError(f"{path}: is {found} (expected {what})", hint)


def weight_map(path: Path) -> dict[str, str]:
    """The table of the index: tensor -> shard. Raises FileError for a damaged index."""
    places = read_json_object(path, "an index of weights").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise FileError(f"{path}: weight_map is not an object of file names")
    for tensor, name in places.items():
        # isprintable: a NUL or half a surrogate pair is in no file's name, and breaks open().
        plain = name.isprintable() and len(name) < LONGEST_NAME and name not in ("", ".", "..")
        if not plain or "/" in name or "\\" in name:
            raise FileError(
                f"{path}: places {short(tensor)} in {quoted(name)} (expected a file name)",
                "Shards lie beside their index; kvtool opens nothing elsewhere.",
            )
    return places


def check_shard(
    index: Path, shard: str, places: Mapping[str, str], listed: set[str], held: set[str]
) -> None:
    if listed - held:
        tensor = min(listed - held)
        raise FileError(f"{index}: places {short(tensor)} in {shard}, which does not hold it")
    if held - listed:
        tensor = min(held - listed)
        if tensor in places:
            raise FileError(
                f"{index}: places {short(tensor)} in {places[tensor]}, but {shard} holds one too"
            )
        raise FileError(f"{index}: does not list {short(tensor)}, which {shard} holds")
