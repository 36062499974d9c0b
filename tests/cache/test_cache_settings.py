"""What a user may choose of a cache kind, in its name or by options, and what it changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_probe import Ran, refused
from kvtool.core.cache import CacheSpec, cache_class, make_cache, predicted_nbytes
from kvtool.errors import UsageError
from kvtool.registry import CACHE_SETTINGS, CACHES, split_kind, with_settings
from small_models import answer, random_model, save_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def run(kv: Callable[..., Ran], decoder: Path) -> Callable[..., Ran]:
    def call(command: str, *args: str) -> Ran:
        given = ["--model", str(decoder), "--threads", "1", "--device", "cpu"]
        return kv(*given, *args, command=command)

    return call


def test_a_kind_is_its_name_and_its_settings() -> None:
    assert split_kind("static") == ("static", {})
    assert split_kind("sliding:window=64:sinks=0") == ("sliding", {"window": 64, "sinks": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slidin", "--cache: 'slidin' is not known"),
        ("static:page=4", "--cache: static has no setting 'page' (it has none)"),
        ("paged:size=4", "--cache: paged has no setting 'size' (expected one of page)"),
        ("paged:page", "--cache: page: '' is not a whole number"),
        ("paged:page=", "--cache: page: '' is not a whole number"),
        ("paged:page=-4", "--cache: page: '-4' is not a whole number"),
        ("paged:page=4.5", "--cache: page: '4.5' is not a whole number"),
        ("paged:page=99999999999", "--cache: page: '99999999999' is not a whole number"),
        ("paged:", "--cache: paged has no setting ''"),
    ],
)
def test_a_setting_that_means_nothing_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        split_kind(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ("sliding:window=16,sinks=0", "Write sliding:window=16:sinks=0."),
        ("none,sliding,window=16,sinks=0,paged", "Write sliding:window=16:sinks=0."),
        ("int4:group=0", "--caches: int4: group: 0 is too small (expected 1 or more)"),
        ("paged:page=0", "--caches: paged: page: 0 is too small (expected 1 or more)"),
        ("none,window=16", "--caches: 'window=16' is not known (expected one of none, dynamic"),
    ],
)
def test_a_setting_is_refused_with_its_option_and_kind(
    run: Callable[..., Ran], kinds: str, message: str
) -> None:
    said = refused(run("bench", "--caches", kinds))
    assert message in said and said.startswith("--caches: ")
    assert said.count("Write ") == message.count("Write ")


def test_an_option_fills_in_what_the_name_does_not_say() -> None:
    given = {"window": 9, "page": None, "group": 8}
    assert with_settings("sliding", given) == "sliding:window=9"
    assert with_settings("sliding:window=5", given) == "sliding:window=5"
    assert with_settings("paged", given) == "paged"


@pytest.mark.parametrize("kind", CACHES)
def test_every_setting_is_an_argument_of_the_kind_and_of_its_prediction(kind: str) -> None:
    found = cache_class(kind)
    for call in (found.__init__, found.predict_nbytes):
        assert set(CACHE_SETTINGS.get(kind, ())) <= inspect.signature(call).parameters.keys()


@pytest.mark.parametrize(
    "kind", ["sliding:window=16:sinks=1", "paged:page=5", "int8:group=8", "int4:residual=0:group=8"]
)
def test_a_setting_changes_the_memory_and_its_prediction_alike(kind: str) -> None:
    spec = CacheSpec.of(random_model(context=200).config, 2, 200)
    needed = make_cache(kind, spec).nbytes().allocated
    assert needed == predicted_nbytes(kind, spec, 199)
    assert needed != predicted_nbytes(split_kind(kind)[0], spec, 199)


def test_one_bench_compares_a_kind_under_several_settings(run: Callable[..., Ran]) -> None:
    words = "--lengths 30 --prompt-length 4 --repeats 1 --json --window 8"
    found = answer(run("bench", *words.split(), "--caches", "sliding", "sliding:window=16"))
    assert [row["cache"] for row in found["measurements"]] == [
        "sliding:window=8",
        "sliding:window=16",
    ]
    small, large = (row["bytes_measured"] for row in found["measurements"])
    assert small < large
    assert all(row["bytes_predicted"] == row["bytes_measured"] for row in found["measurements"])


def test_verify_cache_checks_a_kind_under_the_settings_that_were_chosen(
    run: Callable[..., Ran],
) -> None:
    words = "--caches sliding paged --scenarios decode --tokens 16 --window 6 --json"
    rows = answer(run("verify-cache", *words.split()))["checks"]
    assert {row["cache"] for row in rows} == {"sliding:window=6", "paged"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cache static --window 4", "--window: no setting of static. It belongs to sliding."),
        ("--cache paged --group 4", "--group: no setting of paged. It belongs to int8 and int4."),
        ("--cache sliding --window 0", "--window: 0 is too small (expected 1 or more)"),
        ("--cache sliding --window -1", "--window: -1 is too small"),
        ("--cache paged --page 0", "--page: 0 is too small (expected 1 or more)"),
        ("--cache int8 --residual -1", "--residual: -1 is too small (expected 0 or more)"),
        (
            "--cache sliding:window=4 --window 5",
            "--window: contradicts sliding:window=4. Give one of them.",
        ),
        ("--cache int4 --group 3", "group: 3 tokens of 4 bits do not fill bytes"),
    ],
)
def test_a_setting_that_a_kind_cannot_have_is_exit_2(
    run: Callable[..., Ran], words: str, message: str
) -> None:
    assert refused(run("generate", "--prompt", "a", *words.split())).startswith(message)


def test_generate_works_with_settings(run: Callable[..., Ran]) -> None:
    words = "--prompt abacus --max-tokens 9 --temperature 0 --json"
    found: Any = answer(run("generate", *words.split(), "--cache", "paged", "--page", "4"))
    assert found["cache"] == "paged:page=4"
    plain = answer(run("generate", *words.split()))
    assert found["results"][0]["text"] == plain["results"][0]["text"]
