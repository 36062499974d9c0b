"""Folders of Hugging Face: the same logits as transformers', and caches that hold on them.

1e-12 is rounding in float64 through three layers; what is measured is about 2e-15.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import family_cases
from cli_probe import Ran
from family_cases import (
    CASES,
    CONTEXT,
    TELLING,
    Made,
    expected,
    found,
    gap,
    load,
    tokens,
)
from helpers import advance
from kvtool import registry
from kvtool.config import ModelConfig
from kvtool.core.cache import CacheSpec, Step, make_cache
from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding import engine
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.default import make_kernels
from kvtool.core.models import build_model
from kvtool.core.models.general import GeneralConfig
from kvtool.core.reference import oracle
from small_models import answer

made = family_cases.made
every_case = pytest.mark.parametrize("case", CASES)
JUDGED = (*TELLING[:5], "gemma2", "deepseek_v2")
GENERAL = [case for case in CASES if case.startswith(("granite", "smoll", "phi3", "olmo", "gemma"))]
GENERAL += [case for case in CASES if case.startswith("deepseek")]
GENERAL += ["gpt2, scores by depth", "gpt2, raw scores by depth"]
SHAPING = {"family", "norm_place", "qk_norm_whole"}  # with other weights, which could not be loaded
SMALL = {"sliding": "sliding:window=9:sinks=2", "int8": "int8:group=4:residual=4"}
SMALL |= {"int4": "int4:group=4:residual=4", "paged": "paged:page=4"}
LATENT_SIZES = {"q_rank", "kv_rank", "still_dim", "value_dim", "rotary_dim"}


# --- the same mathematics


@every_case
def test_logits_agree_with_transformers_over_the_whole_context(case: str, made: Made) -> None:
    model, folder = made(case)
    ids = tokens(CONTEXT)
    assert gap(found(folder, ids), expected(model, ids)) < 1e-12


@every_case
def test_the_numpy_oracle_agrees_with_transformers(case: str, made: Made) -> None:
    model, folder = made(case)
    config, ids = load(folder).config, tokens(CONTEXT)
    weights = {n: w.numpy() for n, w in checkpoint.load_weights(folder, config).items()}
    logits = torch.from_numpy(oracle.logits(weights, config, ids[0].tolist()))
    assert gap(logits, expected(model, ids)[0]) < 1e-12


@every_case
def test_greedy_tokens_are_those_that_transformers_generates(case: str, made: Made) -> None:
    model, folder = made(case)
    prompt, n_new = tokens(9), 16
    model.generation_config.eos_token_id = None
    theirs = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n_new,
        do_sample=False,
        pad_token_id=0,
    )
    ours = load(folder).model
    spec = CacheSpec.of(ours.config, 2, 9 + n_new, torch.float64)
    steps = engine.generate(ours, prompt, make_cache("dynamic", spec), n_new, Sampler(0.0))
    assert torch.equal(torch.stack(list(steps), dim=1), theirs[:, 9:])


@pytest.mark.parametrize(
    "case",
    [
        "llama, linear",
        "llama, llama3",
        "llama, yarn",
        "mistral, window",
        "qwen2, window in later layers",
    ],
)
def test_an_option_that_agrees_is_not_idle(case: str, made: Made) -> None:
    """Without it the logits differ, so that agreement says something."""
    model, folder = made(case)
    loaded, ids = load(folder), tokens(CONTEXT)
    without = replace(loaded.config, rope_scaling=None, window=0, first_window_layer=0)
    plain = build_model(without).double().eval()
    plain.load_state_dict(loaded.model.state_dict())
    with torch.no_grad():
        assert gap(plain(ids), expected(model, ids)) > 1e-3


@pytest.mark.parametrize("case", GENERAL)
def test_each_setting_of_a_family_changes_its_logits(case: str, made: Made) -> None:
    """So that the ones that agree with transformers are not there by name alone."""
    model, folder = made(case)
    loaded, ids = load(folder), tokens(CONTEXT)
    config, right = loaded.config, expected(model, ids)
    if not isinstance(config, GeneralConfig):
        return
    sizes = LATENT_SIZES if config.kind == "latent" else set()
    for field in fields(config)[len(fields(ModelConfig)) :]:
        if getattr(config, field.name) == field.default or field.name in SHAPING | sizes:
            continue
        changes = {field.name: field.default}
        if field.name == "window_theta":
            changes["window_scaling"] = None
        if field.name == "rotary_dim":  # LongRoPE has a factor for each pair that turns
            changes["rope_scaling"] = None
        if replace(config, **changes) == config:  # the default is what is there
            continue
        plain = build_model(replace(config, **changes)).double().eval()
        plain.load_state_dict(loaded.model.state_dict())
        with torch.no_grad():
            assert gap(plain(ids), right) > 1e-3, field.name


def test_only_later_layers_have_the_window_of_qwen2(made: Made) -> None:
    config = load(made("qwen2, window in later layers")[1]).config
    assert (config.window, config.first_window_layer, config.n_layers) == (6, 1, 3)


# --- caches


@pytest.mark.parametrize(
    ("kind", "kernels"), [*((kind, "default") for kind in registry.CACHES), ("dynamic", "exact")]
)
@pytest.mark.parametrize("case", TELLING)
def test_every_cache_kind_gives_the_logits_of_one_pass(
    case: str, kind: str, kernels: str, made: Made
) -> None:
    """Under the same window and rounding of keys, and with exact kernels bit for bit. One by one or
    in chunks, in turns: each family and each kind meets both."""
    model, ids = load(made(case)[1]).model, tokens(20)
    used = make_kernels(kernels)
    spec = CacheSpec.of(model.config, 2, 20, torch.float64, kernels=used)
    cache = make_cache(SMALL.get(kind, kind), spec)
    seen = (cache.window, cache.sinks, cache.quantization)
    turn = TELLING.index(case) + [*registry.CACHES].index(kind)
    for chunk in (1, 7) if kernels == "exact" else ((1, 7)[turn % 2],):
        cache.reset()
        cached = advance(model, cache, ids, chunk)
        with torch.no_grad():
            uncached = model(ids, Step.full(2, 20, None, None, used, *seen))
        difference = gap(cached, uncached)
        assert difference == 0.0 if kernels == "exact" else difference < 1e-12


@pytest.mark.parametrize("case", JUDGED)
def test_verify_cache_finds_the_planted_bug_and_no_other(
    case: str, made: Made, kv: Callable[..., Ran]
) -> None:
    folder = str(made(case)[1])
    args = "--caches dynamic paged --kernels default exact --scenarios decode padded"
    args = f"--model {folder} --tokens 8 --threads 1 --json {args}"
    document = answer(kv(*args.split(), command="verify-cache"))
    verdicts = {row["verdict"] for row in document["checks"]}
    assert verdicts <= {"rounding", "identical"}, verdicts
    assert document["control"]["verdict"] == "bug"


@pytest.mark.parametrize("case", ["gpt2, untied head", "llama, yarn, mscale", "qwen3"])
@pytest.mark.parametrize("against", ["numpy", "transformers"])
def test_verify_logits_agrees_with_both_witnesses(
    case: str, against: str, made: Made, kv: Callable[..., Ran]
) -> None:
    args = f"--model {made(case)[1]} --against {against} --threads 1 --json"
    document = answer(kv(*args.split(), command="verify-logits"))
    assert document["worst_float64"] < 1e-13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["gpt2, untied head", "llama, tied head", "qwen3"])
def test_verify_logits_finds_the_same_to_the_last_bit_when_weights_are_widened_as_they_are_read(
    case: str, dtype: str, made: Made, kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = f"--model {made(case)[1]} --against transformers --threads 1 --json --dtype {dtype}"
    usual = answer(kv(*args.split(), command="verify-logits"))
    monkeypatch.setattr("kvtool.core.verify.widened.LARGE_BYTES", -1)
    read: list[Path] = []
    load_weights = checkpoint.load_weights
    monkeypatch.setattr(
        checkpoint, "load_weights", lambda *args: read.append(args[0]) or load_weights(*args)
    )
    wide = answer(kv(*args.split(), command="verify-logits"))
    assert wide["positions"] == usual["positions"]
    assert not read  # a second time, under kvtool's names
