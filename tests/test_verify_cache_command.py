"""kvtool verify-cache, as a user meets it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli_probe import Ran, refused
from kvtool import registry
from kvtool.commands.verify_cache import Report, Row
from kvtool.core import verify
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.registry import CACHES
from planted_bugs import LowStorage, OtherLayer, WrongBelowFloat64
from small_models import (
    answer,
    change_weights,
    explains_every_option,
    save_decoder,
    save_seq2seq,
    with_nan,
)

PROMPT = "Hear me speak."


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_decoder(tmp_path_factory.mktemp("decoder"), n_kv_heads=2, positions="rotary"))


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_seq2seq(tmp_path_factory.mktemp("seq2seq")))


@pytest.fixture
def check(kv: Callable[..., Ran], decoder: str) -> Callable[..., Ran]:
    """Run verify-cache on a decoder, 8 tokens after a short prompt."""

    def call(*args: str, model: str = decoder) -> Ran:
        given = ["--model", model, "--threads", "1", "--device", "cpu"]
        given += [] if "--tokens" in args else ["--tokens", "8"]
        given += [] if "--prompt" in args else ["--prompt", PROMPT]
        return kv(*given, *args, command="verify-cache")

    return call


# What it says


def test_right_caches_get_exit_0_and_a_sentence(check: Callable[..., Ran]) -> None:
    ran = check()
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines() if " of 8 " in line]
    assert [row[0] for row in rows] == [*CACHES, "planted"]
    assert ran.out.splitlines()[-1] == (
        "✓ rounding only: 2 kinds of cache over 8 steps, no bug; the planted bug was found"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_dtype_is_judged(check: Callable[..., Ran], dtype: str) -> None:
    found = answer(check("--dtype", dtype, "--json"))
    assert found["dtype"] == found["settings"]["run"]["dtype"] == dtype
    verdicts = {row["cache"]: row["verdict"] for row in found["kinds"]}
    assert verdicts.pop("none") == "vacuous"
    assert set(verdicts) == set(CACHES) - {"none"}
    assert set(verdicts.values()) <= {"identical", "rounding"}
    assert found["control"]["verdict"] == "bug"


def test_an_encoder_decoder_is_judged_from_a_source(
    check: Callable[..., Ran], seq2seq: str
) -> None:
    found = answer(check("--json", "--prompt", "jail", model=seq2seq))
    assert found["prompt_tokens"] == 4
    assert {row["verdict"] for row in found["kinds"]} <= {"vacuous", "identical", "rounding"}
    assert found["control"]["first_wrong_step"] == 1


def test_without_a_prompt_there_is_one_that_suits_the_model(
    kv: Callable[..., Ran], decoder: str, seq2seq: str
) -> None:
    for model in (decoder, seq2seq):
        ran = kv("--model", model, "--tokens", "4", "--json", command="verify-cache")
        assert answer(ran)["prompt_tokens"] > 1


def test_the_document_and_the_table_hold_the_same_rows(
    check: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    found = answer(check("--json", "--output", str(path)))
    assert found["schema"] == "kvtool.verify-cache/1"
    assert found["exit_code"] == 0
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [row["cache"] for row in rows] == [*CACHES, "planted bug"]
    assert [int(row["identical_steps"]) for row in rows] == [
        row["identical_steps"] for row in [*found["kinds"], found["control"]]
    ]


def test_markdown_has_a_line_for_every_cache(check: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "rows.md"
    assert check("-q", "--output", str(path)).err == ""
    lines = path.read_text().splitlines()
    assert lines[0] == "# kvtool verify-cache"
    assert len(lines) == 4 + len(CACHES) + 1


@pytest.mark.parametrize("columns", [80, 60])
def test_the_table_fits_the_terminal(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = check().out.splitlines()
    assert max(len(line.rstrip()) for line in lines[:-1]) <= columns
    assert any(line.split()[-2:] == ["step", "1"] for line in lines)


def test_the_help_explains_every_option(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert explains_every_option(kv("-h", command="verify-cache"), "verify-cache")


# Bugs


@pytest.mark.parametrize("mutant", [OtherLayer, LowStorage, WrongBelowFloat64])
def test_a_bug_in_a_registered_kind_gets_exit_1_and_its_step(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, mutant: type[DynamicCache]
) -> None:
    monkeypatch.setitem(registry.CACHES, "dynamic", f"planted_bugs:{mutant.__name__}")
    ran = check()
    assert ran.code == 1
    last = ran.out.splitlines()[-1]
    where = "in float32 alone" if mutant is WrongBelowFloat64 else "also in float64"
    assert last == f"✗ bug: the cached logits are wrong, {where} (dynamic from step 1)"


def test_a_bug_whose_gap_is_infinite_is_null_in_json(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.CACHES, "static", "planted_bugs:NaNBehind")
    found = answer(check("--json", "--caches", "static"), code=1)
    assert found["kinds"][0]["gap"] is None
    assert found["kinds"][0]["verdict"] == "bug"


def test_only_none_checks_nothing_and_is_exit_1(check: Callable[..., Ran]) -> None:
    ran = check("--caches", "none")
    assert ran.code == 1
    assert "nothing cached" in ran.out
    assert ran.out.splitlines()[-1].startswith("✗ nothing was checked")


def test_a_control_that_is_not_found_makes_the_check_fail(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "LostKey", DynamicCache)
    ran = check()
    assert ran.code == 1
    assert ran.out.splitlines()[-1].startswith("✗ the check failed: it did not report the bug")


def test_nan_weights_are_exit_1_and_name_the_tensor(
    check: Callable[..., Ran], decoder: str, tmp_path: Path
) -> None:
    broken = change_weights(Path(decoder), tmp_path / "nan", with_nan)
    ran = check(model=str(broken))
    assert (ran.code, ran.out) == (1, "")
    assert "layers.0.mlp.up.weight holds 1 NaN" in ran.err


def test_logits_that_overflow_are_exit_1_and_name_the_step(
    check: Callable[..., Ran], decoder: str, tmp_path: Path
) -> None:
    def large(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**weights, "norm.weight": weights["norm.weight"] * 3e38}

    ran = check(model=str(change_weights(Path(decoder), tmp_path / "large", large)))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("kvtool: error: step 0: the logits are not finite")


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tokens 1", "--tokens: 1 is too small (expected 2 or more)"),
        ("--tokens 0", "--tokens: 0 is too small (expected 2 or more)"),
        ("--tokens 1000000000", "the prompt is 14 tokens and 1000000000 more were asked for"),
        ("--tokens 51", "the prompt is 14 tokens and 51 more were asked for (the model holds 64)"),
        ("--prompt=", "--prompt: is empty"),
        ("--caches dynamik", "--caches: 'dynamik' is not known"),
        ("--device cuda", "--device cuda: there is no CUDA device here"),
        ("--output a.txt", "--output a.txt: unknown format"),
        ("--output none/a.json", "--output none/a.json: the folder "),
    ],
)
def test_what_cannot_be_checked_is_exit_2(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(check(*words.split())).startswith(message)


def test_a_source_longer_than_the_context_is_refused(
    check: Callable[..., Ran], seq2seq: str
) -> None:
    message = refused(check("--prompt", "a" * 65, model=seq2seq))
    assert message.startswith("source 1: is 65 tokens long (the model holds 64)")


def test_a_row_is_worded_by_its_verdict() -> None:
    right = Row("static", 8, 8, None, 0.0, 0.0, 0.0, "identical", None)
    wrong = Row("static", 8, 1, 1, 9e5, 0.1, 0.1, "bug", 1)
    report = Report([right], wrong, 3, "float32")
    assert report.conclusion.startswith("identical, bit for bit: 1 kind of cache over 8 steps")
    assert (report.exit_code, Report([wrong], wrong, 3, "float32").exit_code) == (0, 1)
