"""kvtool.generate: the Python way to generate, which the command goes too."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvtool
from cli_probe import Ran
from kvtool.core.checkpoint import checkpoint
from kvtool.core.checkpoint.checkpoint import Checkpoint
from kvtool.core.decoding.generation import Generated, generate
from kvtool.core.models import Model
from kvtool.errors import CapacityError, CheckFailed, FileError, KvtoolError, UsageError
from small_models import WORDS, answer, random_model, save_decoder, save_seq2seq

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), positions="rotary")


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seq2seq(tmp_path_factory.mktemp("seq2seq"))


def loaded(folder: Path) -> Checkpoint:
    return checkpoint.load(str(folder), CPU, torch.float32)


@pytest.mark.parametrize(
    ("which", "prompt", "words", "choices"),
    [
        ("decoder", "To be", "", {}),
        (
            "decoder",
            "To be",
            "--seed 3 --top-k 5 --top-p 0.9",
            {"seed": 3, "top_k": 5, "top_p": 0.9},
        ),
        (
            "decoder",
            "To be",
            "--temperature 0 --cache paged:page=8",
            {"temperature": 0.0, "cache": "paged:page=8"},
        ),
        (
            "decoder",
            "To be",
            "--kernels exact --temperature 0.5",
            {"kernels": "exact", "temperature": 0.5},
        ),
        ("decoder", "To be", "--beams 3 --n-best 2", {"beams": 3, "n_best": 2}),
        ("seq2seq", "jail", "", {}),
        ("seq2seq", "jail", "--beams 4 --length-penalty 0", {"beams": 4, "length_penalty": 0.0}),
    ],
)
def test_it_gives_what_the_command_gives(
    kv: Callable[..., Ran],
    request: pytest.FixtureRequest,
    which: str,
    prompt: str,
    words: str,
    choices: dict[str, Any],
) -> None:
    folder = request.getfixturevalue(which)
    given = ("--model", str(folder), "--device", "cpu", "--prompt", prompt, "--max-tokens", "12")
    said = answer(kv(*given, *words.split(), "--json", command="generate"))
    found = generate(loaded(folder), prompt, 12, **choices)
    rows = said["results"]
    assert [(r.text, r.log_prob, r.rank, r.score, r.ended) for r in found.results] == [
        (row["text"], row["log_prob"], row["rank"], row["score"], row["ended"]) for row in rows
    ]
    assert [len(result.ids) for result in found.results] == [row["new_tokens"] for row in rows]
    assert (found.text, found.cache_bytes) == (rows[0]["text"], said["cache_bytes"])


def test_text_comes_as_it_is_made(decoder: Path) -> None:
    pieces: list[str] = []
    found = generate(loaded(decoder), "To be", 9, on_text=pieces.append)
    assert len(pieces) == 10 and "".join(pieces) == found.text
    assert found.text == loaded(decoder).tokenizer.decode(found.ids)


def test_rows_of_ids_are_continued_as_each_alone() -> None:
    model = random_model()
    prompt = torch.tensor([[3, 1, 22], [5, 6, 7]])
    together = generate(model, prompt, 6, temperature=0.0)
    alone = [generate(model, row, 6, temperature=0.0).ids for row in prompt]
    assert [result.ids for result in together.results] == alone and alone[0] != alone[1]
    assert generate(model, [3, 1, 22], 6, temperature=0.0).ids == alone[0]
    assert together.text == "" and not together.results[0].ended


def test_ids_of_a_checkpoint_have_text(decoder: Path) -> None:
    model = loaded(decoder)
    ids = model.tokenizer.encode("To be")
    assert generate(model, ids, 5).text == generate(model, "To be", 5).text != ""


def test_a_folder_or_a_name_is_loaded(seq2seq: Path) -> None:
    expected: Generated = generate(loaded(seq2seq), WORDS[0])
    assert generate(seq2seq, WORDS[0]) == generate(str(seq2seq), WORDS[0]) == expected
    assert kvtool.generate(seq2seq, WORDS[0]).results == expected.results


@pytest.mark.parametrize(
    ("prompt", "choices", "error", "message"),
    [
        ([0, 260], {}, UsageError, "prompt: 260 is none of the model's 260 tokens"),
        ([-1], {}, UsageError, "prompt: -1 is none of the model's 260 tokens"),
        ([[[1]]], {}, UsageError, r"prompt: \(1, 1, 1\) of torch.int64 \(expected"),
        ([0.5], {}, UsageError, "prompt: .* of torch.float32"),
        ([], {}, UsageError, "prompt: "),
        (None, {}, UsageError, "prompt: None is neither text nor whole numbers"),
        ("", {}, CapacityError, "the prompt holds no token"),
        ("To be", {"max_tokens": 64}, CapacityError, "and 64 more were asked for"),
        ("To be", {"max_tokens": 0}, UsageError, "--max-tokens: 0 is too small"),
        ("To be", {"cache": "ring"}, UsageError, "--cache: 'ring' is not known"),
        ("To be", {"cache": "paged:page=0"}, UsageError, "--cache: paged: page: 0 is too small"),
        ("To be", {"kernels": "exakt"}, UsageError, "--kernels: 'exakt' is not known"),
        ("To be", {"top_k": 261}, UsageError, "--top-k: 261 is above the vocabulary of 260"),
        ("To be", {"beams": 2, "top_k": 3}, UsageError, "--top-k: contradicts --beams"),
        ("To be", {"n_best": 2}, UsageError, "--n-best: 2 of 1 beams"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    decoder: Path, prompt: Any, choices: dict[str, Any], error: type[KvtoolError], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(loaded(decoder), prompt, **choices)


def test_text_for_a_model_alone_a_missing_folder_and_nan_are_errors_of_kvtool() -> None:
    with pytest.raises(UsageError, match="prompt: text needs a tokenizer"):
        generate(random_model(), "To be")
    with pytest.raises(FileError, match="nowhere"):
        generate("nowhere", "To be")
    model: Model = random_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(CheckFailed, match="step 0: the logits are not finite"):
        generate(model, [1, 2], 3)


def test_the_example_of_the_page_gives_what_the_command_gives(
    kv: Callable[..., Ran], capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(kvtool.__file__).parents[1] / "docs" / "generate.md"
    (code,) = re.findall(r"```python\n(.+?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    found = names["found"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith(f"{found.ids} {found.cache_bytes}") and len(printed) > 20
    words = "--prompt ROMEO: --max-tokens 20 --temperature 0 --cache paged:page=8"
    assert kv(*words.split(), command="generate").out == found.text + "\n"
