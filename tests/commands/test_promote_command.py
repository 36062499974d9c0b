"""kvtool promote, as a user meets it, and what llama.cpp says of the file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_probe import Ran, refused
from gguf_files import Made
from kvtool.core.servers.client import Client
from kvtool.core.servers.engines import connect
from llama_server import llama_server
from small_models import answer

IDS = [5, 9, 13, 40, 77, 120, 200, 31, 8, 64]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "q.gguf"
    return Made(formats=("Q4_1", "Q8_0", "Q5_0"), n_layers=3).write(path)


@pytest.fixture
def promote(kv: Callable[..., Ran], tmp_path: Path) -> Callable[..., Ran]:
    def call(source: Path, *args: str, out: str = "f32.gguf") -> Ran:
        return kv(str(source), "--out", str(tmp_path / out), *args, command="promote")

    return call


def test_it_says_what_it_needs_what_it_wrote_and_how_to_go_on(
    promote: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    ran = promote(source)
    out = tmp_path / "f32.gguf"
    assert ran.code == 0
    assert ran.err.startswith("needs 0.") and f"MiB at {out} (" in ran.err and "free)" in ran.err
    assert f"the same numbers in F32: {out}, " in ran.out
    assert ran.out.splitlines()[-1] == (
        f"llama-server --model {out} --cache-type-k f32 --cache-type-v f32 --flash-attn off "
        "--port 8081"
    )
    assert "smaller model" not in ran.err


def test_the_document_has_a_row_for_each_format(
    promote: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    found = answer(promote(source, "--json"))
    assert found["schema"] == "kvtool.promote/1"
    assert {row["format"] for row in found["formats"]} == {"Q4_1", "Q8_0", "Q5_0", "F32"}
    assert sum(row["bytes_after"] for row in found["formats"]) <= found["nbytes"]
    assert found["nbytes"] == (tmp_path / "f32.gguf").stat().st_size
    assert found["nbytes_before"] == source.stat().st_size
    (q4,) = (row for row in found["formats"] if row["format"] == "Q4_1")
    assert q4["bytes_after"] == 4 * q4["values"] and q4["bytes"] * 32 == q4["values"] * 20


def test_its_help_shows_the_argument_once_and_as_the_user_writes_it(kv: Callable[..., Ran]) -> None:
    lines = kv("--help", command="promote").out.splitlines()
    shown = [line for line in lines if "The quantised model, in one file" in line]
    assert [line.split()[0] for line in shown] == ["MODEL.gguf"]


def test_fewer_layers_are_said_to_be_another_model(
    promote: Callable[..., Ran], source: Path
) -> None:
    ran = promote(source, "--layers", "1")
    assert "another, smaller model" in ran.err and "compare it with itself alone" in ran.err
    assert "the first 1 of 3 blocks in F32" in ran.out


REFUSED = {
    "--layers 0": "--layers: 0 is too small (expected 1 or more)",
    "--layers 9": "--layers 9: {source} has 3 blocks",
}


@pytest.mark.parametrize("given", REFUSED)
def test_layers_that_are_not_there_are_refused(
    promote: Callable[..., Ran], source: Path, given: str
) -> None:
    message = refused(promote(source, *given.split()))
    assert message.startswith(REFUSED[given].format(source=source))


def test_what_is_there_is_not_overwritten(
    promote: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "f32.gguf").write_text("mine")
    assert "f32.gguf: is there already" in refused(promote(source))
    assert (tmp_path / "f32.gguf").read_text() == "mine"
    assert "(expected .gguf)" in refused(promote(source, out="f32.bin"))
    assert "does not exist" in refused(promote(source, out="nowhere/f32.gguf"))


def test_a_file_that_is_none_is_refused_in_one_line(
    promote: Callable[..., Ran], tmp_path: Path
) -> None:
    assert "not found (expected a GGUF file)" in refused(promote(tmp_path / "none.gguf"))
    assert "is a folder (expected a GGUF file)" in refused(promote(tmp_path))
    (tmp_path / "page.gguf").write_text("<!doctype html>")
    assert "is not a GGUF file (begins with" in refused(promote(tmp_path / "page.gguf"))


def test_llama_cpp_loads_the_file_and_agrees_up_to_the_quantised_ones_rounding(
    promote: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    assert promote(source).code == 0
    found = []
    for path in (source, tmp_path / "f32.gguf"):
        with llama_server(path) as url:
            found.append(connect(Client(url)).complete(IDS).likeliest[0])
    quantised, promoted = found
    shared = sorted(promoted, key=promoted.__getitem__)[-30:]
    gaps = [abs(promoted[i] - quantised[i]) for i in shared if i in quantised]
    assert len(gaps) == 30
    assert 0 < math.sqrt(sum(g * g for g in gaps) / 30) < 0.1  # activations of 8 bits


def test_the_promoted_file_generates_as_the_first_does(
    kv: Callable[..., Ran], promote: Callable[..., Ran], source: Path, tmp_path: Path
) -> None:
    assert promote(source).code == 0
    common = ("--prompt", "the cat", "--max-tokens", "9", "--temperature", "0", "--json")
    runs = [
        json.loads(kv("--model", str(path), *common, command="generate").out)
        for path in (source, tmp_path / "f32.gguf")
    ]
    assert runs[0]["results"][0]["text"] == runs[1]["results"][0]["text"]
    assert [run["resolved"]["stored_dtype"] for run in runs] == ["Q4_1", "F32"]
