"""Exact kernels: cached logits are those of one uncached pass, bit for bit.

The uncached arm is `model(ids, Step.full(...))`: layer by layer over the whole sequence, with no
cache class in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.config import ModelConfig
from kvtool.core.cache import CacheSpec, Step, make_cache
from kvtool.core.cache.sliding import SlidingCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.decoding.engine import feed
from kvtool.core.kernels.default import DEFAULT, DefaultKernels, Kernels, reference_attention
from kvtool.core.kernels.exact import EXACT, ExactKernels, aligned
from kvtool.core.kernels.masks import visible
from kvtool.core.models import Model
from kvtool.core.models.layers import MLP, Linear
from kvtool.core.native.compiled.tiles import CACHED
from small_models import random_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Blocks as narrow as this make a short sequence fill several, the last one in part.
PADDING = torch.tensor([0, 3, 17])  # of each row: none, some, more than a block
N = 53  # tokens
CAPACITY = 61
SHAPES: dict[str, dict[str, Any]] = {
    "usual": {},
    "odd": {"d_model": 6, "n_heads": 3, "d_ff": 7, "positions": "learned", "bias": False},
    "grouped": {
        "d_model": 24,
        "n_kv_heads": 2,
        "d_ff": 10,
        "positions": "rotary",
        "activation": "swiglu",
        "norm": "rmsnorm",
        "vocab_size": 260,
        "tied": False,
    },
}
DEFAULT_SIZE: dict[str, Any] = {
    "vocab_size": 1024,
    "d_model": 256,
    "n_heads": 8,
    "d_ff": 1024,
    "context": 1152,
}


@pytest.fixture(autouse=True)
def one_thread_without_gradients() -> Iterator[None]:
    """Many small products are slow on several threads beside other work; one test takes two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def random_ids(vocab_size: int, *shape: int) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(7))


