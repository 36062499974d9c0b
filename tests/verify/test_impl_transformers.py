"""Models and caches of transformers as subjects of verify-cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from cli_probe import Ran, refused
from kvtool.commands.verify.report import CacheReport, Row
from kvtool.core.verify.check import Checked
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.hf import check as hf_check
from kvtool.core.verify.hf import library
from kvtool.core.verify.hf.check import check_transformers, load_model
from kvtool.core.verify.hf.library import is_type
from kvtool.core.verify.hf.shrink import AMPLE, SPECIAL, WINDOW, shrunk
from kvtool.core.verify.hf.subject import TransformersSubject, converted, ordinary_ids
from kvtool.core.verify.hf.tiny import tiny_config, tiny_model
from kvtool.core.verify.judge import BUG, NOT_CAUSAL, UNSUPPORTED
from kvtool.core.verify.outcome import Outcome
from kvtool.errors import FileError, UsageError
from kvtool.registry import TRANSFORMERS_CACHES

FEW = ("decode", "chunks", "padded", "permuted", "reset")


def check(
    model: Any,
    kinds: Sequence[str] = ("dynamic",),
    scenarios: Sequence[str] = FEW,
    control: bool = False,
) -> dict[tuple[str, str], Checked]:
    """What is found for a model, by kind of cache and scenario; of the planted bug if `control`."""
    with pytest.MonkeyPatch.context() as patch:
        if not control:
            patch.setattr(hf_check, "target_control", lambda *_: Finding("decode", BUG))
        found = check_transformers(model, kinds, scenarios, 8, diagnose=False)
        return {(c.cache, c.finding.scenario): c for c in found}


def verdicts(found: dict[tuple[str, str], Checked], cache: str = "dynamic") -> dict[str, str]:
    return {s: c.finding.verdict for (kind, s), c in found.items() if kind == cache}


# The tiny models


def test_a_tiny_model_keeps_one_layer_of_each_kind_and_the_ratio_of_its_heads() -> None:
    config, _ = tiny_config("gemma3_text")
    assert sorted(config.layer_types) == ["full_attention", "sliding_attention"]
    assert config.num_hidden_layers == 2 and config.sliding_window == WINDOW
    grouped, _ = tiny_config("mistral")
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (4, 2)


def test_weights_are_drawn_large_enough_for_a_bug_to_show() -> None:
    layer = tiny_model("llama").model.model.layers[0]
    for weight in (layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight):
        assert float(weight.std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)
    assert bool((layer.input_layernorm.weight == 1).all())  # a norm stays what it is


def test_the_same_seed_gives_the_same_model_and_leaves_other_random_numbers_alone() -> None:
    torch.manual_seed(5)
    one = tiny_model("gpt2", seed=3).model.state_dict()
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    other = tiny_model("gpt2", seed=3).model.state_dict()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    third = tiny_model("gpt2", seed=4).model.state_dict()
    assert not torch.equal(one["lm_head.weight"], third["lm_head.weight"])


def test_ids_with_a_meaning_of_their_own_are_not_fed() -> None:
    model = tiny_model("gemma3").model
    words = ordinary_ids(model.config).tolist()
    assert model.config.image_token_id not in words and model.config.boi_token_index not in words
    assert model.config.text_config.pad_token_id not in words and len(words) > 100


@pytest.mark.parametrize("name", ["lama", "LLAMA"])
def test_an_unknown_type_is_refused_with_the_nearest_name(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}: .*Did you mean llama\?"):
        load_model(name)


@pytest.mark.parametrize(
    ("field", "value", "small"),
    [
        ("vocab_size", 50_000, 192),
        ("eos_token_id", 2, 2),
        ("num_key_value_heads", 1, 1),
        ("num_key_value_heads", 32, 4),
        ("num_key_value_heads", 8, 2),
        ("sliding_window", 4096, WINDOW),
        ("sliding_window", 4, 4),
        ("expert_capacity", 64, AMPLE),
        ("head_dim", None, 16),
        ("use_sliding_window", True, True),
        ("rms_norm_eps", 1e-6, 1e-6),
        ("hidden_act", "silu", "silu"),
        ("text_config", {"model_type": "llama", "hidden_size": 4096}, {"hidden_size": 64}),
    ],
)
def test_a_field_is_shrunk_by_its_name_and_stays_where_no_rule_names_it(
    field: str, value: object, small: object
) -> None:
    assert shrunk({"num_attention_heads": 32, field: value})[field] == small


def test_layers_are_dropped_but_for_the_first_of_each_kind() -> None:
    kinds = ["window", "window", "all", "window", "window", "all"]
    small = shrunk({"num_hidden_layers": 6, "layer_types": kinds, "moe_layers": [2, 5]})
    assert small["num_hidden_layers"] == 2
    assert small["layer_types"] == ["window", "all"] and small["moe_layers"] == [1]


def test_a_type_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPECIAL, "gpt2", {"n_embd": 63})
    with pytest.raises(UsageError, match=r"gpt2: could not build \(ValueError"):
        tiny_model("gpt2")


# Right caches


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral"])
def test_right_caches_are_called_right(model_type: str) -> None:
    kinds = "dynamic", "static", "quantized"
    found = check(tiny_model(model_type).model, kinds, control=True)
    judged = {c.outcome for (cache, _), c in found.items() if cache != "planted bug"}
    assert judged == {Outcome.RIGHT}
    assert found["planted bug", "decode"].finding.verdict == BUG


def test_codes_are_not_judged_and_every_answer_says_so(
    verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import cache_utils

    asked = ("--model", "gpt2", "--caches", "dynamic", "quantized", "--scenarios", "decode", "crop")
    monkeypatch.setenv("COLUMNS", "120")
    shown = verify(*asked)
    lines = [line.split("  ") for line in shown.out.splitlines() if line.startswith("quantized ")]
    assert len(lines) == 1 and "rounding, codes not judged" in lines[0]
    assert "; quantized: its codes were not judged; the planted bug" in shown.out.splitlines()[-1]
    # Whatever the quantizer does, the verdict is the same: so it must claim nothing of it.
    for layer in vars(cache_utils).values():
        if isinstance(layer, type) and hasattr(layer, "_quantize"):
            monkeypatch.setattr(layer, "_quantize", lambda self, tensor, *_: 0 * tensor)
    report = json.loads(verify(*asked, "--json").out)
    told = {(row["cache"], row["scenario"], row["not_judged"]) for row in report["checks"]}
    assert told == {
        (c, s, w) for c, w in (("dynamic", ""), ("quantized", "codes")) for s in asked[-2:]
    }
    assert "quantized: its codes were not judged" in report["conclusion"]


def test_a_bug_beside_the_codes_does_not_hide_that_they_were_not_judged() -> None:
    found = check(tiny_model("gpt2").model, ("quantized",), ("decode",))["quantized", "decode"]
    bug = replace(found, finding=replace(found.finding, verdict=BUG, first_wrong=1))
    report = CacheReport([Row.of(bug)], None, 3, "float32")
    said = "quantized: bug, step 1 in decode; quantized: its codes were not judged"
    assert report.conclusion == said


def test_sliding_layers_are_checked_beyond_their_window() -> None:
    model = tiny_model("mistral").model
    found = check(model, ("dynamic", "static"), ("window", "padded"))
    for kind in ("dynamic", "static"):
        assert TransformersSubject(model, kind).window == WINDOW
        assert found[kind, "window"].outcome == Outcome.RIGHT
        assert found[kind, "padded"].outcome == Outcome.RIGHT


def test_a_full_static_cache_must_refuse_another_token() -> None:
    found = check(tiny_model("gpt2").model, ("dynamic", "static"), ("overflow",))
    assert found["static", "overflow"].outcome == Outcome.RIGHT
    assert found["dynamic", "overflow"].finding.verdict == UNSUPPORTED
    for endless in ("mistral", "mamba2"):  # rings and states have room for any number
        found = check(tiny_model(endless).model, ("static",), ("overflow",))
        assert found["static", "overflow"].finding.verdict == UNSUPPORTED


def test_a_state_space_model_is_judged_with_its_state() -> None:
    found = check(tiny_model("mamba").model, ("dynamic",), ("decode", "permuted", "reset", "crop"))
    assert {found["dynamic", s].outcome for s in ("decode", "permuted", "reset")} == {Outcome.RIGHT}
    assert found["dynamic", "crop"].finding.verdict == UNSUPPORTED
    assert "activate_past_recording" in found["dynamic", "crop"].finding.evidence


def test_an_encoder_is_not_causal_unless_it_is_built_as_a_decoder() -> None:
    encoder = tiny_model("bert", decoder=False)
    assert set(verdicts(check(encoder.model, scenarios=("decode",))).values()) == {NOT_CAUSAL}
    decoder = tiny_model("bert")
    assert decoder.note == "built with is_decoder=True"
    assert check(decoder.model)["dynamic", "decode"].outcome == Outcome.RIGHT


def test_tables_that_were_rounded_to_float32_are_no_bug() -> None:
    found = check(tiny_model("minimax").model, ("own",), ("decode", "chunks"))
    assert found["own", "decode"].outcome == found["own", "chunks"].outcome == Outcome.RIGHT


# Kinds that cannot be used


def test_a_kind_that_cannot_be_used_says_why() -> None:
    found = check(tiny_model("mistral").model, tuple(TRANSFORMERS_CACHES), ("decode",))
    assert "only full attention layers" in found["quantized", "all"].finding.evidence
    assert "takes DynamicCache" in found["own", "all"].finding.evidence
    encoder = check(tiny_model("bert").model, ("static",), ("decode",))
    assert "transformers declares none" in encoder["static", "all"].finding.evidence


# Planted bugs


@pytest.mark.parametrize(
    ("layer", "method", "kind", "scenario"),
    [
        ("DynamicLayer", "reorder_cache", "dynamic", "permuted"),
        ("DynamicLayer", "crop", "dynamic", "crop"),
        ("StaticLayer", "reorder_cache", "static", "permuted"),
        ("CacheLayerMixin", "reset", "static", "reset"),
    ],
)
def test_an_operation_that_does_nothing_is_reported(
    layer: str, method: str, kind: str, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import cache_utils

    model = tiny_model("llama").model
    assert check(model, (kind,), (scenario,))[kind, scenario].outcome == Outcome.RIGHT
    monkeypatch.setattr(getattr(cache_utils, layer), method, lambda *args: None)
    found = check(model, (kind,), ("decode", scenario))
    assert found[kind, scenario].outcome == Outcome.WRONG
    assert found[kind, "decode"].outcome == Outcome.RIGHT


def test_a_window_that_forgets_a_token_too_many_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    right = DynamicSlidingWindowLayer.update

    def forgetful(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        answer = right(self, keys, values, *args, **kwargs)
        if self.keys.shape[-2] == self.sliding_window - 1:
            self.keys[:, :, 0] = 0.0
        return answer

    monkeypatch.setattr(DynamicSlidingWindowLayer, "update", forgetful)
    found = check(tiny_model("mistral").model, scenarios=("window",))
    assert found["dynamic", "window"].finding.verdict == BUG


# The command


@pytest.fixture
def verify(kv: Callable[..., Ran]) -> Callable[..., Ran]:
    def call(*args: str) -> Ran:
        given = ["--impl", "transformers", "--tokens", "8", "--device", "cpu"]
        return kv(*given, *args, command="verify-cache")

    return call


def test_a_saved_folder_is_checked_with_the_kinds_asked_for(
    tmp_path: Path, verify: Callable[..., Ran]
) -> None:
    tiny_model("gpt2").model.save_pretrained(tmp_path)
    ran = verify("--model", str(tmp_path), "--caches", "static", "--scenarios", "decode", "--json")
    assert ran.code == 0
    report = json.loads(ran.out)
    assert {row["cache"] for row in report["checks"]} == {"static"}
    assert report["resolved"]["architecture"] == "GPT2LMHeadModel"


def test_the_verdict_is_printed_and_kinds_that_cannot_be_used_do_not_count(
    verify: Callable[..., Ran],
) -> None:
    ran = verify("--model", "mistral", "--scenarios", "decode")
    assert ran.code == 0
    assert "rounding only" in ran.out and "the planted bug was found" in ran.out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "needs --model"),
        (("--model", "llama", "--caches", "paged"), "'paged' is not known"),
        (("--model", "llama", "--types", "llama"), "--types: needs --sweep"),
        (("--model", "llama", "--kernels", "exact"), "--kernels: contradicts"),
        (("--model", "mistral", "--caches", "quantized"), "only full attention"),
        (("--model", "openai-gpt"), "forward takes no cache"),
    ],
)
def test_what_means_nothing_is_refused(
    args: tuple[str, ...], words: str, verify: Callable[..., Ran]
) -> None:
    assert words in refused(verify(*args, "-q"))


@pytest.mark.parametrize("name", ["phi3", "gemma3_text", "openai-gpt", "bart"])
def test_a_type_that_was_meant_for_transformers_is_told_the_way(
    kv: Callable[..., Ran], name: str
) -> None:
    message = refused(kv("--model", name, command="verify-cache"))
    assert message.startswith(f"--model {name}: not found.")
    assert message.endswith(f"{name} is a model type of transformers: add --impl transformers.")


@pytest.mark.parametrize("name", ["vit", "phi3-mini", "weights/phi3", "", "auto"])
def test_only_a_type_is_called_one(name: str) -> None:
    assert not is_type(name)


def test_transformers_is_not_imported_for_a_name_that_is_none_of_its(
    monkeypatch: pytest.MonkeyPatch, kv: Callable[..., Ran]
) -> None:
    monkeypatch.setattr(library, "is_type", lambda name: pytest.fail("it was imported"))
    message = refused(kv("--model", "shakespeare-3l", command="verify-cache"))
    assert "is a model type of transformers" not in message


def test_a_model_of_ours_is_told_the_way_back(verify: Callable[..., Ran]) -> None:
    message = refused(verify("--model", "shakespeare-2l"))
    assert message.endswith("It comes with kvtool: leave out --impl transformers.")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=str(tmp_path)):
        load_model(str(tmp_path))


def test_without_transformers_it_says_what_to_install(
    verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refused(verify("--model", "llama"))
    assert "transformers is not installed" in message and "kvtool[hf]" in message


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_a_model_whose_copy_would_crowd_memory_is_widened_to_the_same_bits(model_type, monkeypatch):
    model = tiny_model(model_type).model.eval()
    ids = torch.tensor([[3, 7, 1, 4]])
    with torch.inference_mode():
        right = converted(model, torch.float64)(ids).logits
        monkeypatch.setattr("kvtool.core.verify.hf.subject.copy_crowds", lambda model: True)
        wide = converted(model, torch.float64)
        assert torch.equal(wide(ids).logits, right)
    own = {id(weight) for weight in model.parameters()}
    assert {id(weight) for weight in wide.parameters()} == own
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_widened_model_is_judged_as_a_copy_is(monkeypatch):
    model = tiny_model("qwen3").model
    usual = verdicts(check(model))
    monkeypatch.setattr("kvtool.core.verify.hf.subject.copy_crowds", lambda model: True)
    assert verdicts(check(model)) == usual
