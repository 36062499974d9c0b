"""What kvtool generate refuses, in one line and before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import generate_cases
from cli_probe import Ran, refused
from kvtool.commands.generate import prompts
from kvtool.core.checkpoint import checkpoint
from kvtool.core.text.tokenizer import Tokenizer
from small_models import WORDS, change_weights, random_model, with_nan

decoder, seq2seq, generate, stdin = (
    generate_cases.decoder,
    generate_cases.seq2seq,
    generate_cases.generate,
    generate_cases.stdin,
)


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max-tokens 0", "--max-tokens: 0 is too small"),
        ("--max-tokens -1", "--max-tokens: -1 is too small"),
        (
            "--max-tokens 1000000000",
            "--max-tokens 1,000,000,000: is beyond the context (the model holds 64)",
        ),
        (
            "--max-tokens 63",
            "the prompt is 2 tokens and 63 more were asked for (the model holds 64)",
        ),
        ("--temperature -1", "--temperature: -1.0 is out of range"),
        ("--temperature nan", "--temperature: nan is out of range"),
        ("--temperature inf", "--temperature: inf is out of range"),
        ("--top-p 0", "--top-p: 0.0 is out of range"),
        ("--top-p 1.1", "--top-p: 1.1 is out of range"),
        ("--length-penalty 1", "--length-penalty: needs --beams 2 or more"),
        ("--top-k -1", "--top-k: -1 is too small"),
        ("--top-k 261", "--top-k: 261 is above the vocabulary of 260"),
        ("--seed -1", "--seed: -1 is too small"),
        ("--cache ring", "--cache: 'ring' is not known"),
        (
            "--kernels exakt",
            "--kernels: 'exakt' is not known (expected one of default, exact). Did you mean exact?",
        ),
        ("--device cuda", "--device cuda: there is no CUDA device here"),
        ("--dtype float8", "--dtype: 'float8' is not known"),
        (
            "--output a.xyz",
            "--output a.xyz: unknown format (found .xyz, expected .txt, .json, .csv, .md)",
        ),
        ("--output .", "--output .: is a folder (expected a file)"),
        ("--output no/a.txt", "--output no/a.txt: the folder"),
        ("--output no/a.json", "--output no/a.json: the folder"),
        ("--prompt-file a.txt", "--prompt: contradicts --prompt-file"),
        ("--input a.txt", "--prompt: contradicts --input"),
    ],
)
def test_wrong_usage_is_exit_2_and_one_line(
    generate: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(generate("--prompt", "hi", *words.split())).startswith(message)


def test_an_output_that_is_a_folder_is_refused_before_any_work(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").mkdir()
    message = refused(generate("--prompt", "hi", "--output", str(tmp_path / "a.txt")))
    assert message.endswith("a.txt: is a folder (expected a file)")


def test_a_prompt_longer_than_the_context_is_refused_and_not_cut(
    generate: Callable[..., Ran],
) -> None:
    message = refused(generate("--prompt", "x" * 65))
    assert "the prompt is 65 tokens" in message and "(the model holds 64)" in message


def test_an_empty_prompt_is_refused_wherever_it_is_from(
    generate: Callable[..., Ran], stdin: Callable[[bytes], None], tmp_path: Path, seq2seq: Path
) -> None:
    path = tmp_path / "in.txt"
    assert refused(generate("--prompt", "")) == "--prompt: is empty (expected TEXT)"
    stdin(b"\n")
    assert refused(generate()) == "stdin: is empty (expected a prompt)"
    path.write_bytes(b"\n")
    assert (
        refused(generate("--input", str(path))) == f"{path}: holds no prompt (found 1 blank line)"
    )
    path.write_bytes(b"\n \n\n")
    message = f"{path}: holds no prompt (found 3 blank lines)"
    assert refused(generate("--input", str(path))) == message
    path.write_bytes(b"")
    for flag in ("--input", "--prompt-file"):
        assert "is empty, 0 bytes" in refused(generate(flag, str(path)))
    path.write_bytes(b"\xef\xbb\xbf")
    assert refused(generate("--input", str(path))) == f"{path}: holds no prompt (found no line)"
    assert refused(generate("--prompt-file", str(path))) == f"{path}: is empty (expected a prompt)"
    stdin(b" \n\n")
    message = "stdin: holds no prompt (found 2 blank lines)"
    assert refused(generate(model=seq2seq)) == message


def test_a_file_that_is_not_there_is_named_with_its_flag_and_what_to_do(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "none.txt"
    for flag, what in (("--prompt-file", "a prompt"), ("--input", "a file of prompts")):
        message = refused(generate(flag, str(path)))
        assert message == f"{flag} {path}: not found (expected {what}). Check the path."


def test_a_line_that_does_not_fit_is_named(generate: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("one\n" + "x" * 70 + "\n")
    message = refused(generate("--input", str(path), "--max-tokens", "9"))
    assert message.startswith(f"{path}: line 2: the prompt is 70 tokens and 9 more were asked for")


def test_prompts_are_bounded_wherever_they_are_from(
    generate: Callable[..., Ran],
    stdin: Callable[[bytes], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\n" + "b" * 99 + "\n")
    monkeypatch.setattr(prompts, "LONGEST_PROMPT", 98)
    too_long = "characters (expected 98 or fewer)"
    assert refused(generate("--input", str(file))) == f"{file}: line 2: has 99 {too_long}"
    assert refused(generate("--prompt-file", str(file))) == f"{file}: has 102 {too_long}"
    stdin(b"c" * 99)
    assert refused(generate()) == f"stdin: has 99 {too_long}"
    monkeypatch.setattr(prompts, "MAX_LINES", 1)
    assert refused(generate("--input", str(file))).endswith("holds 2 lines (expected 1 or fewer)")
    monkeypatch.setattr(prompts, "MAX_INPUT_BYTES", 50)
    for flag in ("--input", "--prompt-file"):
        found = refused(generate(flag, str(file)))
        assert found.startswith(f"{flag} {file}: is too large for a") and "102 bytes" in found
    stdin(b"c" * 51)
    assert refused(generate()) == "stdin: has more than 50 bytes (expected prompts)"


def test_a_prompt_without_a_token_is_refused(generate: Callable[..., Ran], tmp_path: Path) -> None:
    tokenizer = Tokenizer.train("word", WORDS)
    checkpoint.save(tmp_path, random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    message = refused(generate("--prompt", "  ", model=tmp_path))
    assert message == "the prompt holds no token (found '  ')"


def test_bytes_that_are_not_utf8_are_refused_with_their_place(
    generate: Callable[..., Ran], stdin: Callable[[bytes], None], tmp_path: Path
) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"ab\xffc\n")
    stdin(path.read_bytes())
    for words in ([], ["--prompt-file", str(path)], ["--input", str(path)]):
        message = refused(generate(*words))
        assert "is not UTF-8 (byte 0xff at offset 2)" in message


def test_nan_weights_are_exit_2_and_name_the_tensor(
    generate: Callable[..., Ran], decoder: Path, tmp_path: Path
) -> None:
    message = refused(
        generate("--prompt", "hi", model=change_weights(decoder, tmp_path / "nan", with_nan))
    )
    assert "layers.0.mlp.up.weight holds 1 NaN" in message
