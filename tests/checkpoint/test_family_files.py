"""Folders of Hugging Face that are damaged, hostile or of models that kvtool has not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import family_folders
from cli_probe import Ran
from family_cases import CONTEXT, edit, found, load, refusal, tokens
from family_configs import PUBLISHED
from family_folders import K_PROJ, Change, set_to, turn_to
from kvtool.config import RopeScaling
from kvtool.core.checkpoint.families import FAMILIES
from kvtool.core.checkpoint.families.fields import HARMLESS, NEUTRAL
from kvtool.core.reference import witness
from kvtool.errors import FileError

originals, copy = (
    family_folders.originals,
    family_folders.copy,
)


# --- fields that are not understood

REFUSED: list[tuple[str, Change, str]] = [
    ("llama", set_to(clever_gate=True), "unknown field 'clever_gate' (found 'True') might change"),
    ("llama", set_to(sliding_window=8), "unknown field 'sliding_window'"),
    ("llama", set_to(auto_map={"AutoModel": "x.Y"}), "unknown field 'auto_map'"),
    ("llama", set_to(quantization_config={"bits": 4}), "unknown field 'quantization_config'"),
    ("llama", set_to(partial_rotary_factor=0.5), "partial_rotary_factor: 0.5 is not supported"),
    ("llama", set_to(rope_interleaved=True), "rope_interleaved: True is not supported"),
    ("llama", set_to(hidden_act="gelu"), "hidden_act: 'gelu' is not supported (expected one of"),
    ("llama", set_to(hidden_act=["silu"]), "hidden_act: ['silu'] is not supported"),
    ("llama", set_to(attention_bias=1), "attention_bias: 1 is not true or false"),
    ("llama", lambda data: data.pop("hidden_size"), "hidden_size is missing"),
    ("llama", set_to(hidden_size=0), "hidden_size: 0 is too small"),
    ("llama", set_to(hidden_size=-1), "hidden_size: -1 is too small"),
    ("llama", set_to(hidden_size=2**62), "hidden_size: 4611686018427387904 is too large"),
    ("llama", set_to(hidden_size="32"), "hidden_size: '32' is not a whole number"),
    ("llama", set_to(rms_norm_eps=float("nan")), "is not valid JSON (NaN is no JSON number)"),
    ("llama", set_to(head_dim=7), "head_dim: 7 is odd"),
    ("llama", set_to(num_key_value_heads=3), "num_key_value_heads: 3 do not divide 4"),
    ("llama", set_to(head_dim=None, num_attention_heads=5), "5 heads do not divide hidden_size 32"),
    ("gpt2", set_to(n_head=5), "n_head: 5 heads do not divide n_embd 32"),
    ("gpt2", set_to(activation_function="mish"), "activation_function: 'mish' is not supported"),
    ("gpt2", set_to(scale_attn_weights=1), "scale_attn_weights: 1 is not true or false"),
    ("gpt2", set_to(scale_attn_by_inverse_layer_idx="yes"), "'yes' is not true or false"),
    ("gpt2", set_to(add_cross_attention=True), "add_cross_attention: True is not supported"),
    ("gpt2", set_to(pruned_heads={"0": [1]}), "pruned_heads: {'0': [1]} is not supported"),
    ("mistral, window", set_to(sliding_window=0), "sliding_window: 0 is too small"),
    ("qwen2", set_to(layer_types=None, max_window_layers="1"), "max_window_layers: '1'"),
    ("qwen2", set_to(layer_types=["full_attention"]), "layer_types: expected 3 of"),
    ("qwen2", set_to(layer_types=[["x"]] * 3), "layer_types: expected 3 of"),
    ("qwen2", set_to(layer_types=["sliding_attention"] * 3), "sliding_window is not used"),
    (
        "qwen2",
        set_to(
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        "layer_types: layer 1 has no window after one that has",
    ),
    ("llama, yarn", turn_to(rope_type="longrope"), "rope_type: 'longrope' is not supported"),
    ("llama, yarn", turn_to(rope_type="linear"), "unknown field 'original_max_position_embedd"),
    ("llama, yarn", turn_to(type="linear"), "rope_type: 'yarn' contradicts type 'linear'"),
    ("llama, yarn", turn_to(factor="4"), "factor: '4' is not a number"),
    ("llama, yarn", turn_to(factor=-2.0), "factor: -2.0 is out of range"),
    ("llama, yarn", turn_to(beta_fast=0.5), "rope_scaling.beta_fast: 0.5 is too small"),
    ("llama, yarn", turn_to(rope_theta=1.0), "rope_theta: 1.0 is too small for yarn"),
    ("llama, yarn", turn_to(partial_rotary_factor=0.5), "partial_rotary_factor: 0.5"),
    ("llama, yarn", set_to(rope_theta=7.0), "rope_theta: 7 contradicts 500.0"),
    ("llama, yarn", set_to(rope_scaling={"type": "linear"}), "rope_scaling: contradicts rope_para"),
    ("llama", set_to(max_sequence_length=9), "max_sequence_length: 9 contradicts max_position_emb"),
    ("llama", set_to(max_sequence_length="9"), "max_sequence_length: '9' is not a whole number"),
    ("llama", set_to(rope_parameters="fast"), "rope_parameters: 'fast' is not an object"),
    ("llama", set_to(rope_parameters={"rope_type": "llama3"}), "is missing"),
]

REFUSED += [
    ("granite", set_to(residual_multiplier=0), "residual_multiplier: 0 is out of range"),
    ("granite", set_to(logits_scaling="8"), "logits_scaling: '8' is not a number"),
    ("granite", set_to(num_local_experts=4), "unknown field 'num_local_experts'"),
    ("smollm3", set_to(no_rope_layers=[1, 2, 0]), "no_rope_layers: expected 5 of 0 and 1"),
    ("smollm3", set_to(layer_types=["sliding_attention"] * 5), "sliding_window is not used"),
    ("phi3", turn_to(rope_type="llama3"), "rope_type: 'llama3' is not supported (expected default"),
    ("phi3", turn_to(rope_type="longrope"), "short_factor: expected a list of 4 numbers"),
    ("phi3", turn_to(partial_rotary_factor=0.4), "partial_rotary_factor: turns 3 channels"),
    ("phi3", turn_to(partial_rotary_factor=2.0), "partial_rotary_factor: 2 (expected one, of 1"),
    (
        "phi3",
        turn_to(original_max_position_embeddings=7),
        "original_max_position_embeddings: 4096 contradicts 7",
    ),
    (
        "gemma3",
        set_to(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10.0}),
        "rope_parameters: has neither full_attention nor sliding_attention",
    ),
    ("phi3", set_to(lm_head_bias=True), "lm_head_bias: True is not supported (expected False)"),
    ("phi3", set_to(partial_rotary_factor=0.5), "partial_rotary_factor: 0.5 (expected one"),
    ("olmo2", set_to(mlp_bias=True), "unknown field 'mlp_bias'"),
    ("gemma2", set_to(layer_types=["full_attention"]), "layer_types: expected 4 of"),
    ("gemma2", set_to(sliding_window=None), "names sliding_attention, but sliding_window is null"),
    ("gemma2", set_to(hidden_activation="silu"), "hidden_activation: 'silu' is not supported"),
    ("gemma2", set_to(use_bidirectional_attention=True), "use_bidirectional_attention: True is"),
    ("gemma2", set_to(attn_logit_softcapping=0), "attn_logit_softcapping: 0 is out of range"),
    ("gemma3", set_to(attn_logit_softcapping=50.0), "attn_logit_softcapping: is not supported"),
    (
        "deepseek_v3",
        set_to(first_k_dense_replace=1),
        "first_k_dense_replace: layers from 1 on have experts (expected 3: kvtool has no experts)",
    ),
    ("deepseek_v3", set_to(first_k_dense_replace="3"), "first_k_dense_replace: '3' is not a whole"),
    ("deepseek_v3", set_to(qk_rope_head_dim=5), "qk_rope_head_dim: 5 is odd"),
    ("deepseek_v3", set_to(num_key_value_heads=2), "num_key_value_heads: 2 is not supported"),
    ("deepseek_v3", set_to(index_topk=8), "unknown field 'index_topk'"),
    ("deepseek_v3", set_to(rope_interleave=None), "rope_interleave: is null (expected true or"),
    ("gemma3", set_to(tie_word_embeddings=None), "tie_word_embeddings: is null (expected true or"),
    ("llama", set_to(rms_norm_eps=None), "rms_norm_eps: is null (expected a number)"),
    ("llama", set_to(hidden_act=None), "hidden_act: is null (expected one of silu"),
    ("gemma3", turn_to(full_attention=3), "rope_parameters: full_attention: 3 is not an object"),
    ("gemma3", turn_to(chunked_attention={}), "unknown field 'chunked_attention'"),
]


@pytest.mark.parametrize(("case", "change", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_a_field_that_could_change_the_model_is_named(
    case: str, change: Change, message: str, copy: Callable[[str], Path]
) -> None:
    folder = edit(copy(case), change)
    said = refusal(folder)
    assert said.startswith(f"{folder / 'config.json'}: ") and message in said


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", {"head_dim": 64, "d_ff": 3072, "tied": True, "activation": "gelu_tanh"}),
        ("SmolLM2", {"head_dim": 64, "n_kv_heads": 3, "rope_theta": 1e5, "rope_scaling": None}),
        ("Llama 3.2", {"context": 131072, "rope_scaling": RopeScaling("llama3", 32.0, 8192)}),
        (
            "Gemma 3",
            {
                "head_dim": 256,
                "window": 512,
                "full_layers": (5, 11, 17, 23),
                "tied": True,
                "rope_theta": 1e6,
                "window_theta": 1e4,
                "attention_scale": 1 / 16,
                "embed_scale": 1152**0.5,
                "activation": "geglu",
                "norm_place": "both",
            },
        ),
        (
            "SmolLM3",
            {"unrotated_layers": tuple(range(3, 36, 4)), "rope_theta": 5e6, "window": 0},
        ),
        ("Qwen2.5", {"window": 0, "qkv_bias": True, "out_bias": None, "rope_theta": 1e6}),
    ],
)
def test_configurations_are_read_as_published(name: str, expected: dict[str, Any]) -> None:
    data = PUBLISHED[name]
    config = FAMILIES[data["model_type"]].config(data, "config.json")
    assert {field: getattr(config, field) for field in expected} == expected


def test_fields_that_change_nothing_are_passed_over(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    before = load(folder).config
    harmless = dict.fromkeys(HARMLESS - {"model_type", "eos_token_id"}, "anything")
    edit(folder, set_to(**harmless, **NEUTRAL, unknown_but_null=None))
    assert load(folder).config == before


@pytest.mark.parametrize("new", [CONTEXT, None])
def test_the_context_of_early_conversions_is_read(
    new: int | None, copy: Callable[[str], Path]
) -> None:
    folder = copy("llama")
    before = load(folder).config
    edit(folder, set_to(max_position_embeddings=new, max_sequence_length=CONTEXT))
    assert load(folder).config == before


def test_an_unknown_model_type_is_answered_with_the_known_ones(
    copy: Callable[[str], Path], kv: Callable[..., Ran]
) -> None:
    folder = edit(copy("llama"), set_to(model_type="mamba"))
    ran = kv("--model", str(folder), command="bench")
    assert ran.code == 2 and ran.err.count("\n") == 1
    own = "kvtool-decoder, kvtool-seq2seq, kvtool-general, kvtool-latent"
    names = ", ".join([own, *FAMILIES])
    assert f"model_type 'mamba' is not supported (expected one of {names})" in ran.err
    for odd in (None, 3, ["gpt2"], {}):
        assert "is not supported" in refusal(edit(folder, set_to(model_type=odd)))


def test_an_end_token_that_is_no_token_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("llama")
    (folder / "tokenizer.json").write_text((_shipped() / "tokenizer.json").read_text())
    edit(folder, set_to(vocab_size=61, eos_token_id=[2, "x"]), "generation_config.json")
    said = refusal(folder)
    assert "tokens (expected 61 or fewer, the vocab_size of config.json)" in said


def _shipped() -> Path:
    return Path(__file__).parents[2] / "weights" / "shakespeare-2l"


# --- the model that transformers makes of them, to be compared with


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("llama", {"num_labels": 10**8}, "num_labels is 100000000 (expected 100,000 or fewer)"),
        ("llama", {"id2label": 7}, "transformers cannot read it ("),
        ("llama", {"bos_token_id": "x"}, "transformers cannot read it ("),
        ("llama", {"return_dict": False}, "transformers cannot read it ("),
    ],
)
def test_what_transformers_makes_of_a_field_is_one_line(
    case: str,
    fields: dict[str, Any],
    message: str,
    copy: Callable[[str], Path],
    kv: Callable[..., Ran],
) -> None:
    folder = edit(copy(case), set_to(**fields))
    words = f"--model {folder} --against transformers --threads 1 --json"
    ran = kv(*words.split(), command="verify-logits")
    assert ran.code == 2
    assert ran.err.startswith(f"kvtool: error: {folder / 'config.json'}: {message}")
    assert ran.err.count("\n") == 1


def test_what_transformers_warns_of_is_not_shown(copy: Callable[[str], Path]) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        witness.folder_witness(edit(copy("llama"), set_to(bos_token_id=999)))
    finally:
        logger.removeHandler(handler)
    assert not said


def test_what_transformers_builds_of_a_folder_is_bounded(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness, "make_config", lambda settings: bytearray(2**40))
    with pytest.raises(FileError, match=r"config\.json: what it describes takes more than 2 GiB"):
        witness.folder_witness(copy("llama"))


# --- tensors

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> Path:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    return folder


C_FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama", lambda t: t.pop(K_PROJ), f"lacks 1 of 30 tensors ({K_PROJ})"),
        ("llama", lambda t: t.pop("lm_head.weight"), "lacks 1 of 30 tensors (lm_head.weight)"),
        ("llama", lambda t: t.update({"x.bias": torch.zeros(3)}), "does not have (x.bias)"),
        (
            "llama",
            lambda t: t.update({K_PROJ: torch.zeros(32, 16)}),
            f"{K_PROJ} has shape [32, 16] (expected [16, 32]). It looks transposed",
        ),
        (
            "gpt2",
            lambda t: t.update({C_FC: t[C_FC].T.contiguous()}),
            f"{C_FC} has shape [128, 32] (expected [32, 128]). It looks transposed",
        ),
        (
            "llama, tied head",
            lambda t: t.update({"lm_head.weight": torch.zeros(61, 32, dtype=torch.float64)}),
            "head.weight differs from embed.tokens.weight",
        ),
        ("qwen2", lambda t: t.pop("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias)"),
        ("qwen3", lambda t: t.pop("model.layers.2.self_attn.k_norm.weight"), "k_norm.weight)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_as_the_file_names_them(
    case: str, change: Callable[[Tensors], object], message: str, copy: Callable[[str], Path]
) -> None:
    assert message in refusal(rewrite(copy(case), change))


@pytest.mark.parametrize(
    ("case", "buffers"),
    [
        (
            "gpt2",
            {
                "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
                "transformer.h.1.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
                "transformer.h.1.attn.masked_bias": torch.tensor(-1e4),
            },
        ),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ],
)
def test_masks_and_rates_beside_the_weights_are_passed_over(
    case: str, buffers: Tensors, copy: Callable[[str], Path]
) -> None:
    folder = copy(case)
    before = found(folder, tokens(5))
    assert found(rewrite(folder, lambda t: t.update(buffers)), tokens(5)).equal(before)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert found(folder, tokens(5)).equal(before)


def test_weights_of_half_the_size_are_the_same_numbers(copy: Callable[[str], Path]) -> None:
    """bfloat16 in the file and float64 at work, as usual for checkpoints of this kind."""
    folder = copy("qwen2")
    rounded = {k: t.bfloat16() for k, t in _tensors(folder).items()}
    safetensors.torch.save_file(rounded, folder / "model.safetensors")
    state = load(folder).model.state_dict()
    rows = torch.cat([rounded[f"model.layers.0.self_attn.{x}_proj.bias"] for x in "qkv"])
    assert state["layers.0.attn.qkv.bias"].equal(rows.double())


def _tensors(folder: Path) -> Tensors:
    return safetensors.torch.load_file(folder / "model.safetensors")
