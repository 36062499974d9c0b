"""JSON by a stranger: what it would take in memory is bounded before any of it is parsed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtool import reading
from kvtool.core.checkpoint.safetensors_file import SafetensorsFile
from kvtool.core.checkpoint.weight_files import open_weights
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.errors import FileError

pytestmark = pytest.mark.usefixtures("signals_as_in_the_app")
FEW = 999


def unparsed(*args: object, **kwargs: object) -> None:
    raise AssertionError("the parser was called")


@pytest.mark.parametrize("unit", ["[],", "{},", "0,", "[" * 60 + "]" * 60 + ","])
@pytest.mark.parametrize("encode", [str, str.encode])
def test_json_of_too_many_parts_is_refused_unparsed(
    monkeypatch: pytest.MonkeyPatch, unit: str, encode: Callable[[str], str | bytes]
) -> None:
    monkeypatch.setattr(reading, "MAX_PARTS", FEW)
    monkeypatch.setattr(reading.json, "loads", unparsed)
    text = "[" + unit * FEW + "0]"
    with pytest.raises(ValueError, match="commas and brackets, expected 999 or fewer"):
        reading.parse_json(encode(text))


def tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    Tokenizer.load(folder / "tokenizer.json")


def shard_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    open_weights(folder)


def header(folder: Path, text: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())
    SafetensorsFile(path)


@pytest.mark.parametrize("read", [tokenizer, shard_index, header])
def test_each_large_file_of_json_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path, str], None]
) -> None:
    monkeypatch.setattr(reading, "MAX_PARTS", FEW)
    with pytest.raises(FileError, match="commas and brackets, expected 999 or fewer"):
        read(tmp_path, '{"a":[' + "[]," * FEW + "0]}")


def test_a_list_for_each_of_half_a_million_merges_is_read() -> None:
    merges = [["a", "b"]] * 520_000
    vocabulary = {str(i): i for i in range(262_144)}
    found = reading.parse_json(json.dumps({"vocab": vocabulary, "merges": merges}))
    assert len(found["merges"]) == len(merges) and found["vocab"] == vocabulary


@pytest.mark.parametrize(("n", "at_once"), [(10, False), (reading.QUICK_JSON, True)])
def test_signals_end_the_process_while_much_is_parsed(
    monkeypatch: pytest.MonkeyPatch, n: int, at_once: bool
) -> None:
    handlers = []
    monkeypatch.setattr(
        reading.json, "loads", lambda *_, **__: handlers.append(signal.getsignal(signal.SIGTERM))
    )
    before = signal.getsignal(signal.SIGTERM)
    reading.parse_json('"' + "a" * n + '"')
    assert [handler is signal.SIG_DFL for handler in handlers] == [at_once]
    assert signal.getsignal(signal.SIGTERM) is before
