"""kvtool generate --beams, and sources decoded together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli_probe import Ran, refused
from small_models import WORDS, answer, save_decoder, save_seq2seq


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seq2seq(tmp_path_factory.mktemp("seq2seq"))


@pytest.fixture
def generate(kv: Callable[..., Ran], seq2seq: Path) -> Callable[..., Ran]:
    def call(*args: str, model: Path = seq2seq) -> Ran:
        return kv("--model", str(model), "--device", "cpu", *args, command="generate")

    return call


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


def test_the_n_best_come_best_first_and_are_scored(generate: Callable[..., Ran]) -> None:
    found = answer(generate("--prompt", "jail", "--beams", "5", "--n-best", "3", "--json"))
    results = found["results"]
    assert [row["rank"] for row in results] == [1, 2, 3]
    assert [row["score"] for row in results] == sorted((r["score"] for r in results), reverse=True)
    assert all(row["log_prob"] < 0 for row in results)
    assert len({row["text"] for row in results}) == 3
    lines = generate("--prompt", "jail", "--beams", "5", "--n-best", "3").out.splitlines()
    assert lines == [row["text"] for row in results]


@pytest.mark.parametrize("beams", ["1", "3"])
def test_a_file_of_sources_is_answered_in_its_order(
    generate: Callable[..., Ran], words: Path, beams: str
) -> None:
    """Decoded together, by length; each is what it is alone."""
    together = generate("--input", str(words), "--beams", beams).out.splitlines()
    alone = [generate("--prompt", word, "--beams", beams).out.rstrip("\n") for word in WORDS]
    assert together == alone


def test_n_best_of_a_file_are_so_many_lines_a_source(
    generate: Callable[..., Ran], words: Path
) -> None:
    ran = generate("--input", str(words), "--beams", "3", "--n-best", "2")
    assert len(ran.out.splitlines()) == 2 * len(WORDS)


def test_a_decoder_is_searched_too_with_every_cache(
    generate: Callable[..., Ran], decoder: Path
) -> None:
    given = ("--prompt", "To be", "--beams", "3", "--max-tokens", "12")
    texts = {generate(*given, "--cache", kind, model=decoder).out for kind in ("none", "static")}
    assert len(texts) == 1
    assert "dynamic cache:" in generate(*given, model=decoder).err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--beams 0", "--beams: 0 is too small"),
        ("--beams 2 --n-best 3", "--n-best: 3 of 2 beams"),
        ("--n-best 2", "--n-best: 2 of 1 beams"),
        ("--beams 2 --temperature 0.5", "--temperature: contradicts --beams"),
        ("--beams 2 --top-k 3", "--top-k: contradicts --beams"),
        ("--beams 2 --top-p 0.5", "--top-p: contradicts --beams"),
        ("--beams 2 --length-penalty nan", "--length-penalty: nan is out of range"),
        ("--beams 2 --max-tokens 64", "the prompt is 1 token and 64 more were asked for"),
    ],
)
def test_what_cannot_be_searched_is_exit_2(
    generate: Callable[..., Ran], words: str, message: str
) -> None:
    assert refused(generate("--prompt", "jail", *words.split())).startswith(message)
