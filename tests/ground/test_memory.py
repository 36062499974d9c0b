"""A lack of memory: what work needs is counted before it begins, and it is never a verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cli_probe import Ran
from kvtool.core import footprint, machine
from kvtool.core.bench import quality
from kvtool.core.bench.quality import measure_quality
from kvtool.core.cache import Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.checkpoint import checkpoint
from kvtool.core.reference.reference import InFloat64
from kvtool.core.verify.judge import Case, Judge
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.errors import pass_on_shortage, short_of_memory
from small_models import random_model, save_decoder
from verify_subjects import subject

Kv = Callable[..., Ran]
SHORTAGES = (
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("unable to mmap 80 bytes from file <a>: Cannot allocate memory (12)"),
    OSError(12, "Cannot allocate memory"),
)


@pytest.mark.parametrize("error", SHORTAGES, ids=repr)
def test_a_lack_of_memory_is_known_by_its_words(error: BaseException) -> None:
    assert short_of_memory(error)
    with pytest.raises(type(error)):
        pass_on_shortage(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("out of memory"), OSError(2, "not there")]
)
def test_other_errors_are_no_lack_of_memory(error: BaseException) -> None:
    pass_on_shortage(error)
    assert not short_of_memory(error)


def short_in(when: Callable[[torch.dtype, int], bool], error: BaseException) -> Any:
    """A cache for which there is no memory at some time, by its format and its length."""

    class Short(StaticCache):
        def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            if when(k.dtype, self.length):
                raise error
            return super().write(layer, k, v, step)

    return Short


@pytest.mark.parametrize("error", SHORTAGES, ids=repr)
def test_no_memory_for_a_cache_is_no_error_of_the_cache(error: BaseException) -> None:
    make = short_in(lambda dtype, length: length > 0, error)
    with pytest.raises(type(error)):
        Judge(subject(make)).judge(Case(SCENARIOS["decode"]))


@pytest.mark.parametrize("error", SHORTAGES, ids=repr)
def test_no_memory_for_float64_leaves_nothing_undecided(error: BaseException) -> None:
    make = short_in(lambda dtype, length: dtype is torch.float64, error)
    with pytest.raises(type(error)):
        Judge(subject(make)).judge(Case(SCENARIOS["decode"]), thorough=True)


def test_no_memory_for_a_token_too_many_is_no_refusal_of_it() -> None:
    class Short(DynamicCache):
        def begin(self, n_new: int) -> Step:
            if self.length + n_new > self.spec.capacity:
                raise MemoryError
            return super().begin(n_new)

    with pytest.raises(MemoryError):
        Judge(subject(Short)).judge(Case(SCENARIOS["overflow"]))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(
        tmp_path_factory.mktemp("memory") / "small", context=1500, positions="rotary"
    )


COMMANDS = {
    "verify-cache": ("verify-cache", "--caches", "dynamic"),
    "verify-logits": ("verify-logits", "--against", "numpy"),
    "verify-logits by transformers": ("verify-logits", "--against", "transformers"),
    "generate": ("generate", "--prompt", "a", "--max-tokens", "1400", "--temperature", "0"),
    "bench": ("bench", "--lengths", "1400", "--caches", "dynamic"),
    "bench of a lossy kind": ("bench", "--lengths", "10", "--caches", "dynamic", "int8"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_does_not_fit_is_refused_before_work_begins_with_both_figures(
    name: str, small: Path, kv: Kv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 250_000)
    command, *others = COMMANDS[name]
    ran = kv("--model", str(small), *others, command=command)
    assert ran.code == 2 and not ran.out
    assert "GiB (0.000233 GiB available)" in ran.err, ran.err


@pytest.mark.parametrize(
    "words", ["generate --prompt x --max-tokens", "verify-cache --prompt x --tokens"]
)
def test_more_tokens_than_the_model_holds_are_refused_before_its_weights_are_read(
    words: str, small: Path, kv: Kv, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(checkpoint, "_open", read)
    command, *others, flag = words.split()
    ran = kv("--model", str(small), *others, flag, "1000000000", command=command)
    assert ran.code == 2 and not ran.out
    assert f"{flag} 1,000,000,000: is beyond the context (the model holds " in ran.err


@pytest.mark.parametrize("limit", ["decode", "float64"])
def test_verify_cache_ends_with_2_when_memory_runs_out_all_the_same(
    limit: str, small: Path, kv: Kv, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = DynamicCache.write

    def short(self: Any, layer: int, k: Tensor, v: Tensor, step: Step) -> Any:
        if self.length > 20 and (limit == "decode" or k.dtype is torch.float64):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
        return write(self, layer, k, v, step)

    monkeypatch.setattr(DynamicCache, "write", short)
    ran = kv("--model", str(small), "--caches", "dynamic", command="verify-cache")
    assert ran.code == 2 and not ran.out, ran.err
    assert "memory: there is not enough for this" in ran.err
    assert "undecided" not in ran.err


def test_the_float64_copy_is_counted_once_for_weights_that_are_shared() -> None:
    tied, untied = (random_model(tied=t) for t in (True, False))
    head = tied.config.vocab_size * tied.config.d_model * 8
    n = sum(weight.numel() for weight in tied.parameters())
    assert footprint.converted(tied, torch.float64) == 8 * n
    assert footprint.converted(untied, torch.float64) == 8 * n + head
    assert footprint.converted(tied.double(), torch.float64) == 0


def test_logits_are_counted_for_the_whole_prompt_and_vocabulary() -> None:
    config = random_model().config
    more = footprint.verdicts(config, 4000, 100, 4) - footprint.verdicts(config, 2000, 100, 4)
    assert more >= 2000 * config.vocab_size * 2 * (4 + 8 + 8)


@pytest.mark.parametrize("kind", ["int8", "int4", "sliding:window=20", "sliding"])
def test_quality_in_pieces_is_quality_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(0, torch.float64, positions="rotary", context=150)
    ids = torch.randint(23, (331,), generator=torch.Generator().manual_seed(0))
    whole = vars(measure_quality(model, kind, ids, 150))
    most = []
    monkeypatch.setattr(footprint, "PIECE", 23 * 7)
    predict = quality._log_probs
    monkeypatch.setattr(
        quality, "_log_probs", lambda *args: most.append(len(args[2])) or predict(*args)
    )
    found = vars(measure_quality(model, kind, ids, 150))
    assert max(most) == 7 and sum(most) == 2 * (331 - 3)
    assert found == pytest.approx(whole, rel=1e-9)


def test_weights_in_float64_are_made_one_by_one() -> None:
    weights = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.zeros(3)}
    arrays = InFloat64(weights)
    assert set(arrays) == {"a", "b"} and len(arrays) == 2
    assert arrays["a"].dtype == "float64" and arrays["a"] is not arrays["a"]
