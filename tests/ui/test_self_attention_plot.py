"""generate --attention-plot of a decoder: its self-attention, and what its cache has lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import family_cases
from cli_probe import Ran, refused
from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding.attention_maps import SelfAttentionMap, self_attention_weights
from kvtool.core.kernels.default import DEFAULT, Layer
from kvtool.core.kernels.masks import mask_tensor
from kvtool.core.models import Model
from kvtool.ui import heat_maps
from small_models import answer, random_model, save_decoder

PROMPT, NEW = [3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7]
LAYER = 1
ASCII = ("--seed", "8", "--max-tokens", "5")  # a text that is drawn as it is
KINDS = [
    "none", "dynamic", "sliding:window=6:sinks=2", "int8:group=4:residual=4", "int4:group=4", "fp8",
    "paged:page=4",
]  # fmt: skip


class Recording:
    """Kernels that keep the weights of each attention, by their own arithmetic."""

    name = "default"

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def per_token(self, x: Tensor, *layers: Layer) -> Tensor:
        return DEFAULT.per_token(x, *layers)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: bool, cap: float = 0.0
    ) -> Tensor:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("bhtd,bhsd->bhts", q, keys) / q.shape[-1] ** 0.5
        scores = cap * torch.tanh(scores / cap) if cap else scores
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
        seen = mask_tensor(mask) if mask is not None else seen.tril() if causal else seen
        self.found.append(torch.where(seen, scores.exp(), 0.0))
        self.found[-1] /= self.found[-1].sum(-1, keepdim=True)
        return DEFAULT.attention(q, k, v, mask, causal, *((cap,) if cap else ()))


def by_steps(model: Model, kind: str) -> Tensor:
    """The weights (H,T,S) of a real decode loop with a cache, sorted by position."""
    kernels = Recording()
    spec = CacheSpec.of(model.config, 1, 32, torch.float64, kernels=kernels)  # type: ignore[arg-type]
    cache = make_cache(kind, spec)
    n_read = len(PROMPT) + len(NEW) - 1
    rows = []
    for i, token in enumerate([None, *NEW[:-1]]):
        whole = cache.recompute or token is None
        fed = [*PROMPT, *NEW[:i]] if whole else [token]
        kernels.found.clear()
        step = cache.begin(len(fed))
        model(torch.tensor([fed]), step, cache)
        cache.commit(len(fed))
        weights = kernels.found[LAYER][0, :, -1]  # (H,S), columns as they are stored
        places = step.k_pos[0].clamp_min(0)
        rows.append(torch.zeros(len(weights), n_read).double().index_add(1, places, weights))
    return torch.stack(rows, dim=1)


def mapped(model: Model, kind: str) -> SelfAttentionMap:
    cache = make_cache(kind, CacheSpec.of(model.config, 1, 1))
    return self_attention_weights(model, PROMPT, NEW, LAYER, cache)


@pytest.fixture(scope="module")
def decoder64() -> Model:
    return random_model(n_layers=2, n_kv_heads=2).double()


# The weights


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_every_step_of_the_run(decoder64: Model, kind: str) -> None:
    found = mapped(decoder64, kind).weights
    assert found.shape == (4, len(NEW), len(PROMPT) + len(NEW) - 1)
    torch.testing.assert_close(found, by_steps(decoder64, kind), rtol=0, atol=1e-12)


def test_weights_of_a_folder_of_hugging_face_are_too(tmp_path: Path) -> None:
    """Gemma 2: capped scores, a scale of its own, and layers with and without a window."""
    folder = family_cases.save(family_cases.build(family_cases.CASES["gemma2"]), tmp_path / "g")
    model = checkpoint.load(str(folder), torch.device("cpu"), torch.float64).model
    found = mapped(model, "dynamic").weights
    torch.testing.assert_close(found, by_steps(model, "dynamic"), rtol=0, atol=1e-12)


def test_what_a_window_has_passed_is_gone_and_sinks_are_not(decoder64: Model) -> None:
    found = mapped(decoder64, "sliding:window=6:sinks=2")
    for row, query in enumerate(range(len(PROMPT) - 1, len(PROMPT) + len(NEW) - 1)):
        gone = [column for column in range(query + 1) if 2 <= column <= query - 6]
        assert found.gone[row].nonzero().flatten().tolist() == gone
    assert not found.weights[:, found.gone].any() and not found.coded.any()
    assert not mapped(decoder64, "dynamic").gone.any()


def test_what_was_read_quantized_is_marked(decoder64: Model) -> None:
    found = mapped(decoder64, "int8:group=4:residual=4")
    newest_exact = [[0, 4, 4, 4, 4, 8][i] for i in range(len(NEW))]  # by hand: whole groups of 4
    assert found.coded.sum(1).tolist() == newest_exact
    assert not found.gone.any()
    assert mapped(decoder64, "fp8").coded.sum(1).tolist() == list(range(8, 14))


# kvtool generate


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), context=256)


@pytest.fixture
def generate(kv: Callable[..., Ran], decoder: Path, tmp_path: Path) -> Callable[..., Ran]:
    def call(*args: str) -> Ran:
        given = ["--model", str(decoder), "--device", "cpu", "--threads", "1", "--max-tokens", "9"]
        plot = str(tmp_path / "a.png")
        return kv(*given, "--attention-plot", plot, *args, command="generate")

    return call


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    monkeypatch.setattr(heat_maps, "attention_plot", lambda *args: seen.append(args))
    return seen


def test_new_tokens_stand_beside_all_that_were_read(
    generate: Callable[..., Ran], drawn: list[Any]
) -> None:
    ran = generate("--prompt", "abcab", "--attention-layer", "1", "--json", *ASCII)
    result = answer(ran)["results"][0]
    assert result["text"].isprintable() and result["text"].isascii()
    ((_, weights, across, down, title, named, marks),) = drawn
    assert "".join(across) == "abcab" + result["text"][:-1]
    assert "".join(down) == result["text"] and len(weights[0]) == 5
    assert title[0].startswith("Self-attention of layer 1 of ")
    assert title[2] == f"abcab → {result['text']}"
    assert named == ("tokens that were read", "new tokens")
    assert not any(any(map(any, mark.cells)) for mark in marks)


def test_a_picture_has_a_legend_for_what_the_cache_has_lost(
    generate: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(heat_maps, "save_figure", lambda figure, _: figures.append(figure))
    for kind in ("sliding:window=4:sinks=1", "fp8", "dynamic"):
        assert generate("--prompt", "abcab", "--cache", kind).code == 0
    said = [[t.get_text() for each in f.legends for t in each.get_texts()] for f in figures]
    lost = ["no longer seen (sliding:window=4:sinks=1 cache)"]
    assert said == [lost, ["read quantized (fp8)"], []]


def test_of_a_long_context_the_end_is_drawn_and_that_is_said(
    generate: Callable[..., Ran], drawn: list[Any]
) -> None:
    ran = generate("--prompt", "ab" * 60, "--max-tokens", "70")
    said = "the last 96 of 189 tokens are drawn; "
    assert f"--attention-plot: {said}" in ran.err
    assert "rows are the last 64 of 70 new tokens" in ran.err
    ((_, weights, across, down, title, *_),) = drawn
    assert (len(across), len(down)) == (len(weights[0][0]), len(weights[0])) == (96, 64)
    assert title[-1].startswith(said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prompt a --attention-layer 9", "--attention-layer: 9 is too large (the decoder's"),
        ("--input two.txt", "--attention-plot: draws one prompt (found 2). Give one with"),
    ],
)
def test_what_cannot_be_drawn_is_exit_2(
    generate: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("ab\nba\n")
    assert refused(generate(*words.split())).startswith(message)
