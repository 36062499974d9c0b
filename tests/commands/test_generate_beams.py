"""kvtool generate --beams, and sources decoded together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cli_probe import Ran, refused
from kvtool.commands.generate.results import Result, lines_of_results
from kvtool.commands.generate.settings import Settings
from kvtool.config import RunConfig
from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding.engine import first_input
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
    assert all(row["number"] == 1 for row in results)
    lines = generate("--prompt", "jail", "--beams", "5", "--n-best", "3").out.splitlines()
    assert lines == [f"{row['rank']}\t{row['score']:.4f}\t{row['text']}" for row in results]


@pytest.mark.parametrize("size", range(2, 9))
def test_no_beam_says_less_than_greedy_decoding_of_the_shipped_model(
    generate: Callable[..., Ran], size: int
) -> None:
    """One that stopped when so many had ended gave AW T S M AA R, at -5.24."""
    given = ("--prompt", "outsmart", "--json")
    (greedy,) = answer(generate(*given, model=Path("g2p-1x1")))["results"]
    found = answer(generate(*given, "--beams", str(size), model=Path("g2p-1x1")))
    assert found["results"][0]["text"] == greedy["text"] == "AW T S M AA R T"
    assert found["results"][0]["log_prob"] == pytest.approx(greedy["log_prob"], abs=1e-5)
    assert greedy["log_prob"] == pytest.approx(-0.61085, abs=1e-4)


@pytest.mark.parametrize("beams", ["1", "3"])
def test_a_file_of_sources_is_answered_in_its_order(
    generate: Callable[..., Ran], words: Path, beams: str
) -> None:
    """Decoded together, by length; each is what it is alone."""
    together = generate("--input", str(words), "--beams", beams).out.splitlines()
    alone = [generate("--prompt", word, "--beams", beams).out.rstrip("\n") for word in WORDS]
    assert together == alone


def test_n_best_of_a_file_name_their_source_rank_and_score(
    generate: Callable[..., Ran], words: Path, tmp_path: Path
) -> None:
    given = ("--input", str(words), "--beams", "3", "--n-best", "2")
    lines = generate(*given).out.splitlines()
    rows = answer(generate(*given, "--json"))["results"]
    assert [(row["number"], row["rank"], row["prompt"]) for row in rows] == [
        (number, rank, word) for number, word in enumerate(WORDS, start=1) for rank in (1, 2)
    ]
    columns = ("number", "rank", "score", "text")
    expected = [[row[name] for name in columns] for row in rows]
    found = [line.split("\t") for line in lines]
    assert [[int(n), int(rank), float(score), text] for n, rank, score, text in found] == [
        [n, rank, pytest.approx(score, abs=5e-5), text] for n, rank, score, text in expected
    ]
    path = tmp_path / "out.txt"
    assert generate(*given, "--output", str(path)).out == ""
    assert path.read_text().splitlines() == lines


def test_a_result_of_several_is_one_line_whatever_is_in_it() -> None:
    settings = Settings(RunConfig(), "x", None, None, 9, 0.0, 0, 1.0, "none", beams=2, n_best=2)
    results = [Result("x", "a\\b\nc", 1, 3, True, rank, -2.0, -1.5) for rank in (1, 2)]
    assert lines_of_results(results, settings) == [
        f"{rank}\t-1.5000\ta\\\\b\\nc" for rank in (1, 2)
    ]
    (line,) = lines_of_results(results[:1], replace(settings, n_best=1))
    assert line == "a\\\\b\\nc"


@pytest.mark.parametrize("sampling", ["--temperature 0", "--temperature 0.9 --top-k 5"])
@pytest.mark.parametrize("which", ["decoder", "seq2seq"])
def test_log_prob_is_that_of_one_pass_however_tokens_are_chosen(
    generate: Callable[..., Ran], request: pytest.FixtureRequest, sampling: str, which: str
) -> None:
    model = request.getfixturevalue(which)
    given = ("--prompt", "To be" if which == "decoder" else "jail", "--max-tokens", "12")
    chosen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        row = Result.row
        patch.setattr(Result, "row", lambda self: chosen.extend(self.ids) or row(self))
        found = answer(generate(*given, *sampling.split(), "--json", model=model))["results"][0]
    loaded = checkpoint.load(str(model), torch.device("cpu"), torch.float32)
    tokenizer = loaded.source_tokenizer or loaded.tokenizer
    prompt, source = first_input(loaded.model, torch.tensor([tokenizer.encode(given[1])]))
    new = torch.tensor([chosen[: found["new_tokens"]]])
    with torch.no_grad():
        logits = loaded.model(torch.cat([prompt, new], dim=1)[:, :-1], source=source)[0]
    after = logits[prompt.shape[1] - 1 :].double().log_softmax(-1)
    expected = float(after.gather(1, new.T).sum())
    assert found["log_prob"] == pytest.approx(expected, abs=1e-4) and found["score"] is None


def test_sources_decoded_together_have_the_log_prob_of_each_alone(
    generate: Callable[..., Ran], words: Path
) -> None:
    together = answer(generate("--input", str(words), "--json"))["results"]
    for row, word in zip(together, WORDS, strict=True):
        (alone,) = answer(generate("--prompt", word, "--json"))["results"]
        assert row["log_prob"] == pytest.approx(alone["log_prob"], abs=1e-4)
        assert row["score"] is None and row["log_prob"] < 0


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
