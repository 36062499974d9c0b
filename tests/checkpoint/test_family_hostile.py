"""Folders of models by strangers: nothing outside is opened, nothing huge is built."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import family_folders
from cli_probe import Ran
from family_cases import CASES, CONTEXT, build, edit, load, refusal, save
from family_folders import K_PROJ, set_to
from kvtool.errors import FileError

originals, copy = (
    family_folders.originals,
    family_folders.copy,
)


@pytest.mark.parametrize(
    "field",
    [
        "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads",
        "max_position_embeddings",
    ],
)  # fmt: skip
def test_sizes_that_no_file_holds_are_refused_before_anything_is_built(
    field: str, copy: Callable[[str], Path]
) -> None:
    with pytest.raises(FileError):
        load(edit(copy("llama"), set_to(**{field: 2**31 - 1})))


@pytest.fixture
def sharded(originals: dict[str, Path], tmp_path: Path) -> Path:
    return save(build(CASES["llama"]), tmp_path / "shards", max_shard_size="50KB")


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "a/b", "..", "a\\b"])
def test_an_index_leads_to_no_other_folder(
    place: str, sharded: Path, opened: Callable[[], list[str]]
) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    edit(sharded, lambda data: data["weight_map"].update({K_PROJ: place}), INDEX)
    opened()
    assert f"places {K_PROJ} in" in refusal(sharded)
    assert all(path.startswith(str(sharded)) for path in opened())


def test_a_shard_that_is_not_there_is_named(sharded: Path) -> None:
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    assert str(missing) in refusal(sharded)


def test_a_tensor_that_is_not_in_its_shard_is_named(sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))

    def move(data: dict[str, Any]) -> None:
        places = data["weight_map"]
        places[K_PROJ] = next(name for name in shards if name != places[K_PROJ])

    assert K_PROJ in refusal(edit(sharded, move, INDEX))


_log: list[str] | None = None


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if _log is not None and event == "open" and isinstance(args[0], (str, bytes)):
        _log.append(args[0] if isinstance(args[0], str) else args[0].decode())
    elif _log is not None and event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        _log.append(event)


@pytest.fixture
def opened() -> Iterator[Callable[[], list[str]]]:
    """What this process has opened since the last call, apart from Python's own files and what says
    how much memory there is; a connection or a process counts as well."""
    global _log
    if not getattr(_listen, "added", False):
        sys.addaudithook(_listen)  # for good: hooks cannot be taken back
        _listen.added = True  # type: ignore[attr-defined]
    _log = []

    def since() -> list[str]:
        global _log
        paths, _log = _log or [], []
        package = str(Path(__file__).parents[2] / "kvtool")
        own = (sys.prefix, sys.base_prefix, package, "/proc/", "/sys/fs/cgroup/")
        return [path for path in paths if not path.startswith(own)]

    yield since
    _log = None


@pytest.mark.parametrize("case", ["gpt2", "qwen3"])
def test_loading_opens_nothing_outside_the_folder(
    case: str, copy: Callable[[str], Path], opened: Callable[[], list[str]]
) -> None:
    folder = copy(case)
    opened()
    load(folder)
    paths = opened()
    assert {"config.json", "model.safetensors"} <= {Path(path).name for path in paths}
    assert [path for path in paths if not path.startswith(str(folder))] == []


def test_a_context_beyond_the_models_is_refused(
    copy: Callable[[str], Path], kv: Callable[..., Ran]
) -> None:
    ran = kv("--model", str(copy("gpt2")), "--lengths", str(CONTEXT), command="bench")
    assert ran.code == 2 and f"the model holds {CONTEXT}" in ran.err
