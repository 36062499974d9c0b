"""What every family of models promises, each a function `check_...(family)`.

test_model_contract.py runs them over every registered family, and test_extending.py over the one
that docs/extending.md adds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvtool
from kvtool.config import POSITIONS, ModelConfig
from kvtool.core.cache import CacheSpec, Step, make_cache
from kvtool.core.cache.cross import CrossCache
from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding.engine import feed
from kvtool.core.kernels.default import make_kernels
from kvtool.core.models import Model, build_model
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.errors import UsageError

SIZES: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "context": 32}
SOURCE = {"n_encoder_layers": 1, "source_vocab_size": 23}
# What a family cannot do without.
MORE: dict[str, dict[str, Any]] = {"seq2seq": SOURCE, "latent": {"n_kv_heads": 1}}
N, CLOSE = 12, 1e-12


def small(family: str, **changes: Any) -> ModelConfig:
    return ModelConfig(23, **{**SIZES, **MORE.get(family, {}), **changes}, family=family)


def made(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Model:
    torch.manual_seed(1)
    return build_model(small(family, **changes)).to(dtype).eval()


def ids(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(23, (batch, N), generator=torch.Generator().manual_seed(seed))


def read(model: Model) -> CrossCache | None:
    """An encoded source, for a family that reads one."""
    if not model.config.n_encoder_layers:
        return None
    return model.encode(ids(seed=1), torch.ones(2, N, dtype=torch.bool))


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def check_its_name_is_the_one_in_the_table(family: str) -> None:
    config = made(family).config
    assert config.kind == family and config.to_dict()["model_type"] == f"kvtool-{family}"


@torch.no_grad()
def check_logits_have_their_shape_and_format(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = made(family, dtype)
        whole = model(ids(), source=read(model))
        assert (whole.shape, whole.dtype) == ((2, N, 23), dtype)
        last = model(ids(), source=read(model), last=True)
        assert last.shape == (2, 1, 23)
    assert gap(last, whole[:, -1:]) < CLOSE


@torch.no_grad()
def check_a_later_token_changes_no_earlier_logit(family: str) -> None:
    model, changed = made(family), ids()
    changed[:, 8] = (changed[:, 8] + 1) % 23
    first, second = (model(x, source=read(model)) for x in (ids(), changed))
    assert first[:, :8].equal(second[:, :8]) and gap(first[:, 8:], second[:, 8:]) > 1e-3


@torch.no_grad()
def check_any_split_gives_the_logits_of_one_pass(family: str) -> None:
    for positions in POSITIONS:
        model = made(family, positions=positions)
        for padding in [None] if model.config.n_encoder_layers else [None, torch.tensor([3, 0])]:
            step = Step.full(2, N, left_padding=padding)
            whole = model(ids(), step, source=read(model))
            spec = CacheSpec.of(model.config, 2, N, torch.float64)
            cache, source = make_cache("dynamic", spec, padding), read(model)
            for end in (5, 6, 7, 10, 12):
                found = feed(model, cache, ids()[:, :end], source)
                # Of a padded row, only what follows the padding means anything.
                assert gap(found, whole[:, end - found.shape[1] : end]) < CLOSE, (positions, end)


@torch.no_grad()
def check_nothing_is_kept_between_calls(family: str) -> None:
    model = made(family)
    before, expected = set(vars(model)), model(ids(), source=read(model))
    spec = CacheSpec.of(model.config, 2, N, torch.float64)
    cache, source = make_cache("static", spec), read(model)
    for end in (4, 8, N):  # whole passes between the steps of a cached one
        found = feed(model, cache, ids()[:, :end], source)
        assert model(ids(), source=read(model)).equal(expected)
    assert gap(found, expected[:, 8:]) < CLOSE and set(vars(model)) == before


@torch.no_grad()
def check_exact_kernels_give_the_same_bits_with_a_cache(family: str) -> None:
    model, exact = made(family, torch.float32), make_kernels("exact")
    whole = model(ids(), Step.full(2, N, kernels=exact), source=read(model))
    spec = CacheSpec.of(model.config, 2, N, kernels=exact)
    cache, source = make_cache("dynamic", spec), read(model)
    for end in (5, 6, 7, 10, 12):
        found = feed(model, cache, ids()[:, :end], source)
        assert found.equal(whole[:, end - found.shape[1] : end]), "not all went through rows()"


@torch.no_grad()
def check_a_checkpoint_is_the_same_model(family: str) -> None:
    model, tokenizer = made(family, torch.float32), Tokenizer.train("char", ["abc"])
    source = tokenizer if model.config.n_encoder_layers else None
    with tempfile.TemporaryDirectory() as folder:
        sha256 = checkpoint.save(Path(folder), model, tokenizer, source)
        loaded = checkpoint.load(folder, torch.device("cpu"), torch.float32)
    assert (loaded.config, loaded.sha256) == (model.config, sha256)
    assert type(loaded.model) is type(model)
    again = loaded.model
    assert again(ids(), source=read(again)).equal(model(ids(), source=read(model)))


@torch.no_grad()
def check_no_field_is_ignored(family: str) -> None:
    """What both passes ignore, no comparison of them can see."""

    def logits(**fields: Any) -> Tensor:
        model = made(family, **fields)
        torch.manual_seed(2)
        return model.train("dropout" in fields)(ids(), source=read(model))

    for less, more in (
        ({}, {"window": 3}),
        ({"window": 3}, {"window": 3, "first_window_layer": 1}),
        ({}, {"dropout": 0.5}),
    ):
        try:
            found, other = logits(**less), logits(**more)
        except UsageError:
            continue  # refused, so not ignored
        assert gap(found, other) > 1e-3, f"{more} change nothing"


def check_every_cache_gives_its_logits(family: str, **only: Any) -> None:
    """In scenarios that have all that a cache does; the next check has the others."""
    only = {"scenarios": ["decode", "chunks", "padded", "permuted", "crop", "reset"], **only}
    report = kvtool.verify(made(family, torch.float32), tokens=4, **only)
    assert report.ok, str(report)


def check_every_scenario_gives_its_logits(family: str) -> None:
    check_every_cache_gives_its_logits(family, scenarios=None, caches=["dynamic", "sliding"])


CHECKS = (
    check_its_name_is_the_one_in_the_table,
    check_logits_have_their_shape_and_format,
    check_a_later_token_changes_no_earlier_logit,
    check_any_split_gives_the_logits_of_one_pass,
    check_nothing_is_kept_between_calls,
    check_exact_kernels_give_the_same_bits_with_a_cache,
    check_a_checkpoint_is_the_same_model,
    check_no_field_is_ignored,
    check_every_cache_gives_its_logits,
    check_every_scenario_gives_its_logits,
)
