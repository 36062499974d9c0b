"""A folder in other forms: shards, other names, old spellings, kvtool's own; and its text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import family_cases
from cli_probe import Ran
from family_cases import (
    CONTEXT,
    GPT2,
    LLAMA,
    LLAMA3,
    LONGROPE,
    TELLING,
    YARN,
    Made,
    build,
    edit,
    expected,
    found,
    gap,
    load,
    refusal,
    save,
    tokens,
    turned,
)
from kvtool.config import ModelConfig
from kvtool.core.checkpoint import checkpoint
from kvtool.core.text.tokenizer import Tokenizer
from small_models import answer

made = family_cases.made


# --- other forms of the same folder


def test_shards_are_the_same_model(tmp_path: Path, made: Made) -> None:
    model, _ = made("qwen3")
    save(model, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-0000?-of-0000?.safetensors"))) >= 3
    ids = tokens(12)
    assert gap(found(tmp_path, ids), expected(model, ids)) < 1e-12


@pytest.mark.parametrize("case", ["gpt2", "llama, tied head"])
def test_a_model_saved_without_a_head_has_names_without_a_prefix(
    case: str, tmp_path: Path, made: Made
) -> None:
    model, folder = made(case)
    save(model.base_model, tmp_path)
    assert found(tmp_path, tokens(9)).equal(found(folder, tokens(9)))


def test_the_language_model_of_a_gemma3_that_reads_images_is_read(
    tmp_path: Path, made: Made
) -> None:
    """Its folder, with what reads images beside it, is the same model as the text's alone, but that
    transformers bounds no logits there."""
    _, folder = made("gemma3, two turns")
    fields = json.loads((folder / "config.json").read_text())
    cap = fields.pop("final_logit_softcapping")
    whole = {"model_type": "gemma3", "text_config": fields, "vision_config": {"hidden_size": 16}}
    whole |= {"mm_tokens_per_image": 4, "image_token_index": 60, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    named = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    named["vision_tower.vision_model.head.weight"] = torch.zeros(2)
    named["multi_modal_projector.mm_input_projection_weight"] = torch.zeros(2)
    safetensors.torch.save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    assert load(tmp_path).config == dataclasses.replace(load(folder).config, logits_cap=0.0)
    bounded = cap * (found(tmp_path, tokens(9)) / cap).tanh()
    assert gap(bounded, found(folder, tokens(9))) < 1e-15
    edit(tmp_path, lambda data: data["text_config"].update(final_logit_softcapping=cap))
    assert "final_logit_softcapping: is not supported" in refusal(tmp_path)
    edit(tmp_path, lambda data: data["text_config"].update(final_logit_softcapping=None))
    edit(tmp_path, lambda data: data.update(tie_word_embeddings=False))
    assert "tie_word_embeddings: False is not supported" in refusal(tmp_path)


@pytest.mark.parametrize("case", ["gpt2", "llama, tied head"])
def test_a_tied_head_may_be_stored_in_place_of_the_embedding(
    case: str, tmp_path: Path, made: Made, kv: Callable[..., Ran]
) -> None:
    model, folder = made(case)
    save(model, tmp_path)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" in stored and not any("embed_tok" in x or "wte" in x for x in stored)
    assert found(tmp_path, tokens(9)).equal(found(folder, tokens(9)))
    args = f"--model {tmp_path} --against transformers --threads 1 --json"
    assert answer(kv(*args.split(), command="verify-logits"))["worst_float64"] < 1e-13


@pytest.mark.parametrize(
    ("case", "old"),
    [
        ("llama", {}),
        ("llama, theta", {"rope_theta": 500.0}),
        ("llama, linear", {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4}}),
        (
            "llama, llama3",
            {"rope_theta": 500, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        ),
        ("llama, yarn", {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **YARN}}),
        ("gemma2", {}),
        ("gemma3", {}),
        ("gemma3", {"rope_theta": 1_000_000, "rope_local_base_freq": 10_000}),
        (
            "gemma3, two turns",
            {
                "rope_theta": 900.0,
                "rope_local_base_freq": 50.0,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            },
        ),
        ("smollm3", {}),
        (
            "phi3, longrope",
            {
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": CONTEXT,
                "rope_scaling": {
                    "type": "su",
                    **{name: LONGROPE[name] for name in ("short_factor", "long_factor")},
                },
            },
        ),
        (
            "deepseek_v2, no latent queries, mscale",
            {
                "rope_theta": 500.0,
                "rope_scaling": {"type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 0.3},
            },
        ),
    ],
)
def test_the_old_spelling_of_rotary_positions_says_the_same(
    case: str, old: dict[str, Any], tmp_path: Path, made: Made
) -> None:
    _, folder = made(case)
    copied = _copy(folder, tmp_path)
    edit(copied, lambda data: (data.pop("rope_parameters"), data.update(old)))
    assert load(copied).config == load(folder).config


@pytest.mark.parametrize(
    "pattern", [["full_attention"] * 3, ["full_attention", *["sliding_attention"] * 2]]
)
def test_layer_types_say_which_layers_have_the_window(
    pattern: list[str], tmp_path: Path, made: Made
) -> None:
    copied = _copy(made("qwen2, window in later layers")[1], tmp_path)
    edit(copied, lambda data: data.update(layer_types=pattern, max_window_layers=3))
    config, n_full = load(copied).config, pattern.count("full_attention")
    assert (config.window, config.first_window_layer) == ((6, n_full) if n_full < 3 else (0, 0))


def test_a_window_as_wide_as_the_context_is_none(tmp_path: Path, made: Made) -> None:
    copied = _copy(made("mistral, window")[1], tmp_path)
    edit(copied, lambda data: data.update(sliding_window=CONTEXT))
    assert load(copied).config.window == 0


def _copy(folder: Path, target: Path) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# --- kvtool's own form


def test_a_model_of_every_option_survives_being_saved_as_kvtools_own(
    tmp_path: Path, made: Made
) -> None:
    for case in TELLING:
        loaded = load(made(case)[1])
        checkpoint.save(tmp_path, loaded.model, Tokenizer.train("char", ["abc"]))
        again = load(tmp_path)
        assert again.config == loaded.config
        with torch.no_grad():
            assert again.model(tokens(9)).equal(loaded.model(tokens(9)))


def test_files_without_the_added_fields_stay_as_they_were() -> None:
    plain = ModelConfig(vocab_size=9, positions="rotary")
    assert list(plain.to_dict())[-2:] == ["rope_theta", "dropout"]
    assert "qk_norm" in replace(plain, qk_norm=True).to_dict()
    assert plain.plain() == plain and replace(plain, qk_norm=True, window=3).plain() == plain
    named = [field.name for field in fields(ModelConfig)]
    assert named[named.index("dropout") + 1] == "head_size"


# --- text


def with_tokenizer(folder: Path, target: Path, **generation: Any) -> Path:
    """A copy with a tokenizer whose rule is a first token before every text."""
    _copy(folder, target)
    letters = Tokenizer.train("char", ["abcdefghij klmnopqrstuvwxyz"])
    spec = json.loads(letters._inner.to_str())
    begin = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }
    (target / "tokenizer.json").write_text(json.dumps(spec))
    if generation:
        (target / "generation_config.json").write_text(json.dumps(generation))
    return target


def test_text_is_framed_as_the_folders_tokenizer_says(tmp_path: Path, made: Made) -> None:
    tokenizer = load(with_tokenizer(made("llama")[1], tmp_path)).tokenizer
    ids = tokenizer.encode("cab")
    assert ids[0] == 1 and len(ids) == 4
    assert tokenizer.encode_batch(["cab"]) == [ids]
    assert tokenizer.end_ids == {1}  # what config.json says


@pytest.mark.parametrize("beams", [1, 3])
def test_each_end_token_of_generation_config_ends_a_text(
    beams: int, tmp_path: Path, made: Made, kv: Callable[..., Ran]
) -> None:
    folder = with_tokenizer(made("llama")[1], tmp_path)
    args = f"--model {folder} --prompt cab --temperature 0 --max-tokens 12 --json --threads 1"
    args = f"{args} --beams {beams}"
    edit(folder, lambda data: data.update(eos_token_id=None), "generation_config.json")
    edit(folder, lambda data: data.update(eos_token_id=None))
    (free,) = answer(kv(*args.split(), command="generate"))["results"]
    assert (free["new_tokens"], free["ended"]) == (12, False)
    ends = list(range(30))  # some of the likeliest are among so many
    edit(folder, lambda data: data.update(eos_token_id=ends), "generation_config.json")
    (ended,) = answer(kv(*args.split(), command="generate"))["results"]
    assert ended["ended"] and ended["new_tokens"] < 12


@pytest.mark.parametrize("fields", [GPT2, {**LLAMA, **turned("linear", factor=2.0)}])
def test_only_text_needs_a_tokenizer(
    fields: dict[str, Any], tmp_path: Path, kv: Callable[..., Ran]
) -> None:
    folder = save(build(fields), tmp_path)
    ran = kv(*f"--model {folder} --prompt x".split(), command="generate")
    assert ran.code == 2 and "tokenizer.json: not found, and text needs a tokenizer" in ran.err
    ran = kv(*f"--model {folder} --against numpy --prompt x".split(), command="verify-logits")
    assert ran.code == 2 and "text needs a tokenizer" in ran.err
    bench = f"--model {folder} --lengths 2 --repeats 1 --caches none,dynamic --threads 1 --json"
    assert answer(kv(*bench.split(), command="bench"))["schema"] == "kvtool.bench/1"
