"""kvtool verify-cache where something is wrong: with a cache, a model, or what was asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import verify_cache_cases
from cli_probe import Ran, refused
from kvtool import registry
from kvtool.core import verify
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.verify.mutants.contents import ReadsLayerZero, StoresLower, WrongBelowFloat64
from small_models import (
    answer,
    change_weights,
    save_decoder,
    with_nan,
)

decoder, seq2seq, check = (
    verify_cache_cases.decoder,
    verify_cache_cases.seq2seq,
    verify_cache_cases.check,
)


MUTANTS = "kvtool.core.verify.mutants"


# Bugs


@pytest.mark.parametrize(
    ("mutant", "last", "line"),
    [
        (ReadsLayerZero, "bug, step 1 in decode", "what: past values are read from layer 0"),
        (
            StoresLower,
            "precision, step 1 in decode and 1 more (the cache stores lower)",
            "below the model's own format",
        ),
        (WrongBelowFloat64, "bug, step 1 in decode", "wrong in float32 alone"),
    ],
)
def test_a_bug_in_a_registered_kind_gets_exit_1_and_its_step(
    check: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    mutant: type[DynamicCache],
    last: str,
    line: str,
) -> None:
    monkeypatch.setitem(registry.CACHES, "dynamic", f"{MUTANTS}.contents:{mutant.__name__}")
    ran = check("--caches", "dynamic", "--kernels", "default", "--scenarios", "decode", "crop")
    assert ran.code == 1
    assert ran.out.splitlines()[-1].startswith(f"✗ dynamic: {last}")
    assert line in " ".join(ran.out.split())


def test_a_bug_is_located_in_words_and_in_json(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.CACHES, "dynamic", f"{MUTANTS}.contents:ReadsLayerZero")
    options = ("--caches", "dynamic", "--kernels", "default", "--scenarios", "decode")
    assert "where: layer 1, stored V (of tokens 0-13)" in check(*options).out
    row = answer(check(*options, "--json"), code=1)["checks"][0]
    assert (row["layer"], row["part"], row["first_wrong_step"]) == (1, "stored V", 1)
    assert row["hint"] == "past values are read from layer 0 in every layer"
    assert row["gap"] > 1e-3 and row["gap_float64"] > 1e-3 and row["gap_promoted"] > 1e-3


def test_a_bug_whose_gap_is_infinite_is_null_in_json(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.CACHES, "static", f"{MUTANTS}.slots:NaNBehind")
    options = ("--caches", "static", "--kernels", "default", "--scenarios", "padded")
    found = answer(check("--json", *options), code=1)
    assert found["checks"][0]["gap"] is None
    assert found["checks"][0]["verdict"] == "bug"


def test_exact_kernels_that_are_not_exact_are_exit_1(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.KERNELS, "exact", registry.KERNELS["default"])
    ran = check("--caches", "static", "--kernels", "exact", "--scenarios", "decode")
    assert ran.code == 1
    assert ran.out.splitlines()[-1] == "✗ static: rounding, not exact in decode"


def test_a_kind_that_was_only_checked_in_vain_is_exit_1(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DynamicCache, "vacuous", lambda self: "nothing was evicted")
    ran = check("--caches", "dynamic", "--scenarios", "decode")
    assert ran.code == 1
    assert ran.out.splitlines()[-1] == "✗ nothing was checked of dynamic"


def test_a_kind_that_should_store_and_computes_again_was_checked_in_vain(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.CACHES, "dynamic", f"{MUTANTS}.contents:NeverUsed")
    ran = check("--caches", "none", "static", "dynamic", "--scenarios", "decode", "--json")
    report = json.loads(ran.out)
    found = {row["cache"]: row["verdict"] for row in report["checks"]}
    assert (found["none"], found["dynamic"]) == ("no cache", "vacuous")
    assert (ran.code, report["conclusion"]) == (1, "nothing was checked of dynamic")


def test_only_none_checks_nothing_and_is_exit_1(check: Callable[..., Ran]) -> None:
    ran = check("--caches", "none", "--scenarios", "decode")
    assert ran.code == 1
    assert "no cache" in ran.out
    assert ran.out.splitlines()[-1].startswith("✗ nothing was checked")


def test_a_control_that_is_not_found_makes_the_check_fail(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify.check.LostKey, "write", DynamicCache.write)
    ran = check("--scenarios", "decode")
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
        ("--tokens 1000000000", "--tokens 1,000,000,000: is beyond the context (the model holds "),
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


def test_the_folder_of_a_run_is_told_from_its_checkpoint(
    check: Callable[..., Ran], tmp_path: Path
) -> None:
    save_decoder(tmp_path / "best")
    message = refused(check(model=str(tmp_path)))
    assert "is the folder of a run" in message and message.endswith(f"{tmp_path / 'best'}.")
