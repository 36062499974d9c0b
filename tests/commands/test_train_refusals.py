"""What kvtool train-lm and train-seq2seq refuse, before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import training_commands as commands
from cli_probe import refused
from training_commands import LM, Command

text, tsv, lm, seq2seq, either = (
    commands.text,
    commands.tsv,
    commands.lm,
    commands.seq2seq,
    commands.either,
)


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


def not_utf8(folder: Path) -> str:
    """A file that is there, and is refused as soon as it is read."""
    path = folder / "unreadable.txt"
    path.write_bytes(b"\xff")
    return str(path)


def test_tensorboard_is_refused_where_it_is_not_installed_before_any_work(
    either: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    unreadable = not_utf8(tmp_path)
    message = refused(either("--quiet", "--tensorboard", "--data", unreadable))
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
    ran = either(*resume, "--data", not_utf8(tmp_path))
    assert f"--out {tmp_path / 'run'}: {said}" in refused(ran)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--context 1", "--context: 1 is too small (expected 2 or more)"),
        ("--batch-tokens 31", "--batch-tokens: 31 is less than one sequence of --context 32. Give"),
    ],
)
def test_a_step_of_train_lm_has_room_for_a_sequence_that_predicts_something(
    lm: Command, words: str, said: str
) -> None:
    assert refused(lm(*words.split())).startswith(said)


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
