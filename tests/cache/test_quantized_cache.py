"""What quantized caches promise beyond the contract: what they round, when, and what it costs."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import PLAIN, Subject, advance, full, storage_nbytes, write
from kvtool.config import ModelConfig
from kvtool.core.cache import CacheSpec, Step, cache_class
from kvtool.core.cache.quantization import Quantization
from kvtool.core.cache.quantized import Int4Cache, Packed, QuantizedCache
from kvtool.errors import UsageError
from quantized_cases import (
    KINDS,
    PADDING,
    SPEC,
    every_kind,
    filled,
    put,
    random,
    small4,
    small8,
)

# --- which tokens are met how


def test_whole_groups_are_quantized_once_enough_newer_tokens_are_there() -> None:
    n_quantized = Quantization(8, group=4, residual=2).n_quantized
    assert [n_quantized(n) for n in range(12)] == [0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert [Quantization(8, 3, 0).n_quantized(n) for n in (2, 3, 5, 6)] == [0, 3, 3, 6]


def by_hand(x: np.ndarray, axis: int, levels: int) -> np.ndarray:
    """Asymmetric rounding along an axis, from its definition."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    scale = np.where(high > low, (high - low) / levels, 1.0)
    return np.rint((x - low) / scale) * scale + low


def attention_by_hand(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, bits: int, group: int, residual: int
) -> np.ndarray:
    """One head (T,D): each query by itself, over keys and values as it should meet them."""
    found = np.zeros_like(q)
    for n, query in enumerate(q):
        keys, values = k[: n + 1].copy(), v[: n + 1].copy()
        for start in range(0, n - residual - group + 1, group):  # a group, and `residual` after it
            part = slice(start, start + group)
            keys[part] = by_hand(k[part], 0, 2**bits - 1)
            for channel in range(0, v.shape[1], group):
                piece = v[part, channel : channel + group]
                values[part, channel : channel + group] = by_hand(piece, 1, 2**bits - 1)
        scores = np.exp(keys @ query / np.sqrt(len(query)))
        found[n] = scores @ values / scores.sum()
    return found


@every_kind
@pytest.mark.parametrize(
    "ends", [[21], list(range(1, 22)), [9, 10, 21], [1, 6, 7, 19, 21]], ids=str
)
def test_every_split_gives_attention_as_written_out_by_hand(kind: str, ends: list[int]) -> None:
    spec = dataclasses.replace(SPEC, n_layers=1)
    cache = cache_class(kind)(spec, None, group=4, residual=2)  # type: ignore[call-arg]
    ((k, v),) = random(spec, 21)
    q = random(spec, 21, seed=1)[0][0]
    found = []
    for end in ends:
        step, part = cache.begin(end - cache.length), slice(cache.length, end)
        found.append(cache.attend(0, q[:, :, part], k[:, :, part], v[:, :, part], step))
        cache.commit(end - cache.length)
    y = torch.cat(found, dim=2).numpy()
    bits = cache.quantization.bits  # type: ignore[union-attr]
    for row, head in np.ndindex(3, 2):
        expected = attention_by_hand(*(t[row, head].numpy() for t in (q, k, v)), bits, 4, 2)
        assert np.abs(y[row, head] - expected).max() < 1e-12 * np.abs(expected).max()


@every_kind
def test_rounding_changes_the_logits_and_its_settings_do_too(kind: str) -> None:
    """Or else a comparison with the wrong ones would show nothing."""
    subject = Subject(PLAIN, 30)
    cache = subject.cache(partial(cache_class(kind), group=4, residual=2))  # type: ignore[arg-type]
    found = advance(subject.model, cache, subject.ids, 1)
    right = cache.quantization
    assert right is not None
    for other in (
        None,
        dataclasses.replace(right, bits=12 - right.bits),
        dataclasses.replace(right, group=8),
        dataclasses.replace(right, residual=3),
    ):
        expected = full(subject.model, subject.ids, None, quantization=other)
        assert float((found - expected).abs().max()) > 1e-5, other


def test_a_decoding_step_reads_each_token_once_and_masks_nothing() -> None:
    cache = filled(small4, 15)
    step = cache.begin(1)
    assert step.mask is None and step.k_pos[0].tolist() == list(range(16))
    keys, values = cache.write(0, *(t[:, :, :1] for t in random(SPEC, 1)[0]), step)
    assert keys.shape == values.shape == (3, 2, 16, 8)


def test_only_what_settles_within_a_step_is_handed_out_twice() -> None:
    cache = filled(small4, 15)  # 12 are n_quantized
    step = cache.begin(6)  # and 16 when the last token comes
    assert step.k_pos[0].tolist() == [*range(16), *range(12, 21)]
    assert step.mask is not None
    for query, seen in zip(step.q_pos[0].tolist(), step.mask[0, 0], strict=True):
        assert step.k_pos[0][seen].tolist() == list(range(query + 1)), "each once, in order"


