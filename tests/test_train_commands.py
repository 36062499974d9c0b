"""kvtool train-lm and train-seq2seq, as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_probe import Ran, refused
from kvtool.app import _terminate
from kvtool.core import machine
from kvtool.core.train import Trainer
from kvtool.files import sha256
from small_models import answer, explains_every_option

SIZES = ["--d-model", "16", "--heads", "2", "--context", "32", "--dropout", "0"]
PLACE = ["--device", "cpu", "--threads", "1"]
FAST = [*SIZES, *PLACE, "--no-amp", "--steps", "3", "--batch-tokens", "64", "--warmup", "1"]
LM = [*FAST, "--layers", "1", "--vocab-size", "260"]
WORDS = [f"{a}{b}{a}" for a in "abcdef" for b in "xyz"] + ["an", "ox", "we", "go", "up", "is"]
Command = Callable[..., Ran]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "verse.txt"
    path.write_text("".join(f"{i} men went to mow, went to mow a meadow.\n" for i in range(460)))
    assert 18_000 < path.stat().st_size < 22_000
    return path


@pytest.fixture(scope="module")
def tsv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("".join(f"{word}\t{' '.join(word.upper())}\n" for word in WORDS))
    return path


@pytest.fixture
def lm(kv: Command, text: Path, tmp_path: Path) -> Command:
    """Run train-lm on the verse; later arguments take the place of earlier ones."""

    def call(*args: str) -> Ran:
        given = ["--data", str(text), "--out", str(tmp_path / "run"), *LM]
        return kv(*given, *args, command="train-lm")

    return call


@pytest.fixture
def seq2seq(kv: Command, tsv: Path, tmp_path: Path) -> Command:
    def call(*args: str) -> Ran:
        given = ["--data", str(tsv), "--out", str(tmp_path / "run"), *FAST, "--vocab-size", "300"]
        return kv(*given, *args, command="train-seq2seq")

    return call


@pytest.fixture(params=["lm", "seq2seq"])
def either(request: pytest.FixtureRequest) -> Command:
    return request.getfixturevalue(request.param)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send a signal to ourselves in that step."""
    report = Trainer._report

    def report_and_stop(self: Trainer, *args: Any) -> None:
        report(self, *args)
        if self.at.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_report", report_and_stop)


# A run


def test_a_run_leaves_checkpoints_a_log_and_a_plot_and_says_where(
    either: Command, tmp_path: Path
) -> None:
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
        ("auto", ["WER %", "PER %"]),
        ("char", ["WER %", "CER %"]),
        ("symbol", ["WER %", "PER %"]),
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
    assert list(json.loads(log[-1])["valid"]) == ["bleu", "bleu_lc", "chrf"]


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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
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


def test_a_loss_that_explodes_ends_with_1_and_names_the_step(lm: Command, tmp_path: Path) -> None:
    ran = lm("--quiet", "--lr", "1e30", "--eval-every", "1")
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert ran.err.startswith("kvtool: error: step ")
    assert "is nan" in ran.err or "is inf" in ran.err
    assert "Lower --lr (now 1e+30); the last good checkpoint is kept." in ran.err
    assert (tmp_path / "run" / "loss.png").is_file()


# What is refused, before anything is written

