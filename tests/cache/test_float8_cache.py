"""What the fp8 cache rounds keys and values to, and that nothing but a token itself decides it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.cache.float8 import CODES, Float8Cache
from kvtool.core.cache.quantization import Float8
from kvtool.core.decoding.dispatch import ONE_CALL, decoding_form
from kvtool.core.decoding.engine import feed
from kvtool.core.native import arrays as native
from kvtool.core.native import coded
from quantized_cases import PADDING, SPEC, put, random
from small_models import random_model

EVERY = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_rounding_by_arithmetic_is_that_of_pytorchs_format() -> None:
    """What a pass without a cache does, and what a cache stores, are written apart."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = every[every.abs() <= 448][:, None]
    # Beside the largest number, so that the scale is 1.
    token = torch.cat([x, torch.full_like(x, 448)], dim=1)
    assert Float8.scale(token).eq(1).all()
    found, _ = Float8().rounded(token, token, torch.zeros(1))
    assert torch.equal(found, token.to(CODES).float())
    assert 253 <= len(found.unique()) <= 254, "all that e4m3 has, of two zeros perhaps one"


@pytest.mark.parametrize("dtype", EVERY)
def test_a_scale_is_the_least_power_of_two_that_leaves_448_at_most(dtype: torch.dtype) -> None:
    sizes = torch.tensor([[0.1], [0.875], [0.876], [1.0], [448.0], [449.0], [6e4]]).to(dtype)
    scale = Float8.scale(sizes)
    assert torch.equal(scale.log2(), scale.log2().round())
    assert bool((sizes / scale <= 448).all() and (sizes / (scale / 2) > 448).all())
    assert float(Float8.scale(torch.zeros(1, 4, dtype=dtype))) > 0
    for wrong in (torch.nan, torch.inf, -torch.inf):
        assert Float8.scale(torch.tensor([[1.0, wrong]], dtype=dtype)).isnan().all()


@pytest.mark.parametrize("dtype", EVERY)
def test_what_is_stored_does_not_depend_on_steps_rows_or_padding(dtype: torch.dtype) -> None:
    spec, n = dataclasses.replace(SPEC, dtype=dtype), 41
    pairs, found = random(spec, n), []
    for ends, padding in (([n], None), (list(range(1, n + 1)), PADDING), ([7, 30, n], None)):
        cache = Float8Cache(spec, padding)
        put(cache, pairs, ends)
        scales = [t for pair in cache._scales for t in pair]
        found.append([t[:, :, :n].clone() for t in (*cache._keys, *cache._values, *scales)])
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])
    keys, values, _ = cache.snapshot(0)
    rounded = Float8().rounded(*pairs[0], torch.zeros(1))
    assert torch.equal(keys, rounded[0]) and torch.equal(values, rounded[1])
    assert bool((keys != pairs[0][0]).any())


def test_every_code_is_read_as_the_number_that_it_stands_for() -> None:
    """By vectors: of eight tokens alike, of which each weighs an eighth."""
    numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(CODES).float()
    numbers = numbers[numbers.isfinite()]
    attend = native.layer_code(torch.float32)
    assert attend is not None
    for some in numbers.split(16):
        value = torch.cat([some, torch.full((16 - len(some),), 448.0)])
        value[15] = 448.0  # so that the scale is 1
        cache = make_cache("fp8", CacheSpec(1, 1, 1, 16, 9))
        put(cache, [(torch.zeros(1, 1, 8, 16), value.expand(1, 1, 8, 16))], [8])
        place = cache.step_addresses(1)  # type: ignore[attr-defined]
        y, like = np.empty((1, 1, 16), np.float32), native.kind_of(torch.float32)
        k, v = ((0, 0, 0, like, place.coded[side, 0]) for side in (0, 1))
        spans = np.array([[0, 8, 0, 0]])
        attend.attend(np.ones_like(y), 1, 1, k, v, spans, y, 1, native.MIN_SHARED)
        assert y[0, 0].tolist() == value.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_stores_the_same_bytes(dtype: torch.dtype) -> None:
    model = random_model(0).to(dtype)
    decode, ids = decoding_form(model), torch.arange(1, 9)[None] % model.config.vocab_size
    own, other = (make_cache("fp8", CacheSpec.of(model.config, 1, 9, dtype)) for _ in range(2))
    with torch.no_grad():
        for end in range(1, 9):
            feed(decode, own, ids[:, :end])
            feed(model, other, ids[:, :end])
    assert decode.taken[ONE_CALL] == 8
    for a, b in zip(own.snapshot(1), other.snapshot(1), strict=True):
        assert a.equal(b)


def test_it_crops_to_any_length_and_takes_a_byte_a_number() -> None:
    cache = make_cache("fp8", dataclasses.replace(SPEC, dtype=torch.float32))
    put(cache, random(cache.spec, 20), [20])
    assert cache.nbytes().live == 20 * 3 * 2 * 2 * 2 * (8 + 4)
    for length in (13, 5, 0):
        cache.crop(length)
        assert cache.length == length


def test_compiled_code_finds_what_it_is_told_where_it_looks() -> None:
    assert native.layer_code(torch.float32) is not None
    from kvtool.core.native.compiled import codes

    assert len(coded.Coded._fields) == codes.N_FACTS == native.NO_CODES.size
    for at, name in enumerate(coded.Coded._fields):
        assert getattr(codes, name.upper()) == at
    for name in ("BYTES", "HALF_BYTES", "FLOATS"):
        assert getattr(coded, name) == getattr(codes, f"FORM_{name}")
