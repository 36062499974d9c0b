"""kvtool evaluate: scores of saved models, checked against what they are defined by."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import verify_ending_cases
from cli_probe import Ran, refused
from kvtool.commands.evaluate import EvaluateReport, hypothesis_lines
from kvtool.core import footprint
from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding import sources
from kvtool.core.decoding.beam import Hypothesis
from kvtool.core.models import Model
from kvtool.core.training import lm
from kvtool.core.training.lm import score_text
from kvtool.errors import FileError
from kvtool.ui.documents import SUFFIXES, check_writable
from small_models import answer, explains_every_option
from verify_ending_cases import Hook, send

at_call = verify_ending_cases.at_call
Command = Callable[..., Ran]
G2P = "g2p-1x1"
PAIRS = "hello\tHH AH L OW\nqueue\tK Y UW\nhello\tHH EH L OW\nshoe\tN OW N EH\n"


@pytest.fixture
def command(kv: Command) -> Command:
    return lambda *args: kv(*map(str, args), command="evaluate")


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text(PAIRS)
    return path


@pytest.fixture(scope="module")
def shipped() -> checkpoint.Checkpoint:
    return checkpoint.load("", torch.device("cpu"), torch.float64)


@torch.inference_mode()
def nats(model: Model, ids: Tensor) -> Tensor:
    """The loss of each token of ids (n,) but the first, of one pass: (n-1,)."""
    found = model(ids[None, :-1])[0].double().log_softmax(-1)
    return -found.gather(1, ids[1:, None])[:, 0]


def test_pairs_get_error_rates_against_the_closest_of_all_right_targets(
    command: Command, tsv: Path
) -> None:
    (row,) = answer(command("--model", G2P, "--data", tsv, "--json"))["scores"]
    # Two of three sources are right; the third, with four wrong phones, has two of the model's.
    assert (row["sources"], row["decoding"]) == (3, "greedy")
    assert row["WER %"] == pytest.approx(100 / 3) and row["exact %"] == pytest.approx(200 / 3)
    assert row["PER %"] == pytest.approx(100 * 4 / 11)


def test_the_scores_are_written_in_every_format_of_the_help(command: Command, tsv: Path) -> None:
    for suffix in SUFFIXES:
        out = tsv.with_name(f"r{suffix}")
        ran = command("--model", G2P, "--data", tsv, "--output", out)
        assert ran.code == 0 and "exact %" in out.read_text(), ran.err


def test_characters_that_the_model_does_not_know_are_warned_of(command: Command, tsv: Path) -> None:
    tsv.write_text("q\u0416\tK Y UW\n", encoding="utf-8")
    ran = command("--model", G2P, "--data", tsv)
    assert ran.code == 0 and "not in the vocabulary: '\u0416'" in ran.err


def test_no_file_takes_the_place_of_what_stdout_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.txt"
    with path.open("w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(FileError, match="is where stdout goes"):
            check_writable(path, "--hypotheses")
    check_writable(tmp_path / "other.txt", "--hypotheses")


def test_hypotheses_are_a_line_for_each_source_in_the_order_of_the_data(
    command: Command, tsv: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.txt"
    ran = command("--model", G2P, "--data", tsv, "--hypotheses", out)
    assert ran.code == 0, ran.err
    assert out.read_text().splitlines() == ["HH EH L OW", "K Y UW", "SH UW"]
    assert f"written to {out}" in ran.err


@pytest.mark.usefixtures("signals_as_in_the_app")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_scores_and_texts_of_what_was_decoded(
    command: Command, tsv: Path, monkeypatch: pytest.MonkeyPatch, at_call: Hook, number: int
) -> None:
    monkeypatch.setattr(sources, "DECODING_BATCH", 2)  # shoe and hello, then queue
    at_call(sources, "beam_search", 2, send(number))
    out = tsv.with_name("out.txt")
    ran = command("--model", G2P, "--data", tsv, "--hypotheses", out, "--json")
    found = json.loads(ran.out)
    (row,) = found["scores"]
    assert ran.code == found["exit_code"] == 128 + number
    assert (row["sources"], found["count"], found["total"]) == (2, 2, 3)
    assert row["PER %"] == pytest.approx(100 * 4 / 8)
    assert "so the scores are of the shortest 2 of 3 sources alone" in found["conclusion"]
    assert out.read_text() == "HH EH L OW\n\nSH UW\n"


@pytest.mark.usefixtures("signals_as_in_the_app")
def test_a_signal_leaves_the_perplexity_of_what_was_read(
    command: Command, tmp_path: Path, at_call: Hook
) -> None:
    (path := tmp_path / "text.txt").write_text("It is the east, and Juliet is the sun. " * 3)
    whole = answer(command("--data", path, "--context", 8, "--json"))
    at_call(lm, "_nats", 3, send())
    ran = command("--data", path, "--context", 8, "--json", "--output", tmp_path / "r.md")
    found = json.loads(ran.out)
    assert ran.code == 130 and found["scores"][0]["tokens"] == 11 < whole["total"]
    assert f"the first 11 of {whole['total']} tokens alone" in (tmp_path / "r.md").read_text()
    assert found["scores"][0]["nats/token"] != whole["scores"][0]["nats/token"]


@pytest.mark.usefixtures("signals_as_in_the_app")
@pytest.mark.parametrize(("owner", "name"), [(sources, "beam_search"), (lm, "_nats")])
def test_a_signal_before_any_result_ends_the_command_without_a_report(
    command: Command,
    tsv: Path,
    tmp_path: Path,
    at_call: Hook,
    owner: Any,
    name: str,
) -> None:
    at_call(owner, name, 1, send())
    out = tmp_path / "r.json"
    ran = command(*(("--model", G2P) if owner is sources else ()), "--data", tsv, "--output", out)
    assert ran.code == 130 and ran.err.endswith("kvtool: interrupted\n") and not out.exists()


def test_n_best_lists_have_the_form_of_moses_with_bars_of_the_text_escaped() -> None:
    found = [[Hypothesis([1], -1.5, -1.25, True), Hypothesis([2], -2.0, -1.75, True)]] * 2
    texts = {1: "a | b\nc", 2: ""}
    assert list(hypothesis_lines(2, lambda ids: texts[ids[0]], found))[1:3] == [
        "0 |||  ||| logprob= -2.0000 ||| -1.7500",
        "1 ||| a &#124; b\\nc ||| logprob= -1.5000 ||| -1.2500",
    ]
    assert list(hypothesis_lines(1, lambda ids: texts[ids[0]], found)) == ["a | b\\nc"] * 2


def test_a_text_gets_the_perplexity_of_all_its_tokens_but_the_first(
    command: Command, tmp_path: Path, shipped: checkpoint.Checkpoint
) -> None:
    text = "ROMEO:\nWhat naïve light breaks?\n"
    (path := tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = answer(command("--data", path, "--dtype", "float64", "--json"))
    (row,) = found["scores"]
    ids = torch.tensor(shipped.tokenizer.encode(text))
    total = float(nats(shipped.model, ids).sum())
    behind = shipped.tokenizer.decode(ids[1:].tolist())
    assert row["tokens"] == len(ids) - 1
    assert row["nats/token"] == pytest.approx(total / (len(ids) - 1), rel=1e-12)
    assert row["perplexity"] == pytest.approx(math.exp(row["nats/token"]), rel=1e-12)
    assert row["bits/char"] == pytest.approx(total / math.log(2) / len(behind), rel=1e-12)
    assert row["bits/byte"] == pytest.approx(total / math.log(2) / len(behind.encode()), rel=1e-12)
    assert found["resolved"]["sha256"] == shipped.sha256


def test_every_token_is_predicted_once_from_half_a_window_or_more(
    shipped: checkpoint.Checkpoint,
) -> None:
    ids = torch.tensor(shipped.tokenizer.encode("It is the east, and Juliet is the sun. " * 3))
    counts: list[int] = []
    score = score_text(shipped.model, shipped.tokenizer, ids, 8, lambda n, nats: counts.append(n))
    expected = [float(nats(shipped.model, ids[:8]).sum())]
    for start in range(4, len(ids) - 4, 4):
        expected.append(float(nats(shipped.model, ids[start : start + 8])[3:].sum()))
    assert score.nats_per_token == pytest.approx(sum(expected) / (len(ids) - 1), rel=1e-12)
    assert sum(counts) == score.n_tokens == len(ids) - 1


def test_a_window_is_read_in_pieces_whose_logits_fit_into_memory(
    shipped: checkpoint.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor(shipped.tokenizer.encode("It is the east, and Juliet is the sun. " * 3))
    whole = score_text(shipped.model, shipped.tokenizer, ids, 16)
    widest: list[int] = []
    handle = shipped.model.register_forward_hook(
        lambda module, args, logits: widest.append(logits.shape[1])
    )
    monkeypatch.setattr(footprint, "PIECE", 5 * shipped.config.vocab_size)
    pieces = score_text(shipped.model, shipped.tokenizer, ids, 16)
    handle.remove()
    assert pieces.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-12)
    assert max(widest, default=0) <= 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "--data: is missing"),
        (["--data", "cmudict"], "--data cmudict: is pairs (the model continues texts)"),
        (["--data", "TEXT", "--beams", "2"], "--beams: is of encoder-decoders"),
        (["--data", "TEXT", "--context", "1"], "--context"),
        (["--data", "TEXT", "--context", "99999"], "--context 99,999: is beyond the context"),
        (["--data", "SHORT"], "leaves nothing to predict (tokens: 1, expected 2 or more)"),
        (["--data", "TSV", "--model", G2P, "--context", "9"], "--context: is of decoders"),
        (["--data", "TEXT", "--model", G2P], "line 1: 1 field, need 2"),
        (["--data", "TSV", "--model", G2P, "--beams", "2", "--n-best", "2"], "needs --hypotheses"),
        (["--data", "TSV", "--model", G2P, "--hypotheses", "TSV"], "is the file of --data too"),
        (["--data", "MISSING"], "not found"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(
    command: Command, tsv: Path, tmp_path: Path, given: list[str], said: str
) -> None:
    (text := tmp_path / "text.txt").write_text("To be")
    (short := tmp_path / "short.txt").write_text("T")
    names = {"TSV": tsv, "TEXT": text, "SHORT": short, "MISSING": tmp_path / "none"}
    assert said in refused(command(*(str(names.get(word, word)) for word in given)))
    assert tsv.read_text() == PAIRS


def test_the_help_explains_every_option(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert explains_every_option(command("--help"), "evaluate")


def test_one_source_is_not_several() -> None:
    said = [EvaluateReport([], "sources", n, 2.0).conclusion for n in (1, 2)]
    assert said == ["1 source in 2.0 s (0 sources/s)", "2 sources in 2.0 s (1 sources/s)"]