BOTH = [
    (["--lr", "0"], "--lr: 0.0 is out of range (expected above 0)"),
    (["--lr", "nan"], "--lr: nan is out of range"),
    (["--lr", "fast"], "--lr: 'fast' is not a number"),
    (["--steps", "0"], "--steps: 0 is too small (expected 1 or more)"),
    (["--steps", "1.5"], "--steps: '1.5' is not a whole number"),
    (["--minutes", "1"], "--steps, --epochs, --minutes: give one (found --steps and --minutes)"),
    (["--heads", "3"], "--heads: 3 heads do not divide --d-model 16"),
    (["--heads", "0"], "--heads: 0 is too small"),
    (["--d-model", "-8"], "--d-model: -8 is too small"),
    (["--context", "0"], "--context: 0 is too small"),
    (["--dropout", "1"], "--dropout: 1.0 is out of range (expected 0 or more and 0.99 or less)"),
    (["--positions", "rotory"], "Did you mean rotary?"),
    (["--schedule", "cosinus"], "Did you mean cosine?"),
    (["--clip", "0"], "--clip: 0.0 is out of range"),
    (["--warmup", "-1"], "--warmup: -1 is too small"),
    (["--weight-decay", "-1"], "--weight-decay: -1.0 is out of range"),
    (["--eval-every", "0"], "--eval-every: 0 is too small"),
    (["--patience", "-1"], "--patience: -1 is too small"),
    (["--batch-tokens", "0"], "--batch-tokens: 0 is too small"),
    (["--vocab-size", "0"], "--vocab-size: 0 is too small"),
    (["--seed", "-1"], "--seed: -1 is too small"),
    (["--device", "gpu"], "--device: 'gpu' is not known"),
    (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--data", "/dev/null"], "/dev/null: is not a regular file"),
    (["--data", "."], "is a folder"),
    (["--output", "report.doc"], "--output report.doc: unknown format"),
    (["--out", "/dev/null/run"], "--out /dev/null/run: cannot be written (Not a directory)"),
    (["--resume"], "holds no run to resume. Leave out --resume."),
]


@pytest.mark.parametrize(("args", "said"), BOTH, ids=lambda value: "".join(value)[:24])
def test_what_means_nothing_is_refused_in_one_line_before_anything_is_written(
    either: Command, tmp_path: Path, args: list[str], said: str
) -> None:
    assert said in refused(either("--quiet", *args))
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_refused_where_it_is_not_installed_before_any_work(
    either: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = refused(either("--quiet", "--tensorboard", "--data", "nowhere.txt"))
    assert message.startswith("--tensorboard: TensorBoard cannot be used (")
    assert message.endswith("). Install it with pip install tensorboard.")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_that_cannot_be_used_is_refused_before_the_data_are_read(
    either: Command, tmp_path: Path, resume: list[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "holiday.jpg").touch()
    said = "holds no run to resume" if resume else "is not empty (found holiday.jpg)"
    ran = either(*resume, "--data", "nowhere.txt")
    assert f"--out {tmp_path / 'run'}: {said}" in refused(ran)


def test_a_text_is_needed_and_room_for_all_bytes(kv: Command, lm: Command) -> None:
    assert refused(kv(*LM, command="train-lm")).startswith("--data: is missing. Give a text file")
    assert refused(lm("--vocab-size", "255")).startswith("--vocab-size: 255 is too small")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty, 0 bytes"),
        (b"good\nb\xffd\n", "is not UTF-8 (byte 0xff at offset 6)"),
        (b"short", "the text is too short"),
    ],
)
def test_a_text_that_cannot_be_learned_from_is_refused(
    lm: Command, tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert said in refused(lm("--data", str(path)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\tb\n" * 16 + b"lonely\n", "pairs.tsv: line 17: 1 field, need 2"),
        (b"a\tb\nc\t\xe9\n", "line 2: is not UTF-8 (byte 0xe9 at offset 6)"),
        (b"", "is empty, 0 bytes"),
        (b"\n\n", "holds no pairs (2 blank lines"),
        (b"a\tb\n" + b"x" * 33 + b"\tc\n", "makes 33 tokens (the model holds 32)"),
    ],
)
@pytest.mark.parametrize("flag", ["--data", "--valid", "--test"])
def test_pairs_that_cannot_be_read_are_refused_wherever_they_are(
    seq2seq: Command, tmp_path: Path, content: bytes, said: str, flag: str
) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    assert said in refused(seq2seq("--quiet", "--tokenizer", "char", flag, str(path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tokenizer", "chars"], "Did you mean char?"),
        (["--label-smoothing", "1"], "--label-smoothing: 1.0 is out of range"),
        (["--encoder-layers", "0"], "--encoder-layers: 0 is too small (expected 1 or more)"),
        (["--decoder-layers", "0"], "--decoder-layers: 0 is too small"),
        (["--data", ""], "--data: is empty"),
        (["--data", "cmudit"], "Did you mean cmudict?"),
        (["--tokenizer", "bpe", "--vocab-size", "9"], "--vocab-size: 9 is too small"),
    ],
)
def test_what_means_nothing_for_pairs_is_refused(
    seq2seq: Command, args: list[str], said: str
) -> None:
    assert said in refused(seq2seq("--quiet", *args))


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


@pytest.mark.parametrize("command", ["lm", "seq2seq"])
def test_the_parts_of_modern_decoders_can_be_trained_and_are_written_down(
    request: pytest.FixtureRequest, tmp_path: Path, command: str
) -> None:
    words = "--n-kv-heads 1 --norm rmsnorm --activation swiglu --positions rotary"
    assert request.getfixturevalue(command)(*words.split()).code == 0
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    found = [config[name] for name in ("n_kv_heads", "norm", "activation", "positions")]
    assert found == [1, "rmsnorm", "swiglu", "rotary"]
    assert "--norm: 'batch' is not known" in refused(
        request.getfixturevalue(command)("--norm", "batch", "--out", str(tmp_path / "b"))
    )
