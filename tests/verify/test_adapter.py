"""An nn.Module as a decoder: how it is called is guessed from its signature and by trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvtool
from decoder_shapes import (
    SHAPES,
    VOCAB,
    Buffers,
    Core,
    Pairs,
    joined,
    judged,
)
from kvtool.core.verify.judge import BUG, ROUNDING, Case, Judge
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.target.doctor import examine
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.errors import UsageError


@pytest.mark.parametrize("shape", SHAPES)
def test_a_right_decoder_of_any_usual_shape_is_called_rightly(shape: str) -> None:
    subject = TargetSubject(SHAPES[shape](), shape)
    judge = Judge(subject, examine)
    assert subject.vocab_size == VOCAB
    assert {"batch"} <= subject.abilities
    for scenario in ("decode", "chunks"):
        finding = judge.judge(Case(SCENARIOS[scenario]))
        assert (finding.verdict, finding.evidence) == (ROUNDING, "")
        assert finding.float64 is not None and finding.float64.relative < 1e-14


GUESSES = {
    "Pairs": "forward(ids, cache=None at first) -> (logits, cache)",
    "Flagged": "forward(ids, past_key_values=None at first, use_cache=True) -> (logits, cache)",
    "WithLoss": "forward(ids, past=None at first, targets=None) -> (logits, ..., cache)",
    "GivenStart": "forward(ids, cache=None at first, pos=past) -> (logits, cache)",
    "PerLayer": "forward(ids, caches=[None] * 2 at first) -> (logits, cache)",
    "FilledList": "forward(ids, cache=[] at first) -> logits, the cache changed in place",
    "NeedsCache": "forward(ids, cache=init_cache at first) -> (logits, cache); it cannot go "
    "without a cache: the uncached pass is one step on a new one",
    "OwnCaches": "setup_caches, then forward(ids, input_pos=arange(past, past + n)) -> logits, "
    "the cache changed in place",
}


@pytest.mark.parametrize("shape", GUESSES)
def test_the_guess_is_told_in_full(shape: str) -> None:
    assert TargetSubject(SHAPES[shape](), "it").guess == f"called as {GUESSES[shape]}"


def test_a_cache_of_ones_own_is_cropped_selected_and_reset_by_its_methods() -> None:
    subject = TargetSubject(SHAPES["MadeCache"](), "it")
    assert {"crop", "select", "reset", "fork"} <= subject.abilities
    judge = Judge(subject, examine)
    for scenario in ("crop", "permuted", "reset", "fork"):
        assert judge.judge(Case(SCENARIOS[scenario])).verdict == ROUNDING, scenario


def test_a_method_that_was_guessed_may_refuse() -> None:
    class Ring(Buffers):
        def crop(self, length: int) -> None:
            raise RuntimeError("the window has passed")

    class Ringed(SHAPES["MadeCache"]):  # type: ignore[misc]
        def new_cache(self, batch: int, max_len: int) -> Buffers:
            return Ring(batch, max_len, self.head.weight.dtype)

    finding = judged(Ringed(), "crop")
    assert finding.verdict == "unsupported" and "the window has passed" in finding.evidence


class Lenient(Core):
    """Finds its positions itself, wrongly, unless it is given them."""

    def forward(self, ids: Tensor, cache: Any = None, position_ids: Tensor | None = None) -> Any:
        new: list[Any] = []
        positions = torch.arange(ids.shape[1]) if position_ids is None else position_ids
        return self.run(ids, positions, joined(cache, new)), new


def test_a_default_of_positions_that_is_wrong_is_a_bug() -> None:
    guess = TargetSubject(Lenient(), "it").guess
    assert "forward(ids, cache=None at first) -> (logits, cache)" in guess
    assert "position_ids is left out, as its default allows; given, logits are right" in guess
    finding = judged(Lenient(), "decode")
    assert finding.verdict == BUG and "positions start at 0 again" in finding.diagnosis.hint


def test_without_a_cache_in_the_signature_the_error_names_the_signature() -> None:
    with pytest.raises(UsageError, match=r"it: forward\(input\) has no parameter that could be"):
        TargetSubject(nn.Linear(3, 3), "it")


class NoAnswer(Core):
    def forward(self, ids: Tensor, cache: Any = None) -> Any:
        return self.run(ids, torch.arange(ids.shape[1]), lambda layer, k, v: (k, v)), None


def test_where_nothing_fits_the_error_says_what_was_tried() -> None:
    with pytest.raises(UsageError) as caught:
        TargetSubject(NoAnswer(), "it")
    message = caught.value.message
    assert "forward(ids, cache=None at first): TypeError: it answered without a cache" in message
    assert "full(ids) and step(ids, state)" in caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "context"])
def test_sizes_are_found_where_the_decoder_does_not_tell_them(name: str) -> None:
    model = Pairs()
    delattr(model, name)
    model.pos_embedding = nn.Embedding(50, 16)
    expected = {"vocab_size": VOCAB, "context": 50}[name]
    assert getattr(TargetSubject(model, "it"), name) == expected


def test_a_decoder_that_holds_too_few_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="it: holds 20 tokens"):
        TargetSubject(Pairs(), "it", context=20)


# transformers


def hugging_face(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **sizes)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        max_position_embeddings=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **sizes,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_transformers_are_right_in_all_that_they_can_do(kind: str) -> None:
    report = kvtool.verify(hugging_face(kind), tokens=6)
    assert report.ok, str(report)
    played = {f.scenario: f.verdict for f in report.findings if f.working is not None}
    expected = {"decode", "chunks", "padded", "permuted", "reset", "fork", "crop"}
    assert expected <= played.keys() and set(played.values()) == {ROUNDING}


def test_shifted_positions_of_a_rotary_model_are_found_in_its_rotary_module() -> None:
    model = hugging_face("llama")

    def late(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        places = kwargs["position_ids"]
        return args, {**kwargs, "position_ids": places + (places > 0) * (places.shape[1] == 1)}

    model.model.rotary_emb.register_forward_pre_hook(late, with_kwargs=True)  # type: ignore
    finding = judged(model)
    assert (finding.verdict, finding.first_wrong) == (BUG, 1)
    assert "model.rotary_emb" in finding.diagnosis.place


def test_a_first_step_that_was_refused_is_not_asked_for_again() -> None:
    refused: list[tuple[str, ...]] = []

    class Picky(Pairs):
        """It takes tuples alone, and forgets the past: no way of calling it agrees."""

        def forward(self, ids: Tensor, cache: Any = None) -> Any:  # type: ignore[override]
            if (cache is not None and not isinstance(cache, (tuple, list))) or cache == []:
                refused.append((repr(cache), str(ids.shape)))
                raise AttributeError("no tuple")
            logits, new = super().forward(ids, None)
            return logits, tuple(new)

    assert judged(Picky()).verdict == BUG
    assert len(refused) > 2 and len(set(refused)) == len(refused)
