"""The decode loop: every cache gives the tokens of the uncached loop, and limits come first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec, Step, cache_class, make_cache
from kvtool.core.cache.cross import CrossCache
from kvtool.core.decoding.engine import check_context, feed, first_input, generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.models import Model
from kvtool.core.text.tokenizer import BOS
from kvtool.errors import CapacityError, CheckFailed, UsageError
from kvtool.registry import CACHES
from planted_bugs import MUTANTS
from small_models import random_model

PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])
SEQ2SEQ: dict[str, Any] = {"n_encoder_layers": 1, "source_vocab_size": 23}
every_kind = pytest.mark.parametrize("kind", CACHES)


def decoder(**changes: Any) -> Model:
    """Not tied: a random model whose head is its embedding repeats its last token for ever."""
    return random_model(5, torch.float64, **{"tied": False, **changes})


def uncached(
    model: Model, n_new: int, ids: Tensor = PROMPT, padding: Tensor | None = None, kind: str = ""
) -> Tensor:
    """Greedy tokens (B,n) by the plainest loop there is, rounded as by a kind that rounds every
    token as it is written."""
    rounds = cache_class(kind).quantization if kind else None
    ids, source = first_input(model, ids)
    start = ids.shape[1]
    for _ in range(n_new):
        step = Step.full(*ids.shape, left_padding=padding, quantization=rounds)
        ids = torch.cat([ids, model(ids, step, source=source)[:, -1:].argmax(-1)], dim=1)
    return ids[:, start:]


def new_cache(
    model: Model, kind: str | type[Cache], capacity: int = 64, padding: Tensor | None = None
) -> Cache:
    spec = CacheSpec.of(model.config, 2, capacity, torch.float64)
    return make_cache(kind, spec, padding) if isinstance(kind, str) else kind(spec, padding)


def run(
    model: Model,
    kind: str | type[Cache],
    n_new: int,
    sampler: Sampler | None = None,
    **more: Tensor | None,
) -> Tensor:
    ids, source = first_input(model, PROMPT)
    cache = new_cache(model, kind, ids.shape[1] + n_new - 1, **more)  # the last is never stored
    return torch.stack([*generate(model, ids, cache, n_new, sampler or Sampler(), source)], dim=1)


def count_calls(model: Model) -> list[int]:
    """Grows by the number of tokens of each forward pass."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    return calls


every_model = pytest.mark.parametrize(
    "changes", [{}, {"positions": "rotary", "n_kv_heads": 2}, SEQ2SEQ], ids=str
)


@every_kind
@every_model
def test_every_kind_generates_the_tokens_of_the_uncached_loop(
    kind: str, changes: dict[str, Any]
) -> None:
    model = decoder(**changes)
    assert run(model, kind, 30).equal(uncached(model, 30, kind=kind))


@every_model
@pytest.mark.parametrize("bug", ["a lost value", "position off by one", "the wrong slot"])
def test_these_models_would_tell_a_broken_cache(bug: str, changes: dict[str, Any]) -> None:
    """Equal tokens prove nothing where a bug does not change them."""
    model = decoder(**changes)
    assert not run(model, MUTANTS[bug][0], 30).equal(uncached(model, 30))


@every_kind
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_left_padded_prompts_generate_what_they_would_alone(kind: str, positions: str) -> None:
    model, padding = decoder(positions=positions), torch.tensor([1, 0])
    expected = uncached(model, 20, padding=padding, kind=kind)
    assert expected[0].equal(uncached(model, 20, PROMPT[:1, 1:], kind=kind)[0])
    assert run(model, kind, 20, padding=padding).equal(expected)


def test_drawn_tokens_do_not_depend_on_the_cache_either() -> None:
    model = decoder()
    found = [run(model, kind, 20, Sampler(1.0, seed=3)).tolist() for kind in CACHES]
    assert found.count(found[0]) == len(found)
    assert run(model, "dynamic", 20, Sampler(1.0, seed=4)).tolist() != found[0]


def test_a_cache_is_fed_the_prompt_once_and_then_single_tokens() -> None:
    model = decoder()
    calls = count_calls(model)
    run(model, "dynamic", 4)
    assert calls == [3, 1, 1, 1]
    calls.clear()
    run(model, "none", 4)
    assert calls == [3, 4, 5, 6]