def chunks(n: int, how: str) -> list[int]:
    """Lengths of the steps in which n tokens are fed."""
    if how == "at once":
        return [n]
    if how == "one by one":
        return [1] * n
    generator = torch.Generator().manual_seed(n)
    cuts = sorted({n, *torch.randint(1, n, (n // 6,), generator=generator).tolist()})
    return [end - start for start, end in zip([0, *cuts], cuts, strict=False)]


def cached(
    model: Model,
    ids: Tensor,
    kernels: Kernels,
    kind: str = "dynamic",
    how: str = "one by one",
    padding: Tensor | None = None,
    capacity: int = CAPACITY,
) -> Tensor:
    """The logits of every token, each from the step that brought it."""
    dtype = next(model.parameters()).dtype
    spec = CacheSpec.of(model.config, ids.shape[0], capacity, dtype, kernels=kernels)
    cache, found, end = make_cache(kind, spec, padding), [], 0
    for n in chunks(ids.shape[1], how):
        end += n
        logits = feed(model, cache, ids[:, :end])
        found.append(logits[:, -n:])  # without a cache the earlier ones come again
    return torch.cat(found, dim=1)


def uncached(model: Model, ids: Tensor, kernels: Kernels, padding: Tensor | None = None) -> Tensor:
    return model(ids, Step.full(*ids.shape, left_padding=padding, kernels=kernels))


# Cached and uncached


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_split_gives_the_bits_of_one_uncached_pass(dtype: torch.dtype, shape: str) -> None:
    """With padding or one row without, in turns: each format and each shape meets both."""
    padding = PADDING if (DTYPES.index(dtype) + (*SHAPES,).index(shape)) % 2 else None
    model = random_model(0, dtype, **SHAPES[shape])
    ids = random_ids(model.config.vocab_size, 1 if padding is None else len(padding), N)
    expected = uncached(model, ids, EXACT, padding)
    assert bool(expected.isfinite().all())
    for kind in ("dynamic", "static"):
        for how in ("at once", "one by one", "at random"):
            assert cached(model, ids, EXACT, kind, how, padding).equal(expected), (kind, how)


@pytest.mark.parametrize("padding", [None, PADDING], ids=["alone", "padded"])
def test_computing_everything_again_gives_the_same_bits(padding: Tensor | None) -> None:
    model = random_model()
    ids = random_ids(23, 1 if padding is None else len(padding), 24)
    expected = uncached(model, ids, EXACT, padding)
    assert cached(model, ids, EXACT, "none", padding=padding).equal(expected)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "dynamic"), (torch.bfloat16, "static")],
    ids=str,
)
def test_a_thousand_steps_of_the_default_size_are_identical(dtype: torch.dtype, kind: str) -> None:
    model = random_model(0, dtype, **DEFAULT_SIZE)
    ids = random_ids(1024, 1, 1000)
    found = cached(model, ids, EXACT, kind, capacity=1151)
    same = (found == uncached(model, ids, EXACT)).all(-1)
    assert int(same.sum()) == 1000


@pytest.mark.parametrize("padding", [None, PADDING], ids=["alone", "padded"])
@pytest.mark.parametrize("window", [1, 5, 9])
def test_a_window_that_evicts_gives_the_bits_of_one_pass_under_it(
    window: int, padding: Tensor | None
) -> None:
    """The cache holds other columns than the pass, and the same keys are seen in the same order."""
    model = random_model(0, **SHAPES["grouped"])
    ids = random_ids(model.config.vocab_size, 1 if padding is None else len(padding), N)
    spec = CacheSpec.of(model.config, ids.shape[0], N, kernels=EXACT)
    step = Step.full(*ids.shape, None, padding, EXACT, window, 2)
    expected = model(ids, step)
    for how in ("one by one", "at random"):
        cache, found, end = SlidingCache(spec, padding, window, sinks=2), [], 0
        for n in chunks(N, how):
            end += n
            found.append(feed(model, cache, ids[:, :end]))
        real = torch.ones_like(ids, dtype=torch.bool) if padding is None else step.q_pos >= 0
        assert torch.cat(found, dim=1)[real].equal(expected[real]), how
        assert cache.vacuous() is None


def test_the_bits_of_a_row_do_not_depend_on_its_padding() -> None:
    model = random_model(0, **SHAPES["grouped"])
    ids = random_ids(model.config.vocab_size, 1, N)
    alone = uncached(model, ids, EXACT)
    for n_padding in (1, 7, 20):
        padded = torch.cat([ids[:, :1].expand(1, n_padding), ids], dim=1)
        found = uncached(model, padded, EXACT, torch.tensor([n_padding]))
        assert found[:, n_padding:].equal(alone), n_padding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_threads_share_the_work_without_a_trace(dtype: torch.dtype) -> None:
    """Products of this width are split between them."""
    torch.set_num_threads(2)
    model = random_model(0, dtype, **{**DEFAULT_SIZE, "n_layers": 1})
    ids = random_ids(1024, 2, 20)  # padding is 17 of them
    expected = uncached(model, ids, EXACT, PADDING[1:])
    for kind, how in (("dynamic", "one by one"), ("static", "at random")):
        assert cached(model, ids, EXACT, kind, how, PADDING[1:]).equal(expected)
    alone = cached(model, ids[1:], EXACT, padding=PADDING[2:])
    assert alone.equal(expected[1:])


@pytest.mark.parametrize(
    "kernels",
    [
        DEFAULT,
        type("DefaultLayers", (ExactKernels,), {"per_token": DefaultKernels.per_token})(),
        type("DefaultAttention", (ExactKernels,), {"attention": DefaultKernels.attention})(),
    ],
    ids=lambda kernels: type(kernels).__name__,
)
def test_without_exact_kernels_the_same_comparison_finds_rounding(kernels: Kernels) -> None:
    """So it can fail; and neither half of the exact kernels is enough."""
    model = random_model(0, **DEFAULT_SIZE)
    ids = random_ids(1024, 1, 50)
    found, expected = cached(model, ids, kernels), uncached(model, ids, kernels)
    assert not found.equal(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_lost_column_is_no_rounding_even_so() -> None:
    model = random_model()
    ids = random_ids(23, 1, N)
    spec = CacheSpec.of(model.config, 1, CAPACITY, kernels=EXACT)
    cache = make_cache("static", spec)
    feed(model, cache, ids[:, :-1])
    assert isinstance(cache, StaticCache)
    cache._values[0][:, :, 2] = 0.0
    assert not feed(model, cache, ids)[:, -1].equal(uncached(model, ids, EXACT)[:, -1])


# Encoder-decoders


@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_encoder_decoder_is_exact_too(dtype: torch.dtype, positions: str) -> None:
    """The source of each row is longer than a block; the encoder runs again for the other arm."""
    sizes: dict[str, Any] = {"n_encoder_layers": 2, "source_vocab_size": 31, "n_kv_heads": 2}
    model = random_model(0, dtype, positions=positions, **sizes)
    source, ids = random_ids(31, 3, 21), random_ids(23, 3, 40)
    real = torch.arange(21) < torch.tensor([21, 17, 4])[:, None]
    spec = CacheSpec.of(model.config, 3, CAPACITY, dtype, kernels=EXACT)
    cache, cross = make_cache("static", spec), model.encode(source, real, EXACT)
    found = [feed(model, cache, ids[:, :end], cross) for end in range(1, 41)]
    again = model.encode(source, real, EXACT)
    expected = model(ids, Step.full(3, 40, kernels=EXACT), source=again)
    assert torch.cat(found, dim=1).equal(expected)
    for row, n in enumerate([21, 17, 4]):  # without the padding of its source
        one = model.encode(source[row : row + 1, :n], real[row : row + 1, :n], EXACT)
        alone = model(ids[row : row + 1], Step.full(1, 40, kernels=EXACT), source=one)
        assert alone.equal(expected[row : row + 1])


# What else is there


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_whatever_else_is_in_the_batch(dtype: torch.dtype) -> None:
    model = random_model(0, dtype)
    ids = random_ids(23, 3, N)
    expected = cached(model, ids, EXACT, "static", "at random", PADDING)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = cached(model, ids[rows], EXACT, padding=PADDING[rows])
        assert alone.equal(expected[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_the_same_from_a_small_or_a_large_matrix_and_beside_other_rows(
    dtype: torch.dtype,
) -> None:
    layer = Linear(250, 1100, bias=False, dtype=dtype)
    part = Linear(250, 30, bias=False, dtype=dtype)
    x = torch.randn(7, 250, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(6))
        part.weight.copy_(layer.weight[:30])
        assert part.weight.numel() <= CACHED < layer.weight.numel()
        expected = EXACT.per_token(x[None], layer)[0]
        for n_rows in (1, 2, 3, 5):
            assert EXACT.per_token(x[None, :n_rows], layer)[0].equal(expected[:n_rows])
            assert EXACT.per_token(x[None, :n_rows], part)[0].equal(expected[:n_rows, :30])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_that_hold_nothing_change_no_bit(dtype: torch.dtype) -> None:
    model = random_model(0, dtype)
    ids = random_ids(23, 2, N)
    cache = make_cache("static", CacheSpec.of(model.config, 2, CAPACITY, dtype, kernels=EXACT))
    assert isinstance(cache, StaticCache)
    for buffer in (*cache._keys, *cache._values):
        buffer.fill_(torch.finfo(dtype).max)
    found = [feed(model, cache, ids[:, :end]) for end in range(1, N + 1)]
    assert torch.cat(found, dim=1).equal(uncached(model, ids, EXACT))


# Attention by itself


def random_qkv(
    n_kv_heads: int, n_queries: int, n_keys: int, dtype: torch.dtype, head_dim: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_keys)
    sizes = [(2, 4, n_queries), (2, n_kv_heads, n_keys), (2, n_kv_heads, n_keys)]
    q, k, v = (torch.randn(*size, head_dim, generator=generator) for size in sizes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def allowed(q: Tensor, k: Tensor, v: Tensor) -> float:
    """What rounding may add up to: D terms a score, S terms a sum, then one cast to the format."""
    eps = torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
    largest = float((q.double() @ k.double().repeat_interleave(4 // k.shape[1], 1).mT).abs().max())
    sums = 2 * (q.shape[3] * largest + k.shape[2] + 8) * eps
    return float(v.abs().max()) * (sums + torch.finfo(q.dtype).eps)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_follows_its_formula(dtype: torch.dtype, n_kv_heads: int) -> None:
    q, k, v = random_qkv(n_kv_heads, 3, 40, dtype)
    positions = torch.stack([torch.arange(40), torch.arange(40) - 5])
    window = visible(positions[:, -3:], positions, window=9)
    broadcast = (positions >= 0)[:, None, None]
    for mask in (None, visible(positions[:, -3:], positions), window, broadcast):
        found = EXACT.attention(q, k, v, mask, False)
        expected = reference_attention(q, k, v, mask, False)
        assert (found.dtype, found.shape) == (dtype, q.shape)
        assert float((found.double() - expected).abs().max()) < allowed(q, k, v)
    q, k, v = random_qkv(n_kv_heads, 40, 40, dtype)
    found, expected = (
        EXACT.attention(q, k, v, None, True),
        reference_attention(q, k, v, None, True),
    )
    assert float((found.double() - expected).abs().max()) < allowed(q, k, v)


@pytest.mark.parametrize("head_dim", [1, 2, 6, 16, 24, 32, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_keys_stand_in_memory_does_not_matter(dtype: torch.dtype, head_dim: int) -> None:
    """Dense, inside longer buffers of odd lengths, token by token, and at an odd address."""
    n = 259
    q, k, v = random_qkv(2, 1, n, dtype, head_dim)
    expected = EXACT.attention(q, k, v, None, False)

    def buffered(x: Tensor, extra: int, offset: int) -> Tensor:
        flat = torch.zeros(2 * 2 * (n + extra) * head_dim + offset, dtype=dtype)
        inner = flat[offset:].view(2, 2, n + extra, head_dim)[:, :, :n]
        return inner.copy_(x)

    places = [(0, 1), (1, 0), (17, 0), (64, 0), (64, 16), (5, 3)]
    moved = [[buffered(x, extra, offset) for x in (k, v)] for extra, offset in places]
    moved.append([x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)])
    for keys, values in moved:
        assert EXACT.attention(q, keys, values, None, False).equal(expected)
        placed = aligned(keys[1], torch.promote_types(dtype, torch.float32))
        matrix, *inner = placed.stride()  # this BLAS would not mind; another one may
        assert placed.data_ptr() % 64 == matrix * placed.itemsize % 64 == 0
        assert inner == [head_dim, 1]


def test_a_padding_query_is_not_nan_and_sees_itself_alone() -> None:
    q, k, v = random_qkv(2, 40, 40, torch.float32)
    positions = torch.arange(-20, 20).expand(2, 40)
    found = EXACT.attention(q, k, v, visible(positions, positions), False)
    assert found[:, :2, :20].equal(v[:, :1, :20].expand(2, 2, 20, 8))  # each saw itself alone
    assert bool(found.isfinite().all())


def test_a_query_without_a_key_is_nan_as_with_the_default_kernels() -> None:
    q, k, v = random_qkv(2, 3, 6, torch.float32)
    mask = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    mask[1, 0, 2] = False
    found = EXACT.attention(q, k, v, mask, False)
    assert bool(found[1, :, 2].isnan().all()) and bool(found[0].isfinite().all())
    assert bool(found[1, :, :2].isfinite().all())


@pytest.mark.parametrize("n_queries", [1, 5])
def test_causal_is_refused_where_it_would_be_aligned_wrongly(n_queries: int) -> None:
    q, k, v = random_qkv(4, n_queries, 6, torch.float32)
    with pytest.raises(ValueError, match=rf"as many queries as keys \({n_queries}, 6\)"):
        EXACT.attention(q, k, v, None, True)


def test_layers_follow_one_another_and_see_one_token_each() -> None:
    x, layer, seen = torch.randn(2, 3, 5), torch.nn.Linear(5, 4), []

    def spy(token: Tensor) -> Tensor:
        seen.append((tuple(token.shape), token.storage_offset()))
        return token

    found = EXACT.per_token(x, spy, layer, torch.exp)
    torch.testing.assert_close(found, layer(x).exp())
    assert seen == [((1, 1, 5), 0)] * 6


def test_a_layer_of_another_kind_within_ours_sees_one_token_at_a_time() -> None:
    mlp = MLP(ModelConfig(vocab_size=9, n_layers=1, d_model=16, n_heads=2, d_ff=24))
    mlp.down = torch.nn.Linear(24, 16)  # type: ignore[assignment]
    seen: list[int] = []
    mlp.down.register_forward_hook(lambda _, args, y: seen.append(args[0].numel() // 24))
    with torch.inference_mode():
        EXACT.per_token(torch.randn(2, 3, 16), mlp)
    assert seen == [1] * 6
