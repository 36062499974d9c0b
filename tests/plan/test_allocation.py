"""plan against what caches and models take in fact, to the byte."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import architectures as table
from gguf_files import Made
from kvtool import registry
from kvtool.config import ModelConfig
from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.cache_bytes import RULES
from kvtool.core.checkpoint.described import read_described
from kvtool.core.plan.architectures import architectures
from kvtool.core.plan.source import describe
from kvtool.core.plan.sums import Cache, Load
from plan_cases import N_PROMPT, SOURCE, as_file, layer_tensors, measured, storage, stored_numbers
from plan_defaults import differences
from small_models import random_model, save_decoder

TOKENS = 2 * N_PROMPT
# Chosen for what they keep: grouped heads, windows in all layers, in some, behind the first ones;
# heads wider than the model; layers that share; latents; experts; sources.
TYPES = (
    "llama", "gpt2", "gemma2", "gemma3_text", "gemma3n_text", "deepseek_v3", "phi3", "qwen2",
    "gpt_oss", "mistral", "falcon", "bart", "t5",
)  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1,
              "layer_types": None},
    "phi3": {"sliding_window": 11},
    **{name: {"head_dim": 24} for name in ("llama", "gemma2", "gemma3_text", "gpt_oss")},
}  # fmt: skip
KINDS = [*RULES, "sliding:window=7:sinks=2", "int8:group=8:residual=3", "paged:page=5"]


def tiny(model_type: str) -> Any:
    from kvtool.core.verify.hf import tiny as made

    seq2seq = model_type in ("bart", "t5")
    kind = "seq2seq" if seq2seq else "causal"
    config_class, model_class = made._classes(model_type, kind)
    fields = made.shrunk(made._default_fields(config_class))
    with made.quiet_transformers():
        config = config_class(**{**fields, **CHANGES.get(model_type, {})})
        return model_class._from_config(config).eval(), seq2seq


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_transformers_caches_take_what_was_planned(tmp_path: Path, model_type: str) -> None:
    model, seq2seq = tiny(model_type)
    found = describe(str(as_file(model.config, tmp_path)), "float32")
    load = Load(2, TOKENS, SOURCE if seq2seq else 0)
    for kind, capacity in (("dynamic", TOKENS), ("static", TOKENS + 9)):
        planned = Cache("transformers", kind, found.shapes, 4)
        tokens = dataclasses.replace(load, tokens=capacity)
        assert planned.held(tokens).allocated == measured(model, kind, capacity, seq2seq), kind
    if found.weights is not None:
        assert found.weights.nbytes == 4 * stored_numbers(model)
    assert (found.weights is None) == (model_type in ("bart", "t5", "gemma3n_text"))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("helium", {"attention_bias": True, "num_key_value_heads": 2, "mlp_bias": True}),
        ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True, "num_key_value_heads": 2}),
        ("stablelm", {"use_parallel_residual": True, "num_key_value_heads": 4}),
        ("opt", {}),
        ("opt", {"word_embed_proj_dim": 8}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("falcon", {}),
        ("falcon", {"multi_query": False, "bias": True, "alibi": True}),
        ("falcon", {"parallel_attn": False, "ffn_hidden_size": 48}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
        ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
        ("apertus", {"attention_bias": True, "num_key_value_heads": 2}),
        ("nanochat", {"attention_bias": True, "num_key_value_heads": 1}),
    ],
)
def test_weights_are_counted_as_a_type_is_built_or_not_at_all(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    sizes |= {"head_dim": 8} if model_type == "helium" else {}
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config)
    found = describe(str(as_file(config, tmp_path)), "float32").weights
    if model_type == "opt" and changes:
        assert found is None
    else:
        assert found is not None and found.nbytes == 4 * stored_numbers(model)


@torch.no_grad()
def test_right_after_a_prompt_windows_still_hold_all_of_it(tmp_path: Path) -> None:
    from transformers import DynamicCache

    model, _ = tiny("gemma2")
    shapes = describe(str(as_file(model.config, tmp_path)), "float32").shapes
    n = 3 * max(shapes.windows)
    cache = DynamicCache(config=model.config)
    model(torch.ones(2, n, dtype=torch.long), past_key_values=cache)
    planned = Cache("transformers", "dynamic", shapes, 4)
    load = Load(2, n)
    assert planned.peak(load) == storage(layer_tensors(cache)) > planned.held(load).allocated
    assert planned.most_rows(load, planned.peak(load)) == 2
    assert planned.most_tokens(load, planned.peak(load)) == n


@pytest.mark.parametrize("model_type", ["gemma2", "deepseek_v3"])
def test_the_headers_of_a_folder_agree_with_its_configuration(
    tmp_path: Path, model_type: str
) -> None:
    model, _ = tiny(model_type)
    by_configuration = describe(str(as_file(model.config, tmp_path)), "float32").weights
    model.save_pretrained(tmp_path, max_shard_size="200KB")  # several shards
    assert list(tmp_path.glob("*.index.json"))
    by_headers = describe(str(tmp_path), None).weights
    assert by_configuration is not None and by_headers is not None
    assert by_headers.said_by == "headers"
    assert by_headers.nbytes == by_configuration.nbytes
    assert by_headers.read == by_configuration.read


def own_models(tmp_path: Path) -> list[tuple[str, ModelConfig]]:
    """Of our own: grouped heads, heads of another width, windows, and a latent."""
    found = []
    for name, changes in {
        "grouped": {"n_kv_heads": 2, "head_size": 12},
        "windowed": {"window": 6, "first_window_layer": 1},
        "latent": {"family": "latent", "positions": "rotary", "norm": "rmsnorm"},
    }.items():
        folder = save_decoder(tmp_path / name, **changes)
        found.append((str(folder), read_described(folder)[0]))
    return found


def test_every_kind_takes_what_was_planned(tmp_path: Path) -> None:
    for (path, config), kind, (rows, tokens), dtype in itertools.product(
        own_models(tmp_path), KINDS, ((1, 5), (3, 40)), ("float32", "bfloat16")
    ):
        found = describe(path, dtype)
        spec = CacheSpec.of(config, rows, tokens, getattr(torch, dtype))
        cache = make_cache(kind, spec)
        planned = Cache("kvtool", kind, found.shapes, spec.dtype.itemsize)
        held = planned.held(Load(rows, tokens))
        for n in (tokens - 3, 1, 1, 1):  # as plan counts: all tokens of the capacity are there
            step = cache.begin(n)
            for layer in range(config.n_layers):
                kv = torch.ones(rows, spec.n_kv_heads, n, spec.head_dim, dtype=spec.dtype)
                q = torch.ones(rows, config.n_heads, n, spec.head_dim, dtype=spec.dtype)
                cache.attend(layer, q, kv, kv, step)
            cache.commit(n)
        size = cache.nbytes()
        assert held.allocated == size.allocated, (path, kind, rows)
        if cache.stores and not cache.window:  # a window's spare columns may hold tokens too
            assert held.live == size.live, (path, kind, rows)


def test_every_registered_kind_has_a_rule() -> None:
    assert RULES.keys() == registry.CACHES.keys()


def test_the_pages_table_and_waste_are_those_of_the_cache(tmp_path: Path) -> None:
    config = random_model().config
    folder = save_decoder(tmp_path / "m")
    cache: Any = make_cache("paged:page=16", CacheSpec.of(config, 3, 50))
    cache.make_room(50)
    found = Cache("kvtool", "paged:page=16", describe(str(folder), None).shapes, 4)
    pages = found.pages(Load(3, 50))
    table_on_device = cache._pages()
    assert pages["pages"] == table_on_device.numel() == 12
    assert pages["table_bytes"] == table_on_device.untyped_storage().nbytes()
    assert pages["waste_bytes"] == cache.spec.token_nbytes * (64 - 50)


def test_a_gguf_file_takes_what_its_tensors_and_its_cache_take(tmp_path: Path) -> None:
    path = Made(formats=("Q4_1", "Q8_0", "Q5_0"), n_layers=3).write(tmp_path / "m.gguf")
    found = describe(str(path), "float32")
    config, _ = read_described(path)
    spec = CacheSpec.of(config, 2, 30)
    held = Cache("kvtool", "static", found.shapes, 4).held(Load(2, 30))
    cache: Any = make_cache("static", spec)
    assert held.allocated == storage([*cache._keys, *cache._values])
    assert found.weights is not None
    assert 0 < path.stat().st_size - found.weights.nbytes < 100_000  # its header, and padding


@pytest.mark.parametrize("model_type", TYPES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    entry = table.entry(config)
    known = architectures()[model_type]
    assert known.defaults == entry["defaults"] and known.names == entry["names"]
    assert "".join(table.LETTERS[x] for x in known.layer_types) == entry.get("layers", "")


def test_every_known_type_has_what_it_takes_to_be_planned() -> None:
    for name in architectures():
        assert describe(name, None).shapes.layers, name


@pytest.mark.parametrize(
    "model_type", ["laguna", "mellum", "hrm_text", "qwen2_moe", "glm4_moe", "got_ocr2", "phi3"]
)
def test_a_dynamic_cache_has_the_layers_and_windows_of_the_plan(model_type: str) -> None:
    assert list(differences(model_type)) == []


def test_a_type_with_its_default_sizes_is_what_its_configuration_says(tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    for model_type in ("gemma3_text", "qwen2", "deepseek_v3"):
        path = as_file(CONFIG_MAPPING[model_type](), tmp_path)
        assert describe(model_type, "float32").shapes == describe(str(path), "float32").shapes
        assert json.loads(path.read_text())["model_type"] == model_type
