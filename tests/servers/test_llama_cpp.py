"""llama.cpp itself, with a tiny random model: right as it is, and wrong behind a faulty proxy."""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from fault_proxy import FAULTS, FaultProxy, proxied
from gguf_files import Made
from kvtool.core.servers.client import Client
from kvtool.core.servers.engines import connect
from kvtool.core.servers.session import Visit, visit
from kvtool.core.servers.verdict import (
    BEYOND,
    HIDDEN,
    IDENTICAL,
    LOSSY,
    UNSUPPORTED,
    WITHIN,
    ArmVerdict,
)
from llama_server import llama_server

LETTERS = string.ascii_lowercase
WORDS = ["<end>", *LETTERS, *map("".join, itertools.product(LETTERS, repeat=2))]
DRAWS = random.Random(0)
PROMPTS = [[DRAWS.randrange(1, 299) for _ in range(n)] for n in (58, 61)]  # and 64 are crossed
FIVE = [[DRAWS.randrange(1, 299) for _ in range(n)] for n in (58, 61, 55, 60, 57)]
TAIL = 12


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    with llama_server(Made(tokens=WORDS[:300], formats=("F32",)).write(Path(path))) as address:
        yield address


def asked(
    address: str, arms: list[str], prompts: list[list[int]] = PROMPTS
) -> dict[str, ArmVerdict]:
    found = Visit()
    visit(connect(Client(address)), prompts, arms, [], TAIL, lambda _: None, found)
    return {verdict.arm: verdict for verdict in found.verdicts(arms)}


def test_llama_cpp_is_right_where_kernels_change_between_shapes(url: str) -> None:
    found = asked(url, ["prefix", "decode", "fork", "evicted", "cut"])
    assert {v.verdict for v in found.values()} <= {WITHIN, IDENTICAL, UNSUPPORTED}
    assert found["prefix"].reused and found["evicted"].reused  # from its memory of old prompts
    assert found["prefix"].floor  # not 0: the shapes crossed a change of kernels
    assert found["cut"].verdict == UNSUPPORTED


def test_slots_that_share_one_cache_are_right_and_a_fault_among_them_is_found(
    tmp_path: Path,
) -> None:
    model = Made(tokens=WORDS[:300], formats=("Q4_1",)).write(tmp_path / "tiny.gguf")
    crowded = ["between", "slot", "evicted"]
    with llama_server(model, 2048, n_parallel=4, kv_unified=1) as url:
        right = asked(url, crowded, FIVE)
        with proxied(FaultProxy(url, FAULTS["a token missing"])) as address:
            wrong = asked(address, ["between"])
    # Above 1.5 times the noise, which happens once in many runs, it cannot be told.
    assert {v.verdict for v in right.values()} <= {WITHIN, IDENTICAL, HIDDEN}
    assert wrong["between"].verdict == BEYOND


def test_a_long_prompt_is_right_whatever_is_computed_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gguf_files.CONTEXT", 2048)
    sizes = {"d_model": 128, "d_ff": 256, "head_dim": 32, "n_layers": 3}
    model = Made(tokens=WORDS[:300], formats=("F32",), **sizes).write(tmp_path / "tiny.gguf")
    with llama_server(model, 2048, n_ubatch=64, n_parallel=1) as url:
        found = Visit()
        visit(connect(Client(url)), PROMPTS, [], ["long"], TAIL, lambda _: None, found)
    (long,) = found.verdicts(["long"])
    assert long.verdict in (WITHIN, IDENTICAL)
    assert long.floor is not None and long.floor > 1e-5  # the shapes crossed a change of kernels
    assert {probe.reused for probe in found.measured[0].probes} >= {512, 544}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_before_llama_cpp_is_found(url: str, name: str) -> None:
    proxy = FaultProxy(url, FAULTS[name])
    with proxied(proxy) as address:
        found = asked(address, ["prefix"])["prefix"]
    assert proxy.planted
    assert found.verdict == BEYOND


def test_cached_logprobs_of_another_temperature_are_found(url: str) -> None:
    with proxied(FaultProxy(url, temperature=1.05)) as address:
        assert asked(address, ["prefix"])["prefix"].verdict == BEYOND


def test_a_proxy_that_plants_nothing_is_right(url: str) -> None:
    with proxied(FaultProxy(url)) as address:
        assert asked(address, ["prefix"])["prefix"].right


@pytest.mark.parametrize("least", [4, 60])  # tokens: a short text has 36 behind its cut
def test_positions_that_llama_cpp_shifts_are_a_loss_and_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    monkeypatch.setattr("gguf_files.CONTEXT", 512)
    model = Made(tokens=WORDS[:300], formats=("F32",)).write(tmp_path / "tiny.gguf")
    with llama_server(model, 1024, n_cache_reuse=least) as address:
        found = asked(address, ["cut"])["cut"]
    assert (found.verdict, found.right) == (LOSSY, True)
    assert found.gap is not None and found.gap > (0.1 if least == 4 else 1e-4)
    assert found.reused is not None and found.reused > least


def test_a_second_visit_finds_nothing_behind_a_cut_where_nothing_is_shifted(url: str) -> None:
    for _ in range(2):  # llama.cpp remembers what was asked before
        found = asked(url, ["cut"])["cut"]
        assert (found.verdict, found.evidence.partition(",")[0]) == (
            UNSUPPORTED, "it reuses nothing behind a cut",
        )  # fmt: skip


def test_a_slot_that_llama_cpp_saved_is_right_when_it_is_restored(tmp_path: Path) -> None:
    model = Made(tokens=WORDS[:300], formats=("F32",)).write(tmp_path / "tiny.gguf")
    with llama_server(model, slot_save_path=f"{tmp_path}/") as address:
        found = asked(address, ["restored"])["restored"]
    assert found.verdict in (WITHIN, IDENTICAL)
    assert found.reused is not None and found.reused > 60
    assert [path.name for path in tmp_path.glob("*.bin")] == ["kvtool-verify-cache.bin"]


def test_llama_cpp_says_that_it_was_not_told_where_to_save_slots(url: str) -> None:
    found = asked(url, ["restored"])["restored"]
    assert (found.verdict, found.evidence) == (UNSUPPORTED, "--slot-save-path is not set")


def test_a_prompt_longer_than_a_chunk_is_right_and_a_fault_in_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gguf_files.CONTEXT", 2048)
    model = Made(tokens=WORDS[:300], formats=("F32",)).write(tmp_path / "tiny.gguf")
    verdicts = {}
    with llama_server(model, 4096) as url:
        for name in ("", "a token missing"):
            with proxied(FaultProxy(url, FAULTS.get(name))) as address:
                found = Visit()
                engine = connect(Client(address))
                visit(engine, PROMPTS[:1], [], ["long"], TAIL, lambda _: None, found)
            (verdicts[name],) = found.verdicts(["long"])
    assert verdicts[""].verdict in (WITHIN, IDENTICAL)
    assert verdicts["a token missing"].verdict == BEYOND


def test_a_context_that_holds_no_long_prompt_is_said(url: str) -> None:
    found = Visit()
    visit(connect(Client(url)), PROMPTS[:1], [], ["long"], TAIL, lambda _: None, found)
    (long,) = found.verdicts(["long"])
    assert long.verdict == UNSUPPORTED and "its context is too short" in long.evidence