@every_kind
def test_a_caller_may_stop_early_and_go_on_later(kind: str) -> None:
    model = decoder()
    expected, calls = uncached(model, 12), count_calls(model)
    cache, found = new_cache(model, kind), []
    for token in generate(model, PROMPT, cache, 30, Sampler()):
        found.append(token)
        if len(found) == 5:
            break
    assert (len(calls), cache.length) == (5, 7)  # no step more than was asked for
    ids = torch.cat([PROMPT, torch.stack(found, dim=1)], dim=1)
    found += generate(model, ids, cache, 7, Sampler())
    assert torch.stack(found, dim=1).equal(expected)


@every_kind
@pytest.mark.parametrize(("n_prompt", "n_new"), [(3, 62), (64, 1), (65, 0)])
def test_what_exceeds_the_context_is_refused_before_any_work(
    kind: str, n_prompt: int, n_new: int
) -> None:
    model = decoder()
    calls, cache = count_calls(model), new_cache(model, kind, 200)
    prompt = torch.zeros(2, n_prompt, dtype=torch.long)
    message = rf"prompt is {n_prompt} tokens and {n_new} more .* holds 64"
    with pytest.raises(CapacityError, match=message):
        list(generate(model, prompt, cache, n_new, Sampler()))
    assert (calls, cache.length) == ([], 0)


def test_the_context_may_be_filled_to_the_last_token() -> None:
    assert run(decoder(), "static", 61).shape == (2, 61)
    check_context(3, 61, 64)


def test_a_cache_that_is_too_small_yields_what_it_can_hold() -> None:
    model = decoder()
    generation, found = generate(model, PROMPT, new_cache(model, "static", 5), 9, Sampler()), []
    with pytest.raises(CapacityError, match=r"static cache is full.*capacity 5"):
        for token in generation:
            found.append(token)
    assert torch.stack(found, dim=1).equal(uncached(model, 3))


@pytest.mark.parametrize("prompt", [PROMPT[:, :0], PROMPT])
def test_a_cache_must_be_given_something_new(prompt: Tensor) -> None:
    model = decoder()
    cache = new_cache(model, "dynamic")
    if prompt.numel():
        feed(model, cache, prompt)
    with pytest.raises(UsageError, match=r"1 token or more .found 0"):
        next(generate(model, prompt, cache, 5, Sampler()))


@every_kind
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(1.0)], ids=["greedy", "random"])
def test_nan_logits_stop_generation_at_their_step(kind: str, sampler: Sampler) -> None:
    model = decoder(positions="learned")
    with torch.no_grad():
        model.get_parameter("embed.positions.weight")[7] = float("nan")
    found = []
    with pytest.raises(CheckFailed, match="step 5: the logits are not finite"):
        for token in generate(model, PROMPT, new_cache(model, kind), 20, sampler):
            found.append(token)
    assert len(found) == 5


@every_kind
def test_nothing_is_committed_when_the_model_raises(kind: str) -> None:
    model = decoder()
    cache = new_cache(model, kind)
    feed(model, cache, PROMPT)
    with pytest.raises(IndexError, match="index out of range"):
        feed(model, cache, torch.cat([PROMPT, torch.tensor([[99], [99]])], dim=1))
    assert cache.length == 3


@every_kind
def test_feed_answers_with_all_new_tokens_or_the_last_alone(kind: str) -> None:
    model = decoder()
    full = model(PROMPT, Step.full(*PROMPT.shape, quantization=cache_class(kind).quantization))
    everything = feed(model, new_cache(model, kind), PROMPT)
    last = feed(model, new_cache(model, kind), PROMPT, last=True)
    assert (everything.shape, last.shape) == ((2, 3, 23), (2, 1, 23))
    torch.testing.assert_close(everything, full, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, full[:, -1:], rtol=0, atol=1e-12)


def test_an_encoder_decoder_begins_with_the_start_token_and_the_encoded_source() -> None:
    ids, source = first_input(decoder(**SEQ2SEQ), PROMPT)
    assert ids.tolist() == [[BOS], [BOS]]
    assert isinstance(source, CrossCache)
    assert source.layers[0][0].shape[:3] == (2, 4, 3)
    assert bool(source.mask.all())
    ids, source = first_input(decoder(), PROMPT)
    assert ids is PROMPT
    assert source is None


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_caller_needs_no_particular_mode(context: Callable[[], Any]) -> None:
    model = decoder()
    expected = uncached(model, 6)
    with context():
        tokens = torch.stack([*generate(model, PROMPT, new_cache(model, "static"), 6, Sampler())])
    assert tokens.T.equal(expected)
    assert not tokens.requires_grad
