"""Encoder-decoders of transformers and their caches as subjects of verify-cache."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from cli_probe import Ran
from kvtool.core.verify.check import Checked
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.hf import check as hf_check
from kvtool.core.verify.hf.check import check_transformers, load_model, subject_of
from kvtool.core.verify.hf.library import CAUSAL, SEQ2SEQ, kind_of, known_types
from kvtool.core.verify.hf.seq2seq import EncoderDecoderSubject
from kvtool.core.verify.hf.tiny import tiny_config, tiny_model
from kvtool.core.verify.judge import BUG, NOT_CAUSAL, PRECISION, ROUNDING, UNSUPPORTED, VACUOUS
from kvtool.core.verify.outcome import Outcome
from kvtool.core.verify.subject import Source, Start
from kvtool.errors import CacheOpUnsupported

FEW = ("decode", "chunks", "padded", "permuted", "two-sources")


def built(model_type: str) -> Any:
    return tiny_model(model_type, kind=SEQ2SEQ).model


def check(
    model: Any,
    kinds: Sequence[str] = ("dynamic",),
    scenarios: Sequence[str] = FEW,
    diagnose: bool = False,
    control: bool = False,
) -> dict[tuple[str, str], Checked]:
    """What is found for a model, by kind of cache and scenario; of the planted bug if `control`."""
    with pytest.MonkeyPatch.context() as patch:
        if not control:
            patch.setattr(hf_check, "target_control", lambda *_: Finding("decode", BUG))
        found = check_transformers(model, kinds, scenarios, 8, diagnose=diagnose)
        return {(c.cache, c.finding.scenario): c for c in found}


def source(batch: int, width: int, *lengths: int) -> Source:
    """Random ids (B,S), of which each row has so many real ones; all, if none is said."""
    ids = torch.randint(100, (batch, width), generator=torch.Generator().manual_seed(7))
    real = torch.tensor(lengths or [width] * batch)
    return Source(ids, torch.arange(width) < real[:, None])


# The tiny models


def test_the_types_are_those_that_read_and_write_text() -> None:
    names = known_types(SEQ2SEQ)
    assert {"t5", "bart", "marian", "led", "fsmt", "nllb-moe", "t5gemma"} <= set(names)
    assert not {"qwen2_audio", "voxtral", "granite_speech", "llama"} & set(names)


def test_a_type_that_is_both_is_the_encoder_decoder_unless_said_otherwise() -> None:
    assert (kind_of("bart"), kind_of("t5"), kind_of("llama")) == (SEQ2SEQ, SEQ2SEQ, CAUSAL)
    assert type(load_model("bart")[0]).__name__ == "BartForConditionalGeneration"
    assert type(tiny_model("bart").model).__name__ == "BartForCausalLM"


def test_an_encoder_decoder_is_shrunk_on_both_sides_and_keeps_a_mixture_of_experts() -> None:
    for name in ("bart", "t5", "t5gemma"):
        assert sum(p.numel() for p in built(name).parameters()) < 5e5
    config, _ = tiny_config("nllb-moe", kind=SEQ2SEQ)
    assert (config.encoder_layers, config.decoder_layers, config.decoder_sparse_step) == (2, 2, 2)
    assert "is_decoder" not in tiny_model("bart", kind=SEQ2SEQ).note


# Right caches


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_right_caches_are_called_right(model_type: str) -> None:
    kinds = "dynamic", "static"
    found = check(built(model_type), kinds, (*FEW, "reset", "overflow"), control=True)
    for (kind, scenario), one in found.items():
        if kind == "planted bug":
            assert one.finding.verdict == BUG
        elif (kind, scenario) != ("dynamic", "overflow"):
            assert one.finding.verdict == ROUNDING, (kind, scenario)


def test_a_source_is_read_beyond_the_window_of_sliding_layers() -> None:
    found = check(built("t5gemma"), scenarios=("window", "two-sources"))
    for scenario in ("window", "two-sources"):
        assert found["dynamic", scenario].finding.verdict in (ROUNDING, PRECISION)


def test_kinds_that_generate_refuses_for_an_encoder_decoder_say_so() -> None:
    found = check(built("marian"), ("quantized", "own"), ("decode",))
    assert "does not support the quantized cache" in found["quantized", "all"].finding.evidence
    assert "takes EncoderDecoderCache" in found["own", "all"].finding.evidence
    found = check(built("fsmt"), ("static",), ("decode",))
    assert "transformers declares none" in found["static", "all"].finding.evidence


# The source


def test_the_uncached_arm_has_no_padding_where_padding_should_change_nothing() -> None:
    subject = subject_of(built("bart"), "dynamic")
    assert isinstance(subject, EncoderDecoderSubject) and subject.padding_gap < 1e-14
    given, ids = source(2, 9, 5, 9), torch.arange(12).reshape(2, 6)
    widths = []
    subject.decoder.module.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with torch.inference_mode():
        subject.full(ids, Start(2, 20, None, given))
    assert widths == [(1, 5), (1, 9)]


def test_a_model_that_padding_changes_is_compared_with_padding_and_remarked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.bart.modeling_bart import BartEncoder

    right = BartEncoder.forward

    def blind(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return right(self, *args, **kwargs)

    monkeypatch.setattr(BartEncoder, "forward", blind)
    remarks: list[str] = []
    found = list(
        check_transformers(built("bart"), ["dynamic"], ["permuted"], 8, remark=remarks.append)
    )
    assert found[0].finding.verdict == ROUNDING
    assert len(remarks) == 1 and "padding of the source changes uncached logits" in remarks[0]


def test_the_source_is_encoded_once_for_all_steps() -> None:
    subject = subject_of(built("t5"), "dynamic")
    calls: list[int] = []
    encoder = subject.decoder.module.get_encoder()
    encoder.register_forward_hook(lambda *args: calls.append(1))
    with torch.inference_mode():
        state = subject.initial_state(Start(1, 30, None, source(1, 6)))
        for _ in range(4):
            _, state = subject.step(torch.tensor([[3]]), state)
    assert len(calls) == 1 and set(state.cache.is_updated.values()) == {True}


def test_keys_of_the_source_that_are_computed_in_each_step_prove_nothing() -> None:
    model = built("bart")
    right = model.forward

    @functools.wraps(right)
    def again(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            past_key_values.cross_attention_cache.reset()
            past_key_values.is_updated.clear()
        return right(*args, past_key_values=past_key_values, **kwargs)

    model.forward = again
    found = check(model, scenarios=("decode",))
    assert found["dynamic", "decode"].finding.verdict == VACUOUS
    assert (
        "computes the source's keys and values again" in found["dynamic", "decode"].finding.evidence
    )


def test_a_static_cache_has_no_room_for_a_longer_source() -> None:
    subject = subject_of(built("bart"), "static")
    with torch.inference_mode():
        session = subject.start(Start(1, 30, None, source(1, 5)))
        session.feed(torch.tensor([[3, 4]]))
        with pytest.raises(CacheOpUnsupported, match="room for a source of 5, and it has 6"):
            session.reset(Start(1, 30, None, source(1, 6)))


# Planted bugs


def test_a_reorder_that_leaves_the_source_is_found_and_located(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import EncoderDecoderCache

    def half(self: Any, rows: torch.Tensor) -> None:
        self.self_attention_cache.reorder_cache(rows)

    monkeypatch.setattr(EncoderDecoderCache, "reorder_cache", half)
    found = check(built("t5"), scenarios=("decode", "permuted"), diagnose=True)
    assert found["dynamic", "decode"].outcome == Outcome.RIGHT
    wrong = found["dynamic", "permuted"].finding
    assert wrong.verdict == BUG
    assert "EncDecAttention" in wrong.diagnosis.place


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_reset_that_keeps_the_source_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import EncoderDecoderCache

    monkeypatch.setattr(
        EncoderDecoderCache, "reset", lambda self: self.self_attention_cache.reset()
    )
    found = check(built("t5"), (kind,), ("reset", "two-sources"))
    assert found[kind, "reset"].outcome == Outcome.RIGHT  # the same source again
    assert found[kind, "two-sources"].outcome == Outcome.WRONG


def test_a_mask_of_the_source_that_is_dropped_behind_the_prompt_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.bart.modeling_bart import BartDecoder

    right = BartDecoder.forward

    def blind(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            kwargs["encoder_attention_mask"] = None
        return right(self, *args, **kwargs)

    monkeypatch.setattr(BartDecoder, "forward", blind)
    found = check(built("bart"), scenarios=("decode", "permuted"))
    assert found["dynamic", "decode"].outcome == Outcome.RIGHT  # nothing is padded
    assert found["dynamic", "permuted"].finding.verdict == BUG


def test_an_encoder_decoder_without_a_mask_in_its_cached_prompt_is_reported() -> None:
    found = check(built("fsmt"), scenarios=("token-by-token", "decode"), diagnose=True)
    assert found["dynamic", "token-by-token"].outcome == Outcome.RIGHT
    wrong = found["dynamic", "decode"].finding
    assert wrong.verdict == BUG
    assert "decoder.layers.0.self_attn" in wrong.diagnosis.place  # found without lower types


def test_a_step_that_does_not_see_the_padding_of_its_prompt_is_reported() -> None:
    found = check(built("led"), scenarios=("decode", "padded"))
    assert found["dynamic", "decode"].outcome == Outcome.RIGHT
    assert found["dynamic", "padded"].finding.verdict == BUG


def test_a_model_that_overflows_in_float64_is_judged_without_lower_types() -> None:
    found = check(built("prophetnet"), scenarios=("token-by-token",))
    assert found["dynamic", "token-by-token"].finding.verdict == NOT_CAUSAL


# The command


def test_a_folder_is_read_as_the_kind_of_model_that_was_saved(tmp_path: Path) -> None:
    decoder = tiny_model("bart").model
    decoder.save_pretrained(tmp_path / "decoder")
    assert type(load_model(str(tmp_path / "decoder"))[0]) is type(decoder)
    speech = tiny_model("whisper").model  # it hears its source: its decoder alone is judged
    speech.config.is_encoder_decoder = True
    speech.save_pretrained(tmp_path / "speech")
    assert type(load_model(str(tmp_path / "speech"))[0]) is type(speech)


def test_a_saved_folder_of_an_encoder_decoder_is_checked(
    tmp_path: Path, kv: Callable[..., Ran]
) -> None:
    built("t5").save_pretrained(tmp_path)
    given = ["--impl", "transformers", "--model", str(tmp_path), "--tokens", "8"]
    asked = ["--scenarios", "decode", "two-sources", "--device", "cpu", "--json"]
    ran = kv(*given, *asked, command="verify-cache")
    assert ran.code == 0
    report = json.loads(ran.out)
    assert report["resolved"]["architecture"] == "T5ForConditionalGeneration"
    done = {row["cache"]: row["verdict"] for row in report["checks"]}
    assert done == {
        **dict.fromkeys(("dynamic", "static"), ROUNDING),
        **dict.fromkeys(("quantized", "own"), UNSUPPORTED),
    }