def test_a_whole_pass_is_an_ordinary_one_until_something_is_settled() -> None:
    quantization = Quantization(8, group=4, residual=2)
    step = Step.full(1, 6, quantization=quantization)
    assert step.causal and step.mask is None and step.quantization is None
    step = Step.full(1, 7, quantization=quantization)
    assert not step.causal and step.k_pos[0].tolist() == [0, 1, 2, 3, *range(7)]


# --- what is stored


@every_kind
@pytest.mark.parametrize("padding", [None, PADDING], ids=["", "padded"])
@pytest.mark.parametrize("slack", [0, 5])
def test_the_stored_bytes_do_not_depend_on_the_steps(
    kind: str, padding: Tensor | None, slack: int
) -> None:
    pairs, n = random(SPEC, 41), 41
    make = partial(cache_class(kind), group=4, residual=2, slack=slack)  # type: ignore[arg-type]
    found = []
    for ends in ([n], list(range(1, n + 1)), [7, 8, 30, n], [*range(3, n, 3), n]):
        cache: Any = make(SPEC, padding)
        put(cache, pairs, ends)
        codes = [t for two in cache._packed for part in two for t in part.tensors]
        exact = [t[:, :, : n - cache._first] for t in (*cache._keys, *cache._values)]
        found.append((cache._first, [t.clone() for t in (*codes, *exact)]))
    for first, tensors in found[1:]:
        assert first == found[0][0]
        assert all(map(torch.equal, tensors, found[0][1]))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_stored_is_within_half_a_scale(kind: str, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(SPEC, dtype=dtype, head_dim=12)
    cache = filled(partial(cache_class(kind), group=4, residual=2), 42, spec)
    pairs = random(spec, 42)
    for layer in range(2):
        for packed, found, exact in zip(
            cache._packed[layer], cache.snapshot(layer), pairs[layer], strict=False
        ):
            scale = packed.scale[:, :, : 40 // 4 if packed.dim == 2 else 40].double()
            shape = found[:, :, :40].unflatten(packed.dim, (-1, 4)).shape
            half = (scale / 2).expand(shape).flatten(packed.dim, packed.dim + 1)
            gap = (found.double() - exact.double())[:, :, :40].abs()
            rounded = torch.finfo(dtype).eps / 2 * found[:, :, :40].double().abs()  # when read
            assert bool((gap <= half * (1 + 1e-6) + rounded).all())
            assert bool((gap > half / 2).any()), "the bound would be loose"
            assert torch.equal(found[:, :, 40:], exact[:, :, 40:])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-8, 6e4])
def test_equal_values_are_stored_exactly(kind: str, dtype: torch.dtype, value: float) -> None:
    spec = dataclasses.replace(SPEC, dtype=dtype)
    cache: Any = partial(cache_class(kind), group=4, residual=2)(spec, None)  # type: ignore[arg-type]
    write(cache, 20, value)
    keys, values, _ = cache.snapshot(0)
    expected = torch.full_like(keys, torch.tensor(value, dtype=dtype).item())
    assert torch.equal(keys, expected) and torch.equal(values, expected)


def test_a_large_channel_of_keys_and_a_large_token_of_values_harm_no_other() -> None:
    """Why keys are rounded by channel and values by token (KIVI, section 3)."""
    k, v = (t.clone() for t in random(SPEC, 12)[0])
    k[..., 5], v[:, :, 3] = 1e4, 1e4
    k[:, :, 2, 5], v[:, :, 3, 0] = -1e4, -1e4
    cache = small8(SPEC)
    put(cache, [(k, v)] * 2, [12])
    keys, values, _ = cache.snapshot(0)
    others = [c for c in range(8) if c != 5]
    assert float((keys - k)[..., others].abs().max()) < 0.2
    tokens = [t for t in range(12) if t != 3]
    assert float((values - v)[:, :, tokens].abs().max()) < 0.2


def test_two_tokens_share_a_byte() -> None:
    cache: Any = Int4Cache(dataclasses.replace(SPEC, n_layers=1, batch=1), None, 4, 0)
    tokens = torch.tensor([0.0, 15.0, 3.0, 9.0], dtype=torch.float64)[:, None]
    put(cache, [(tokens.expand(1, 2, 4, 8), tokens.expand(1, 2, 4, 8))], [4])
    codes = cache._packed[0][0].codes
    assert codes[0, 0, :2, 0].tolist() == [0 | 15 << 4, 3 | 9 << 4]
    assert codes.shape == (1, 2, 100, 8) and codes.dtype is torch.uint8
    assert cache._packed[0][0].scale[0, 0, 0].tolist() == [[1.0] * 8]


def test_channels_share_a_scale_in_groups_or_by_head_if_that_leaves_a_rest() -> None:
    quantization = Quantization(8, group=4, residual=0)
    assert [quantization.channels(d) for d in (4, 8, 6, 3)] == [4, 4, 6, 3]
    spec = dataclasses.replace(SPEC, head_dim=6)
    cache = filled(small8, 20, spec)
    assert cache._packed[0][1].scale.shape == (3, 2, 196, 1, 1)
    assert cache.nbytes().allocated == storage_nbytes(cache)


