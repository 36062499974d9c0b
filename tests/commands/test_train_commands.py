"""kvtool train-lm and train-seq2seq, as a user meets them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import training_commands as commands
from cli_probe import refused
from kvtool import ending
from kvtool.commands.train.lm import opening
from kvtool.core import machine
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.core.training.train import Trainer
from kvtool.reading import sha256
from kvtool.ui import plots
from small_models import answer, explains_every_option
from training_commands import LM, LOSS_PLOT, PLACE, WORDS, Command

text, tsv, lm, seq2seq, either = (
    commands.text,
    commands.tsv,
    commands.lm,
    commands.seq2seq,
    commands.either,
)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send a signal to ourselves in that step."""
    report = Trainer._report

    def report_and_stop(self: Trainer, *args: Any) -> None:
        report(self, *args)
        if self.at.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_report", report_and_stop)


# A run


def test_the_plot_of_a_run_names_the_command_the_format_and_the_machine(
    either: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(plots, "loss_plot", lambda *args: titles.append(args[5]))
    either()
    (title,) = titles
    first, second = title.splitlines()
    assert first.startswith("kvtool train-") and first.endswith(str(tmp_path / "run"))
    assert second.startswith("float32") and "1 thread" in second


def test_a_run_leaves_checkpoints_a_log_and_a_plot_and_says_where(
    either: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "loss_plot", LOSS_PLOT)
    ran = either()
    out = tmp_path / "run"
    assert ran.code == 0, ran.err
    for folder in (out / "best", out / "last"):
        assert (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3] and "valid" in lines[-1]
    picture = (out / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
    assert min(struct.unpack(">II", picture[16:24])) > 400
    assert "best checkpoint" in ran.out and f"checkpoint: {out / 'best'}" in ran.out
    assert f"loss curve: {out / 'loss.png'}" in ran.out and "3 steps, " in ran.out
    assert "step 3: " in ran.err and f"hint: kvtool generate --model {out / 'best'}" in ran.err


def test_the_hint_after_a_run_works_when_it_is_copied(
    either: Command, kv: Command, tmp_path: Path
) -> None:
    ran = either("--out", str(tmp_path / "a run"))
    words = shlex.split(ran.err.splitlines()[-1].removeprefix("hint: "))
    assert words[:2] == ["kvtool", "generate"]
    copied = kv(*words[2:], *PLACE, "--max-tokens", "5", command="generate")
    assert copied.code == 0 and "warning" not in copied.err, copied.err


@pytest.mark.parametrize(
    ("text", "context", "expected"),
    [
        ("\n\n  Once upon a time.", 64, "Once upon a"),
        ("abc", 2, "a"),
        ("\u00e9t\u00e9", 2, "\u00e9"),
        (" \x00 ", 64, "The"),
    ],
)
def test_a_text_is_continued_from_its_first_words_as_far_as_they_fit(
    text: str, context: int, expected: str
) -> None:
    assert opening(text, Tokenizer.train("bpe", ["x"], 256, specials=False), context) == expected


def test_the_document_has_the_scores_the_settings_and_the_weights(
    lm: Command, tmp_path: Path
) -> None:
    document = answer(lm("--json"))
    assert document["schema"] == "kvtool.train-lm/1" and document["exit_code"] == 0
    (row,) = document["scores"]
    assert (row["data"], row["split"]) == ("verse.txt", "last 10 %")
    assert 1800 < row["chars"] < 2200 and 0 < row["nats/token"] < 8 and row["bits/char"] > 0
    assert (document["steps"], document["best_step"]) == (3, 3)
    assert document["tokens"] > 0 and document["parameters"] > 3000
    assert document["settings"]["train"]["length"]["steps"] == 3
    assert document["settings"]["model"]["d_model"] == 16
    best = tmp_path / "run" / "best" / "model.safetensors"
    assert document["sha256"] == sha256(best) and document["best"] == str(best.parent)


@pytest.mark.parametrize(
    ("kind", "figures"),
    [
        ("auto", ["WER %", "SER %"]),  # the symbols are no phones
        ("char", ["WER %", "CER %"]),
        ("symbol", ["WER %", "SER %"]),
        ("word", ["BLEU", "BLEU lc", "chrF", "signatures"]),
        ("bpe", ["BLEU", "BLEU lc", "chrF", "signatures"]),
    ],
)
def test_pairs_are_learned_with_every_tokenizer_and_a_test_file_is_scored(
    seq2seq: Command, tmp_path: Path, kind: str, figures: list[str]
) -> None:
    test = tmp_path / "test.tsv"
    test.write_text("".join(f"{word}{word}\tA B\n" for word in WORDS[:3]))
    document = answer(seq2seq("--tokenizer", kind, "--test", str(test), "--json"))
    dev, scored, searched = document["scores"]
    assert (dev["part"], dev["sources"]) == ("dev", 1) and "index % 20 = 19" in dev["data"]
    assert (scored["part"], scored["sources"], scored["data"]) == ("test", 3, str(test))
    decodings = [row["decoding"] for row in document["scores"]]
    assert decodings == ["greedy", "greedy", "beam 4"]
    for row in (dev, scored, searched):
        assert list(row) == ["part", "data", "sources", "decoding", *figures]
        assert all(row[name] >= 0 for name in figures if name != "signatures")
        assert list(row.get("signatures", figures[:3])) == figures[:3]
    assert document["schema"] == "kvtool.train-seq2seq/1"


def test_translations_are_scored_by_bleu_and_its_signatures_stand_once_under_the_table(
    seq2seq: Command, tmp_path: Path
) -> None:
    pairs, test = tmp_path / "pairs.tsv", tmp_path / "test.tsv"
    pairs.write_text("".join(f"{word}\tdas ist {word} und gut\n" for word in WORDS))
    test.write_text("ox\tdas ist ox und gut\nup\tdas ist up und gut\nup\tso ist das eben\n")
    ran = seq2seq("--tokenizer", "bpe", "--data", str(pairs), "--test", str(test))
    assert ran.code == 0, ran.err
    assert "step 3: bleu " in ran.err
    table, *under = ran.out.split("BLEU|")
    assert all(name in table for name in ("BLEU", "BLEU lc", "chrF")) and "nrefs" not in table
    assert len(under) == 2 and ran.out.count("nrefs:1|") == ran.out.count("nrefs:var|") == 3
    assert under[0].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    lines = ran.out.splitlines()
    ends = [line[line.rindex(" (") :] for line in lines if "|version:" in line]
    assert ends == [" (dev)"] * 3 + [" (test)"] * 3
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert list(json.loads(log[-1])["valid"]) == ["bleu", "bleu_lc", "chrf", "loss"]


def test_rates_are_told_in_percent_and_other_scores_are_not(
    lm: Command, seq2seq: Command, tmp_path: Path
) -> None:
    said = seq2seq().err
    assert re.search(r"^step 3: ser [\d.]+ %, wer [\d.]+ %", said, flags=re.MULTILINE)
    assert "%" not in lm("--out", str(tmp_path / "lm")).err


def test_quiet_leaves_the_result_alone_and_a_file_takes_the_document(
    either: Command, tmp_path: Path
) -> None:
    ran = either("--quiet", "--output", str(tmp_path / "result.json"))
    assert (ran.code, ran.err) == (0, "") and "best checkpoint" in ran.out
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 3


@pytest.mark.parametrize("prompt", ["3 men", "axa"])
def test_what_was_trained_generates(
    lm: Command, seq2seq: Command, kv: Command, tmp_path: Path, prompt: str
) -> None:
    assert (lm if " " in prompt else seq2seq)().code == 0
    words = ["--model", str(tmp_path / "run" / "best"), "--prompt", prompt, "--max-tokens", "5"]
    document = answer(kv(*words, *PLACE, "--json", command="generate"))
    assert document["results"][0]["prompt"] == prompt


@pytest.mark.parametrize("command", ["train-lm", "train-seq2seq"])
def test_the_help_explains_every_option(kv: Command, command: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert explains_every_option(kv("--help", command=command), command)


# Stopping and going on


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_weights(
    either: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    word: str,
) -> None:
    ending.listen()
    whole = answer(either("--json", "--out", str(tmp_path / "whole")))
    stop_at(monkeypatch, 2, number)
    ran = either()
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.endswith(f"stopped at step 2; go on with --resume\nkvtool: {word}\n")
    assert (tmp_path / "run" / "loss.png").is_file()
    assert "is not empty" in refused(either("--quiet"))
    again = either("--json", "--resume")
    assert "resumed at step 2" in again.err
    assert answer(again)["sha256"] == whole["sha256"]
    assert answer(again)["scores"] == whole["scores"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--lr", "0.1"], "lr was 0.002 and is now 0.1"),
        (["--d-model", "32"], "model.d_model was 16 and is now 32. Resume with"),
        (["--dropout", "0.5"], "model.dropout was 0.0 and is now 0.5"),
        (["--steps", "4"], "length.steps was 3 and is now 4"),
        (["--batch-tokens", "65"], "batch_tokens was 64 and is now 65"),
        (["--vocab-size", "261"], "model.vocab_size was 260 and is now 261"),
        (["--data", "OTHER"], "data_sha256 was "),
    ],
)
def test_a_run_is_resumed_with_its_own_settings_only(
    lm: Command, text: Path, tmp_path: Path, change: list[str], said: str
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "And so on.\n")
    assert lm().code == 0
    words = [str(other) if word == "OTHER" else word for word in change]
    message = refused(lm("--quiet", "--resume", *words))
    assert message.startswith("--resume: ") and said in message


@pytest.mark.parametrize(
    ("lr", "kept"),
    [
        ("1000", "the last good checkpoint is kept."),  # weight decay multiplies by -99 a step
        ("1e+30", "no checkpoint was saved yet: remove the folder, or give another --out."),
    ],
)
def test_a_loss_that_explodes_ends_with_1_and_names_the_step(
    lm: Command, tmp_path: Path, lr: str, kept: str
) -> None:
    ran = lm("--quiet", "--lr", lr, "--eval-every", "1", "--steps", "40")
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert ran.err.startswith("kvtool: error: step ")
    assert "is nan" in ran.err or "is inf" in ran.err
    assert f"Lower --lr (now {lr}); {kept}" in ran.err
    assert (tmp_path / "run" / "best").exists() == kept.startswith("the last")
    assert (tmp_path / "run" / "loss.png").is_file()


def test_one_pair_is_enough_and_it_is_said_what_the_score_is_of(
    seq2seq: Command, tmp_path: Path
) -> None:
    path = tmp_path / "one.tsv"
    path.write_bytes(b"\xef\xbb\xbfab\tA B\r\n\r\n")
    ran = seq2seq("--data", str(path))
    assert ran.code == 0, ran.err
    assert "1 blank line skipped" in ran.err and "dev scores are on the training data" in ran.err


@pytest.mark.parametrize(
    ("words", "has", "amp"),
    [([], True, True), ([], False, False), (["--amp"], False, True), (["--no-amp"], True, False)],
)
def test_products_are_in_bfloat16_where_the_hardware_has_them_or_as_asked(
    kv: Command,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    has: bool,
    amp: bool,
) -> None:
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda device: has)
    given = [word for word in LM if word != "--no-amp"]
    out = tmp_path / "run"
    ran = kv("--data", str(text), "--out", str(out), *given, *words, command="train-lm")
    assert ran.code == 0
    assert json.loads((out / "run.json").read_text())["amp"] is amp


@pytest.mark.parametrize("given", [(), ("--tied",), ("--untied",)])
@pytest.mark.parametrize(("command", "default"), [("lm", True), ("seq2seq", False)])
def test_the_head_is_tied_as_asked_or_as_suits_the_task(
    request: pytest.FixtureRequest, tmp_path: Path, command: str, default: bool, given: tuple[str]
) -> None:
    assert request.getfixturevalue(command)(*given).code == 0
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert config["tied"] is (default if not given else given == ("--tied",))


@pytest.mark.parametrize("command", ["lm", "seq2seq"])
def test_the_parts_of_modern_decoders_can_be_trained_and_are_written_down(
    request: pytest.FixtureRequest, tmp_path: Path, command: str
) -> None:
    words = "--n-kv-heads 1 --norm rmsnorm --activation swiglu --positions rotary"
    assert request.getfixturevalue(command)(*words.split()).code == 0
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    names = ("n_kv_heads", "norm", "activation", "positions")
    assert [config[name] for name in names] == [1, "rmsnorm", "swiglu", "rotary"]
    assert "--norm: 'batch' is not known" in refused(
        request.getfixturevalue(command)("--norm", "batch", "--out", str(tmp_path / "b"))
    )


def with_best(run: Path, other: Path, known: bool) -> None:
    """Put `other` in place of best/; `known`: so that the state of the run names its weights."""
    shutil.rmtree(run / "best")
    shutil.copytree(other, run / "best")
    for path in run.glob("state-*.pt") if known else ():
        state = torch.load(path, weights_only=True)
        state["position"]["best_sha256"] = sha256(run / "best" / "model.safetensors")
        torch.save(state, path)
        digest = sha256(path)[:16]
        path.rename(run / f"{path.name[:16]}{digest}.pt")


@pytest.mark.parametrize("known", [False, True], ids=["in best/ alone", "in the state too"])
@pytest.mark.parametrize("kind", ["lm", "seq2seq"])
@pytest.mark.parametrize("other", ["lm", "seq2seq"])
def test_another_model_in_place_of_the_best_is_not_reported_as_the_runs_own(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, other: str, known: bool
) -> None:
    more = ["--d-model", "32"] if other == kind else []
    theirs = request.getfixturevalue(other)
    assert theirs("--out", str(tmp_path / "other"), "-q", *more).code == 0
    ours = request.getfixturevalue(kind)
    assert ours("-q").code == 0
    with_best(tmp_path / "run", tmp_path / "other" / "best", known)
    message = refused(ours("-q", "--resume"))
    what = "configuration or tokenizer" if known else "SHA-256 of model.safetensors"
    said = f"is not the best checkpoint that the run saved, at step 3 (another {what})"
    assert message.startswith(f"{tmp_path / 'run' / 'best'}: {said}")


def test_the_same_weights_with_another_tokenizer_are_not_the_runs_own(
    lm: Command, text: Path, tmp_path: Path
) -> None:
    assert lm("-q").code == 0
    path = tmp_path / "run" / "best" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    assert "(another configuration or tokenizer)" in refused(lm("-q", "--resume"))


def test_a_run_whose_best_is_gone_is_named_before_it_goes_on(
    either: Command, tmp_path: Path
) -> None:
    assert either("-q").code == 0
    shutil.rmtree(tmp_path / "run" / "best")
    message = refused(either("-q", "--resume"))
    said = "its best checkpoint is missing (best/, of step 3)"
    assert message == f"--out {tmp_path / 'run'}: {said}. Put it back, or start a new run."
