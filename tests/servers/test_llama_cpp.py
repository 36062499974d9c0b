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
from kvtool.core.servers.verdict import BEYOND, IDENTICAL, UNSUPPORTED, WITHIN, ArmVerdict
from llama_server import llama_server

LETTERS = string.ascii_lowercase
WORDS = ["<end>", *LETTERS, *map("".join, itertools.product(LETTERS, repeat=2))]
DRAWS = random.Random(0)
PROMPTS = [[DRAWS.randrange(1, 299) for _ in range(n)] for n in (58, 61)]  # and 64 are crossed
TAIL = 12


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    with llama_server(Made(tokens=WORDS[:300], formats=("F32",)).write(Path(path))) as address:
        yield address


def asked(address: str, arms: list[str]) -> dict[str, ArmVerdict]:
    found = Visit()
    visit(connect(Client(address)), PROMPTS, arms, [], TAIL, lambda _: None, found)
    return {verdict.arm: verdict for verdict in found.verdicts(arms)}


def test_llama_cpp_is_right_where_kernels_change_between_shapes(url: str) -> None:
    found = asked(url, ["prefix", "decode", "fork", "evicted", "cut"])
    assert {v.verdict for v in found.values()} <= {WITHIN, IDENTICAL, UNSUPPORTED}
    assert found["prefix"].reused and found["evicted"].reused  # from its memory of old prompts
    assert found["prefix"].floor  # not 0: the shapes crossed a change of kernels
    assert found["cut"].verdict == UNSUPPORTED


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