@every_kind
def test_padding_has_no_part_in_the_range_of_a_group(kind: str) -> None:
    make = partial(cache_class(kind), group=4, residual=2)  # type: ignore[arg-type]
    found = []
    for value in (0.0, 1e6):
        pairs = random(SPEC, 20)
        for k, v in pairs:
            for row, n in enumerate(PADDING.tolist()):
                k[row, :, :n], v[row, :, :n] = value, value
        cache = make(SPEC, PADDING)
        put(cache, pairs, [20])
        k, v, positions = cache.snapshot(0)
        real = (positions >= 0)[:, None, :, None]
        assert bool(k.isfinite().all()) and bool(v.isfinite().all())
        found.append((k * real, v * real))
    assert all(map(torch.equal, *found))


@every_kind
def test_a_group_is_rounded_once_from_exact_values(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    real = Packed.write

    def watched(self: Packed, start: int, x: Tensor, padding: Tensor | None = None) -> None:
        told.append((start, start + x.shape[2]))
        real(self, start, x, padding)

    monkeypatch.setattr(Packed, "write", watched)
    cache = partial(cache_class(kind), group=4, residual=2)(SPEC, None)  # type: ignore[arg-type]
    put(cache, random(SPEC, 30), [1, 2, 13, 14, 22, 23, 30])
    columns = [c for start, end in told[:: 2 * 2] for c in range(start, end)]
    assert columns == list(range(28)), "two layers, keys and values, each column in turn"


# --- what it costs


def test_a_token_of_the_shipped_size_takes_an_eighth_to_a_third() -> None:
    """d 256 in 8 heads, float32: 32 bytes of codes by 32 channels, 8 of scales; or 16 and 8."""
    for kind, head in (("int8", 32 + 8), ("int4", 16 + 8)):
        spec = CacheSpec(2, 1, 8, 32, 1088)
        cache: Any = cache_class(kind)
        found = cache.predict_nbytes(spec, 1088) - cache.predict_nbytes(
            dataclasses.replace(spec, capacity=1056), 1056
        )
        assert found == 32 * 2 * 2 * 8 * head  # tokens, layers, keys and values, heads


@every_kind
def test_bytes_are_those_predicted_and_a_step_reads_codes_and_the_newest(kind: str) -> None:
    config = ModelConfig(vocab_size=8, n_layers=2, d_model=256, n_heads=8, d_ff=8, context=1200)
    spec = CacheSpec.of(config, 1, 1031)
    cache = cache_class(kind)(spec)
    write(cache, 1000)
    write(cache, 30)
    size = cache.nbytes()
    assert size.allocated == cache.predict_nbytes(spec, 1030, 1000) == storage_nbytes(cache)
    code = {"int8": 8, "int4": 4}[kind]
    token = 2 * 2 * 256 * code // 8 + 2 * 2 * 8 * 2 * 4  # codes; a scale and a zero point a head
    assert size.live == 992 * token + 38 * spec.token_nbytes
    assert size.read_per_step == size.live + spec.token_nbytes
    assert size.allocated < spec.capacity * spec.token_nbytes / {"int8": 2.5, "int4": 3.5}[kind]


def test_a_capacity_that_nothing_settles_in_has_no_codes() -> None:
    for capacity in (1, 5, 33, 63, 64):
        spec = dataclasses.replace(SPEC, capacity=capacity)
        cache = Int4Cache(spec)
        n = 1 if capacity == 64 else 0
        assert (cache.nbytes().allocated > capacity * spec.token_nbytes) == bool(n)
        write(cache, capacity)
        cache.select(torch.tensor([2, 0]))
        cache.snapshot(0)


# --- what is refused, and what says nothing


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("int8", {"group": 0}, "group: 0 is too small"),
        ("int4", {"group": 5}, "group: 5 tokens of 4 bits do not fill bytes"),
        ("int8", {"residual": -1}, "residual: -1 is too small"),
        ("int8", {"slack": -2}, "slack: -2 is too small"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(kind: str, options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        cache_class(kind)(SPEC, **options)


def test_a_cache_that_nobody_met_quantized_tokens_of_says_so() -> None:
    cache = small4(SPEC)
    write(cache, 6)  # the seventh would meet some
    assert cache.vacuous() == "no token met a quantized one (6 tokens held at most)"
    write(cache, 1)
    assert cache.vacuous() is None
    cache.crop(6)
    assert cache.vacuous() is None
    cache.reset()
    assert cache.vacuous() is not None
    padded = small4(SPEC, torch.tensor([4, 5, 6]))
    write(padded, 7)  # all that is quantized is padding
    assert padded.vacuous() is not None
    write(padded, 4)
    assert padded.vacuous() is None


def test_both_kinds_say_that_they_are_not_exact() -> None:
    assert not QuantizedCache.exact and all(not cache_class(kind).exact for kind in KINDS)
