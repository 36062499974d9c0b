"""kvtool generate, as a user meets it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import generate_cases
from cli_probe import HANGS, Ran, refused
from generate_cases import texts
from kvtool.commands.generate.results import one_line
from kvtool.core.checkpoint import checkpoint
from kvtool.core.kernels.default import DefaultKernels
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.registry import CACHES
from kvtool.ui.output import Output
from small_models import WORDS, answer, explains_every_option, random_model

decoder, seq2seq, generate, stdin = (
    generate_cases.decoder,
    generate_cases.seq2seq,
    generate_cases.generate,
    generate_cases.stdin,
)


# The text


def test_stdout_is_the_text_and_the_document_holds_the_same(generate: Callable[..., Ran]) -> None:
    words = ["--prompt", "To be", "--max-tokens", "40"]
    shown, document = generate(*words), answer(generate(*words, "--json"))
    (result,) = document["results"]
    assert shown.out == result["text"] + "\n"
    assert document["schema"] == "kvtool.generate/1"
    assert (result["prompt"], result["prompt_tokens"], result["new_tokens"]) == ("To be", 3, 40)
    assert not result["ended"]
    assert document["settings"]["run"]["seed"] == 0 and document["cache_bytes"] > 0
    assert "40 tokens in" in shown.err and "dynamic cache" in shown.err


def test_text_is_shown_as_it_comes(
    generate: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr(Output, "stream", lambda self, text: pieces.append(text))
    generate("--prompt", "To be", "--max-tokens", "40")
    monkeypatch.undo()
    assert len([piece for piece in pieces if piece]) > 10
    assert "".join(pieces) == generate("--prompt", "To be", "--max-tokens", "40").out


def test_the_same_seed_gives_the_same_text_and_another_seed_another(
    generate: Callable[..., Ran],
) -> None:
    words = ["--prompt", "To be", "--max-tokens", "30", "--seed"]
    assert generate(*words, "7").out == generate(*words, "7").out
    assert generate(*words, "7").out != generate(*words, "8").out


def test_a_result_does_not_depend_on_those_before_it(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("first\nTo be\n")
    alone = texts(generate("--prompt", "To be", "--max-tokens", "20", "--json"))
    assert texts(generate("--input", str(path), "--max-tokens", "20", "--json"))[1:] == alone


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_the_greedy_text_is_the_same_with_every_cache(
    generate: Callable[..., Ran], dtype: str
) -> None:
    words = ["--prompt", "To be", "--max-tokens", "50", "--temperature", "0", "--dtype", dtype]
    found = {kind: generate(*words, "--cache", kind).out for kind in CACHES}
    if dtype in ("float32", "float64"):  # in the others rounding may choose another token
        assert len(set(found.values())) == 1
    assert all(len(text) > 10 for text in found.values())


@pytest.mark.parametrize("folder", ["decoder", "seq2seq"])
def test_exact_kernels_choose_the_same_tokens_with_every_cache_in_every_format(
    generate: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    folder: str,
) -> None:
    """Even where rounding would tell the caches apart; and the default kernels are never asked."""
    monkeypatch.delattr(DefaultKernels, "per_token")
    monkeypatch.delattr(DefaultKernels, "attention")
    words = ["--prompt", "jail", "--max-tokens", "40", "--temperature", "0", "--kernels", "exact"]
    for dtype in ("bfloat16", "float16", "float32"):
        found = {}
        for kind in ("none", "dynamic", "static"):
            given = [*words, "--json", "--dtype", dtype, "--cache", kind]
            document = answer(generate(*given, model=request.getfixturevalue(folder)))
            assert document["settings"]["kernels"] == "exact"
            found[kind] = document["results"]
        assert found["none"] == found["dynamic"] == found["static"]


def test_the_greedy_token_is_the_likeliest(generate: Callable[..., Ran], decoder: Path) -> None:
    loaded = checkpoint.load(str(decoder), torch.device("cpu"), torch.float32)
    ids = loaded.tokenizer.encode("To be")
    with torch.inference_mode():
        for _ in range(12):
            ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
    expected = loaded.tokenizer.decode(ids[3:])
    words = ["--max-tokens", "12", "--json", "--prompt", "To be"]
    assert texts(generate(*words, "--temperature", "0")) == [expected]
    assert texts(generate(*words, "--top-k", "1")) == [expected]
    assert texts(generate(*words, "--top-p", "1e-9")) == [expected]


def test_without_max_tokens_the_context_is_filled_and_not_exceeded(
    generate: Callable[..., Ran],
) -> None:
    (result,) = answer(generate("--prompt", "x" * 60, "--json"))["results"]
    assert (result["prompt_tokens"], result["new_tokens"]) == (60, 4)


def test_a_model_that_marks_an_end_stops_there(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.train("char", WORDS)
    model = random_model(vocab_size=tokenizer.vocab_size, tied=False)
    with torch.no_grad():  # every logit is 0, but the end's
        model.norm.weight.zero_()
        model.norm.bias.fill_(1.0)
        model.head.weight.zero_()
        model.head.weight[tokenizer.eos_id] = 9.0
    checkpoint.save(tmp_path, model, tokenizer)
    (result,) = answer(generate("--prompt", "fig", "--json", model=tmp_path))["results"]
    assert (result["text"], result["new_tokens"], result["ended"]) == ("", 1, True)


# Where prompts come from


def test_a_prompt_is_the_same_from_every_source(
    generate: Callable[..., Ran], stdin: Callable[[bytes], None], tmp_path: Path
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffTo be,\nÖ".encode())
    words = ["--json", "--max-tokens", "9"]
    given = answer(generate(*words, "--prompt", "To be,\nÖ"))["results"]
    assert answer(generate(*words, "--prompt-file", str(path)))["results"] == given
    stdin(path.read_bytes())
    assert answer(generate(*words))["results"] == given


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", " \n"])
def test_a_line_break_at_the_end_of_a_file_is_part_of_the_prompt_and_one_of_a_pipe_is_not(
    generate: Callable[..., Ran], stdin: Callable[[bytes], None], tmp_path: Path, end: str
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(f"To be{end}".encode())
    words = ["--json", "--max-tokens", "5", "--seed", "4"]
    given = answer(generate(*words, "--prompt", f"To be{end}"))["results"]
    assert answer(generate(*words, "--prompt-file", str(path)))["results"] == given
    stdin(path.read_bytes())
    one_less = end.removesuffix("\n").removesuffix("\r")
    (piped,) = answer(generate(*words))["results"]
    assert piped["prompt"] == f"To be{one_less}"


def test_a_real_pipe_is_read(decoder: Path, warm_python: Callable[..., str]) -> None:
    command = [warm_python(), "-m", "kvtool", "generate", "--model", str(decoder), "--json"]
    done = subprocess.run(
        [*command, "--max-tokens", "3"], input=b"To be", capture_output=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["prompt"] == "To be"


def test_a_terminal_on_stdin_and_no_prompt_is_refused_and_does_not_hang(
    generate: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert refused(generate()).startswith("--prompt: is missing (stdin is a terminal)")
    monkeypatch.setattr(sys, "stdin", None)
    assert refused(generate()).startswith("--prompt: is missing")


def test_the_results_of_a_file_are_one_a_line_in_order(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"one\r\ntwo\nt\x0c\x1c\n")
    words = ["--input", str(path), "--max-tokens", "60", "--temperature", "3"]
    shown, document = generate(*words), answer(generate(*words, "--json"))
    assert [r["prompt"] for r in document["results"]] == ["one", "two", "t\x0c\x1c"]
    found = [result["text"] for result in document["results"]]
    assert any("\n" in text for text in found)
    lines = shown.out.removesuffix("\n").split("\n")
    assert lines == [one_line(text) for text in found]
    assert one_line("a\\n\r\n") == "a\\\\n\\r\\n"


@pytest.mark.parametrize("words", ["", "--beams 3", "--beams 3 --n-best 2"])
@pytest.mark.parametrize("folder", ["decoder", "seq2seq"])
def test_a_blank_line_is_answered_by_a_blank_one_and_the_others_as_ever(
    generate: Callable[..., Ran],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    words: str,
    folder: str,
) -> None:
    path = tmp_path / "in.txt"
    model = request.getfixturevalue(folder)
    given = ["--input", str(path), "--max-tokens", "5", *words.split()]
    path.write_text("jail\nfig\n")
    expected = answer(generate(*given, "--json", model=model))["results"]
    path.write_text("\njail\n \t\n\nfig\n\n")
    ran = generate(*given, "--json", model=model)
    assert ran.err.splitlines()[0] == f"{path}: lines 1, 3, 4, 6 blank, and so in the results"
    found = answer(ran)["results"]
    answered = [result for result in found if result["number"] in (2, 5)]
    assert answered == [{**r, "number": {1: 2, 2: 5}[r["number"]]} for r in expected]
    blank = [(r["number"], r["rank"], r["text"]) for r in found if r["number"] not in (2, 5)]
    assert blank == [(number, 1, "") for number in (1, 3, 4, 6)]
    shown = generate(*given, model=model).out
    ends = [line.rpartition("\t")[2] for line in shown.splitlines()]
    assert ends == [one_line(result["text"]) for result in found]


def test_blank_lines_on_stdin_are_no_sources(
    generate: Callable[..., Ran], seq2seq: Path, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"jail\n\nfig\r\n\n")
    found = answer(generate("--json", model=seq2seq))["results"]
    assert [result["prompt"] for result in found] == ["jail", "", "fig", ""]


@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv", ".md"])
@pytest.mark.parametrize("as_json", [False, True])
def test_results_go_to_a_file_and_then_not_to_stdout_too(
    generate: Callable[..., Ran], tmp_path: Path, suffix: str, as_json: bool
) -> None:
    path, out = tmp_path / "in.txt", tmp_path / f"out{suffix}"
    path.write_text("one\ntwo\n")
    words = ["--input", str(path), "--max-tokens", "5", "--top-k", "1"]
    found = texts(generate(*words, "--json"))
    ran = generate(*words, "--output", str(out), *(["--json"] if as_json else []))
    assert ran.code == 0 and f"written to {out}" in ran.err
    assert (ran.out == "") != as_json
    content = out.read_text(encoding="utf-8")
    if suffix == ".txt":
        assert len(content.splitlines()) == len(found) == 2
    elif suffix == ".json":
        assert [result["text"] for result in json.loads(content)["results"]] == found
    else:
        assert "new_tokens" in content and "two" in content


def test_quiet_leaves_stderr_empty(generate: Callable[..., Ran]) -> None:
    assert generate("-q", "--prompt", "To be", "--max-tokens", "3").err == ""


def test_the_help_explains_every_option(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert explains_every_option(kv("-h", command="generate"), "generate")


# Encoder-decoders


def test_each_line_on_stdin_is_a_source(
    generate: Callable[..., Ran], seq2seq: Path, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"jail\r\nfig\nmop")
    found = answer(generate("--json", model=seq2seq))["results"]
    assert [result["prompt"] for result in found] == ["jail", "fig", "mop"]
    stdin(b"jail\nfig\nmop\n")
    assert generate(model=seq2seq).out.split("\n") == [*(result["text"] for result in found), ""]


def test_a_target_is_the_same_from_every_source_and_cache(
    generate: Callable[..., Ran], seq2seq: Path, tmp_path: Path
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("jail\n")
    found = [texts(generate("--input", str(path), "--json", model=seq2seq))]
    found += [
        texts(generate("--prompt", "jail", "--cache", kind, "--json", model=seq2seq))
        for kind in CACHES
    ]
    assert all(result == found[0] for result in found) and found[0] != [""]


def test_what_is_not_in_the_vocabulary_is_named_once_however_often_it_occurs(
    generate: Callable[..., Ran], seq2seq: Path, stdin: Callable[[bytes], None]
) -> None:
    stdin("jail\njΩéil\nΩ123456\n".encode())
    ran = generate("--quiet", model=seq2seq)
    assert ran.err == "warning: not in the vocabulary: 'Ω', 'é', '1', '2', '3' and 3 more\n"
    assert ran.out.count("\n") == 3
    assert generate("--quiet", "--prompt", "jail", model=seq2seq).err == ""


def test_a_source_that_the_model_cannot_read_is_named_by_its_line(
    generate: Callable[..., Ran], seq2seq: Path, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"jail\n\n" + b"a" * 65)
    message = refused(generate(model=seq2seq))
    assert message.startswith("source 3: is 65 tokens long (the model holds 64)")
