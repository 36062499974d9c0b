"""kvtool verify-cache --target and --self-test, as a user meets them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cli_probe import Ran, refused
from kvtool.commands.verify.hf import check_team
from kvtool.core.cache import cache_class
from kvtool.errors import FileError, UsageError
from kvtool.registry import CACHE_SETTINGS
from small_models import answer

BASE = """
import sys
import torch
from torch import nn

class Tiny(nn.Module):
    vocab_size, context, causal, noise = 11, 64, True, 0.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)

    def full(self, ids):
        x = self.embed(ids)
        sums = x.cumsum(1) if self.causal else x.sum(1, keepdim=True).expand_as(x)
        return sums @ self.embed.weight.T + self.noise * torch.randn(1)

    def step(self, ids, state):
        x = self.embed(ids).cumsum(1) + (0 if state is None else state)
        return x @ self.embed.weight.T + self.noise * torch.randn(1), x[:, -1:]

class Leaves(Tiny):
    def step(self, ids, state):
        sys.exit(0)

class Acausal(Tiny):
    causal = False

class Random(Tiny):
    noise = 0.1

class Talks(Tiny):
    def step(self, ids, state):
        print("hello")
        return super().step(ids, state)
"""


@pytest.fixture
def target(kv: Callable[..., Ran], tmp_path: Path) -> Callable[..., Ran]:
    path = tmp_path / "own.py"
    path.write_text(BASE)

    def call(name: str, *args: str) -> Ran:
        return kv("--target", f"{path}:{name}", "--device", "cpu", *args, command="verify-cache")

    return call


def test_a_right_decoder_of_the_user_is_right_and_may_talk(target: Callable[..., Ran]) -> None:
    for name in ("Tiny", "Talks"):
        ran = target(name)
        assert ran.code == 0 and "hello" not in ran.out
        assert "hello" not in ran.err
        assert "--tokens 128: 53, since the decoder holds 64" in ran.err


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Leaves", "own.py:Leaves: error, step 0 in decode and 6 more"),
        ("Acausal", "own.py:Acausal: not-causal, step 0 in decode"),
        ("Random", "own.py:Random: error, step 0 in decode"),
    ],
)
def test_the_last_line_says_what_is_wrong_with_a_decoder(
    target: Callable[..., Ran], name: str, line: str
) -> None:
    ran = target(name)
    assert ran.code in (1, 2)
    if ran.code == 2:  # it could not even be tried out
        assert "SystemExit" in ran.err and ran.out == ""
    else:
        assert ran.out.splitlines()[-1].startswith(f"✗ {line}")
    if name == "Random":
        assert "two uncached passes over the same tokens differ" in ran.out


@pytest.mark.parametrize(
    "words",
    ["--caches static", "--kernels exact", "--model /nowhere", "--prompt x", "--self-test"],
)
def test_options_that_a_decoder_of_the_user_makes_no_use_of_are_refused(
    target: Callable[..., Ran], words: str
) -> None:
    message = refused(target("Tiny", *words.split()))
    flag = "--target" if words == "--self-test" else words.split()[0]
    assert message.startswith(f"{flag}: contradicts --")


@pytest.mark.parametrize(
    "words",
    [
        "--tokens 5",
        "--scenarios help",
        "--model x",
        "--dtype bfloat16",
        "--plot a.png",
        "--sinks 0",
        "--sweep",
    ],
)
def test_the_self_test_refuses_what_it_makes_no_use_of(kv: Callable[..., Ran], words: str) -> None:
    message = refused(kv("--self-test", *words.split(), command="verify-cache"))
    assert message.startswith(f"{words.split()[0]}: contradicts --self-test")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sweep", "--sweep: needs --impl transformers. Add --impl transformers."),
        ("--time-limit 9", "--time-limit: needs --sweep. Add --impl transformers --sweep."),
        ("--impl transformers --types llama", "--types: needs --sweep. Add --impl transformers"),
        (
            "--impl transformers --kernels exact",
            "--kernels: contradicts --impl transformers. Models and caches of transformers have "
            "their own: leave it out.",
        ),
        ("--impl transformers --page 4", "--page: contradicts --impl transformers"),
        (
            "--impl transformers --model lama",
            "--model lama: is neither a folder nor a model type that transformers knows. "
            "Did you mean llama?",
        ),
    ],
)
def test_what_another_option_would_need_is_said_at_once(
    kv: Callable[..., Ran], words: str, message: str
) -> None:
    assert refused(kv(*words.split(), command="verify-cache")).startswith(message)


def test_a_folder_of_a_type_that_transformers_does_not_know_is_refused(
    kv: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "kvtool-decoder"}')
    words = ["--impl", "transformers", "--model", str(tmp_path)]
    message = refused(kv(*words, command="verify-cache"))
    where = f"{tmp_path / 'config.json'}: model_type 'kvtool-decoder' is none that transformers"
    assert message.startswith(where)
    assert message.endswith("It is kvtool's own: leave out --impl transformers.")


def test_the_help_tells_the_settings_that_kinds_have_in_a_check(kv: Callable[..., Ran]) -> None:
    page = " ".join(kv("--help", command="verify-cache").out.split())
    for kind, names in CACHE_SETTINGS.items():
        for name in names:
            said = re.search(rf"--{name} N .*?\[default: (\d+)\]", page)
            assert said and int(said[1]) == cache_class(kind).small[name]


def test_an_empty_target_is_refused(kv: Callable[..., Ran]) -> None:
    assert refused(kv("--target", "", command="verify-cache")).startswith("--target")


def test_the_self_test_prints_what_was_planted_and_exits_by_it(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvtool.core.verify.mutants import selftest

    few = tuple(next(m for m in selftest.MUTANTS if m.bug_class == n) for n in (1, 12))
    monkeypatch.setattr(selftest, "MUTANTS", few)
    two = tuple(replace(m, scenarios=("decode", "crop")) for m in selftest.LOOKALIKES[:2])
    monkeypatch.setattr(selftest, "LOOKALIKES", two)
    ran = kv("--self-test", "--device", "cpu", command="verify-cache")
    assert ran.code == 0
    assert ran.out.splitlines()[-1].startswith(f"✓ {len(few)} of {len(few)} planted bugs caught")
    assert "0 of 2 right caches reported falsely" in ran.out
    for name in ("float64.ROUNDING_64", "measured.LIMIT"):
        monkeypatch.setattr(f"kvtool.core.verify.{name}", 1e30)
    ran = kv("--self-test", "--device", "cpu", "--json", command="verify-cache")
    found = answer(ran, code=1)
    assert [o["caught"] for o in found["planted"]] == [False] * len(few)


def test_a_folder_that_is_not_there_is_not_found_under_torchrun_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for model in (str(tmp_path / "none"), "nofolder"):
        for shares in (True, False):
            with pytest.raises(FileError, match=f"--model {model}: not found"):
                check_team(shares, model)
    with pytest.raises(UsageError, match="a folder of transformers alone"):
        check_team(False, str(tmp_path))
    check_team(True, str(tmp_path))
