"""Models in Hugging Face's cache: found by the name of their repository, never downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_probe import Ran, refused
from kvtool.errors import FileError
from kvtool.files import model_folder
from kvtool.hub import cache_folder
from small_models import answer, save_decoder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with nothing of the name in the current folder."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home" / "hub"


def put(hub: Path, name: str = "models--some-org--tiny.1") -> Path:
    """A snapshot as the hub's client keeps it: links to blobs, and the commit in refs/main."""
    repository = hub / name
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    blobs = save_decoder(repository / "blobs")
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_a_cached_repository_is_a_model(hub: Path, kv: Callable[..., Ran]) -> None:
    snapshot = put(hub)
    assert model_folder("some-org/tiny.1") == snapshot
    args = "--model some-org/tiny.1 --lengths 2 --repeats 1 --caches dynamic --json --threads 1"
    assert answer(kv(*args.split(), command="bench"))["schema"] == "kvtool.bench/1"


def test_a_repository_without_an_owner_is_found_too(hub: Path) -> None:
    snapshot = put(hub, "models--gpt2")
    assert model_folder("gpt2") == snapshot


def test_a_folder_of_that_name_comes_first(hub: Path) -> None:
    put(hub)
    save_decoder(Path("some-org/tiny.1"))
    assert model_folder("some-org/tiny.1") == Path("some-org/tiny.1")


@pytest.mark.parametrize(
    ("variable", "value", "place"),
    [
        ("HF_HUB_CACHE", "/a/b", "/a/b"),
        ("HUGGINGFACE_HUB_CACHE", "/a/c", "/a/c"),
        ("HF_HOME", "/h", "/h/hub"),
    ],
)
def test_the_cache_is_where_the_hubs_own_client_looks(
    variable: str, value: str, place: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert cache_folder() == Path(place)


@pytest.mark.parametrize(
    "variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"]
)
def test_a_cache_in_the_home_of_nobody_is_one_line(
    variable: str, hub: Path, kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, "~nosuchuser/x")
    message = refused(kv("--model", "some-org/other", command="bench"))
    assert message.startswith(f"{variable}=~nosuchuser/x: there is no home folder for ~nosuchuser")


def test_a_general_cache_is_where_the_hubs_own_client_looks(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/huggingface/hub")


def test_a_revision_in_what_is_no_file_is_an_error(hub: Path) -> None:
    reference = put(hub).parent.parent / "refs" / "main"
    reference.unlink()
    os.mkfifo(reference)
    with pytest.raises(FileError, match="refs/main cannot be read"):
        model_folder("some-org/tiny.1")


def test_what_is_not_there_is_not_downloaded(hub: Path, kv: Callable[..., Ran]) -> None:
    ran = kv("--model", "some-org/other", command="bench")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert f"--model some-org/other: is neither a folder nor in the cache {hub}" in ran.err
    assert "kvtool downloads nothing" in ran.err


@pytest.mark.parametrize(
    "text", ["", "../../../etc", "main", COMMIT[::-1], "\0", "\xff", "a" * 10**6]
)
def test_a_revision_that_is_not_there_is_an_error(text: str, hub: Path) -> None:
    snapshot = put(hub)
    (snapshot.parent.parent / "refs" / "main").write_text(text, encoding="latin-1")
    with pytest.raises(FileError, match=r"refs/main|is not in the cache"):
        model_folder("some-org/tiny.1")


@pytest.mark.parametrize(
    "name", ["../x", "a/../b", "a--b/c", "/abs/x", "a/b/c", "a\0b", "a/", "a."]
)
def test_a_name_that_is_no_repository_leads_nowhere(name: str, hub: Path) -> None:
    for odd in ("models--..--x", "models--a--b--c", "models--a--..--b", "models--a."):
        put(hub, odd)
    with pytest.raises(FileError):
        model_folder(name)
