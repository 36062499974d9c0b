"""Cross-attention weights, where they come from, and the picture of them."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cli_probe import Ran, refused
from kvtool.core.cache import CacheSpec, Step, make_cache
from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding.attention_maps import (
    WeightRecorder,
    cross_attention_weights,
    labels,
    visible,
)
from kvtool.core.decoding.engine import feed
from kvtool.core.kernels.default import DEFAULT
from kvtool.core.kernels.exact import EXACT
from kvtool.core.models import Model
from kvtool.core.text.tokenizer import BOS, EOS, PAD, UNK, Tokenizer
from kvtool.ui import heat_maps
from small_models import (
    PHONES,
    answer,
    change_weights,
    random_model,
    save_seq2seq,
)

SOURCE = [4, 9, 16, 5, 4, 11]
TARGET = [9, 10, 11, 12, EOS]
WEIGHTS = [[[0.5, 0.25, 0.25], [0.0, 0.625, 0.375]], [[0.25, 0.375, 0.375], [0.125, 0.5, 0.375]]]
STARTS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}


def pair_model(dtype: torch.dtype = torch.float64, **changes: Any) -> Model:
    """An encoder-decoder whose four heads share two key-value heads."""
    sizes = {"n_encoder_layers": 1, "source_vocab_size": 17, "n_kv_heads": 2, **changes}
    return random_model(4, dtype, **sizes)


# The weights


def test_each_row_of_each_head_sums_to_one() -> None:
    for layer in (0, 1):
        weights = cross_attention_weights(pair_model(), SOURCE, TARGET, layer)
        assert weights.shape == (4, len(TARGET), len(SOURCE))
        assert bool((weights > 0).all())
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 5).double(), rtol=0, atol=1e-14)


def test_recorded_weights_times_the_values_are_what_attention_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, heads, n, 8, dtype=torch.float64, generator=generator)
        for heads, n in ((4, 5), (2, 7), (2, 7))
    )
    real = (torch.arange(7) < torch.tensor([7, 4, 6])[:, None])[:, None, None, :]
    for mask in (None, real):
        recorder = WeightRecorder(DEFAULT, k)
        given = recorder.attention(q, k, v, mask, False)
        (weights,) = recorder.found
        torch.testing.assert_close(
            weights @ v.repeat_interleave(2, dim=1), given, rtol=0, atol=1e-14
        )
    assert bool((weights.masked_select(~real) == 0).all())  # padding is not read


def test_recording_keeps_attention_over_one_layers_source_and_changes_nothing() -> None:
    model = pair_model(torch.float32)
    ids, target = torch.tensor([SOURCE]), torch.tensor([[BOS, *TARGET[:-1]]])
    with torch.inference_mode():
        source = model.encode(ids, torch.ones_like(ids, dtype=torch.bool))
        recorder = WeightRecorder(DEFAULT, source.layers[1][0])
        recorded = model(target, Step.full(1, 5, kernels=recorder), source=source)
        assert torch.equal(recorded, model(target, source=source))
    assert [tuple(found.shape) for found in recorder.found] == [(1, 4, 5, 6)]


@pytest.mark.parametrize("layer", [0, 1])
def test_one_pass_has_the_weights_of_decoding_bit_for_bit(layer: int) -> None:
    """Decoded token by token with a cache: row t is the step that chose the t-th token."""
    model = pair_model(torch.float32)
    ids = torch.tensor([SOURCE])
    with torch.inference_mode():
        source = model.encode(ids, torch.ones_like(ids, dtype=torch.bool), EXACT)
        recorder = WeightRecorder(EXACT, source.layers[layer][0])
        spec = CacheSpec.of(model.config, 1, 8, kernels=recorder)
        cache, read = make_cache("static", spec), torch.tensor([[BOS, *TARGET]])
        for end in range(1, 1 + len(TARGET)):
            feed(model, cache, read[:, :end], source, last=True)
    steps = torch.cat(recorder.found, dim=2)[0]
    whole = cross_attention_weights(model, SOURCE, TARGET, layer, EXACT)
    assert torch.equal(steps, whole)
    other = cross_attention_weights(model, SOURCE, TARGET, 1 - layer, EXACT)
    assert not torch.allclose(whole, other, atol=1e-3)


def test_reading_one_source_token_takes_all_of_it() -> None:
    weights = cross_attention_weights(pair_model(), [5], TARGET, 0)
    assert bool((weights == 1).all())


# The names of tokens


def test_special_tokens_are_named_and_blanks_are_visible() -> None:
    spelling = Tokenizer.train("char", ["a b\n"])
    ids = spelling.encode("a b\n?")
    assert labels(spelling, [*ids, EOS, PAD]) == ["a", "␣", "b", "\\n", "<unk>", "<eos>", "<pad>"]
    assert ids[-1] == UNK
    phones = Tokenizer.train("symbol", PHONES)
    assert labels(phones, [*phones.encode("F I G"), EOS]) == ["F", "I", "G", "<eos>"]


def test_subwords_are_text_and_parts_of_characters_are_bytes() -> None:
    tokenizer = Tokenizer.train("bpe", ["on a ladder häßlich " * 9], 300)
    assert labels(tokenizer, tokenizer.encode("on ladder häßlich")) == [
        "on", "␣ladder", "␣häßlich",
    ]  # fmt: skip
    assert labels(tokenizer, tokenizer.encode("本\x07")) == ["\\xe6", "\\x9c", "\\xac", "\\x07"]


def test_text_is_on_one_line_and_escapes_what_cannot_be_seen() -> None:
    assert visible("a b\n\x1b[31m häß 本") == "a b\\n\\x1b[31m häß 本"


# The picture


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, for looking at."""
    seen: list[Any] = []
    monkeypatch.setattr(heat_maps, "save_figure", lambda figure, *_: seen.append(figure))
    return seen


def panels_of(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_title()]


def names(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_panel_a_head_shows_its_weights_under_the_tokens_names(figures: list[Any]) -> None:
    title = ["run/best, layer 1 of 1", "C$x$ → K <eos>"]
    heat_maps.attention_plot(Path("a.png"), WEIGHTS, ["C", "$x$", "$"], ["K", "<eos>"], title)
    first, second = panels_of(figures[0])
    assert [axes.get_title() for axes in (first, second)] == ["head 1", "head 2"]
    assert [axes.images[0].get_array().tolist() for axes in (first, second)] == WEIGHTS
    assert names(first.yaxis) == ["K", "<eos>"]  # of the panels beside it, too
    for axes in (first, second):
        assert names(axes.xaxis) == ["C", "$x$", "$"]
        assert not any(label.get_parse_math() for label in axes.get_xticklabels())
        assert axes.yaxis_inverted()  # the first token is on top
    assert figures[0].get_suptitle() == "\n".join(title)
    (bar,) = [axes for axes in figures[0].axes if axes.get_ylabel() == "attention weight"]
    assert bar.get_ylim() == (0, 0.7)  # 0.625, rounded up
    assert {axes.images[0].get_clim() for axes in (first, second)} == {(0, 0.7)}


@pytest.mark.parametrize(
    ("n_heads", "tall", "wide", "grid"),
    [(8, 17, 17, (2, 4)), (8, 11, 11, (2, 4)), (1, 5, 5, (1, 1)), (16, 18, 17, (4, 4)),
     (7, 10, 10, (2, 4)), (3, 9, 9, (1, 3)), (8, 40, 10, (1, 8))],
)  # fmt: skip
def test_panels_fill_a_broad_picture(
    n_heads: int, tall: int, wide: int, grid: tuple[int, int]
) -> None:
    assert heat_maps._grid(n_heads, tall, wide) == grid


def test_a_place_without_a_head_stays_empty(figures: list[Any]) -> None:
    weights = torch.full((7, 4, 4), 0.25).tolist()
    heat_maps.attention_plot(Path("a.png"), weights, ["s"] * 4, ["t"] * 4, ["a title"])
    *panels, empty, bar = figures[0].axes
    assert [axes.get_visible() for axes in (*panels, empty, bar)] == [True] * 7 + [False, True]


@pytest.mark.parametrize(("n_target", "n_source"), [(1, 1), (2, 1), (17, 17), (60, 90)])
def test_cells_are_squares_and_no_name_is_without_room(
    n_target: int, n_source: int, figures: list[Any]
) -> None:
    weights = torch.full((4, n_target, n_source), 1 / n_source).tolist()
    source, target = ["Donaudampfschifffahrt"] * n_source, ["to"] * n_target
    heat_maps.attention_plot(Path("a.png"), weights, source, target, ["word " * 30])
    (figure,) = figures
    width, height = figure.get_size_inches()
    assert 5 <= width < 21 and height < 26
    for axes in panels_of(figure):
        box = axes.get_position()
        cell = box.width * width / n_source
        assert box.height * height / n_target == pytest.approx(cell)
        shown = names(axes.xaxis)
        assert set(shown) == {"Donaudampfsch…"}
        size = axes.get_xticklabels()[0].get_fontsize() / 72
        assert box.width * width / len(shown) > size or len(shown) == 1
    assert all(a.get_position().x0 >= 0 and a.get_position().x1 <= 1 for a in figure.axes)


def test_characters_that_the_house_font_lacks_are_looked_for_in_others() -> None:
    assert heat_maps._fonts("häßlich → ␣") == ["DejaVu Sans"]
    families = heat_maps._fonts("\ue0d3")  # of STIX, which comes with matplotlib
    assert families[0] == "DejaVu Sans" and "STIXNonUnicode" in families


@pytest.mark.parametrize("suffix", STARTS)
def test_a_plot_is_a_real_file_without_a_warning(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heat_maps.attention_plot(path, WEIGHTS, ["\U000f1234", "b", "c"], ["K", "<eos>"], ["a"])
    assert path.read_bytes().startswith(STARTS[suffix])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


# kvtool generate --attention-plot


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seq2seq(tmp_path_factory.mktemp("seq2seq") / "best")


@pytest.fixture
def generate(kv: Callable[..., Ran], seq2seq: Path) -> Callable[..., Ran]:
    def call(*args: str, model: Path = seq2seq) -> Ran:
        given = ("--model", str(model), "--device", "cpu")
        return kv(*given, *args, command="generate")

    return call


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is drawn: (weights (H,T,S), source, target, title) for each plot."""
    seen: list[Any] = []

    def keep(path: Path, weights: Any, *rest: Any) -> None:
        seen.append((torch.tensor(weights, dtype=torch.float64), *rest))

    monkeypatch.setattr(heat_maps, "attention_plot", keep)
    return seen


def expected(folder: Path, source: str, target: str, layer: int, ended: bool) -> Tensor:
    loaded = checkpoint.load(str(folder), torch.device("cpu"), torch.float32)
    assert loaded.source_tokenizer is not None
    ids = [*loaded.tokenizer.encode(target), *[EOS] * ended]
    return cross_attention_weights(loaded.model, loaded.source_tokenizer.encode(source), ids, layer)


@pytest.mark.parametrize("suffix", STARTS)
def test_generate_draws_beside_the_same_text(
    generate: Callable[..., Ran], tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    ran = generate("--prompt", "jail", "--attention-plot", str(path))
    assert ran.code == 0 and f"plot: {path}\n" in ran.err
    assert ran.out == generate("--prompt", "jail").out
    assert path.read_bytes().startswith(STARTS[suffix])


@pytest.mark.parametrize("search", ["", "--beams 4 --n-best 3", "--temperature 0.9 --seed 2"])
@pytest.mark.parametrize("layer", [1, 2])
def test_the_target_drawn_is_the_one_that_was_chosen(
    generate: Callable[..., Ran], drawn: list[Any], seq2seq: Path, search: str, layer: int
) -> None:
    given = [*search.split(), "--max-tokens", "9", "--attention-layer", str(layer)]
    ran = generate("--prompt", "jail", "--attention-plot", "a.png", "--json", *given)
    best = answer(ran)["results"][0]
    assert "ids" not in best
    ((weights, source, target, title),) = drawn
    assert source == list("jail")
    assert target == best["text"].split() + ["<eos>"] * best["ended"]
    assert len(target) == best["new_tokens"]
    what, about, pair = title
    assert what == f"Cross-attention of decoder layer {layer} of 2"
    assert about.startswith(f"{seq2seq.parent.name}/best (") and ", float32, 1 thread, " in about
    assert pair == f"jail → {best['text']}"
    given_once = expected(seq2seq, "jail", best["text"], layer - 1, best["ended"])
    torch.testing.assert_close(weights, given_once, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("beams", "n_phones"), [("1", 6), ("4", 1)])
def test_the_end_of_the_target_has_a_row(
    generate: Callable[..., Ran], drawn: list[Any], tmp_path: Path, beams: str, n_phones: int
) -> None:
    def likely_to_end(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights["decoder.embed.tokens.weight"][EOS] *= 3
        return weights

    model = change_weights(save_seq2seq(tmp_path / "a", 18), tmp_path / "b", likely_to_end)
    given = ("--prompt", "wren", "--attention-plot", "a.png", "--beams", beams, "--json")
    (result,) = answer(generate(*given, model=model))["results"]
    ((weights, _, target, _),) = drawn
    assert target == [*result["text"].split(), "<eos>"] and len(target) == n_phones + 1
    given_once = expected(model, "wren", result["text"], 1, ended=True)
    torch.testing.assert_close(weights, given_once, rtol=0, atol=1e-12)


def test_the_last_layer_is_drawn_unless_another_is_named(
    generate: Callable[..., Ran], drawn: list[Any]
) -> None:
    for more in ([], ["--attention-layer", "2"], ["--attention-layer", "1"]):
        generate("--prompt", "jail", "--max-tokens", "9", "--attention-plot", "a.png", *more)
    last, second, first = (weights for weights, *_ in drawn)
    assert torch.equal(last, second) and not torch.allclose(last, first, atol=1e-3)


def test_one_source_may_come_from_a_file_or_stdin(
    generate: Callable[..., Ran],
    drawn: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("jail\n")
    assert generate("--input", str(path), "--attention-plot", "a.png").code == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"jail\n")))
    assert generate("--attention-plot", "a.png").code == 0
    assert [source for _, source, *_ in drawn] == [list("jail")] * 2
    torch.testing.assert_close(drawn[0][0], drawn[1][0], rtol=0, atol=1e-6)


def test_several_sources_are_refused_before_any_is_read(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("jail\nfig\n")
    message = refused(generate("--input", str(path), "--attention-plot", str(tmp_path / "a.png")))
    assert message == "--attention-plot: draws one source (found 2). Give one with --prompt."
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--attention-plot a.jpg", "--attention-plot a.jpg: .jpg is not a plot format"),
        ("--attention-plot a", "--attention-plot a: no suffix is not a plot format"),
        ("--attention-plot none/a.png", "--attention-plot none/a.png: the folder "),
        ("--attention-plot a.png --attention-layer 0", "--attention-layer: 0 is too small"),
        ("--attention-layer 1", "--attention-layer: nothing is drawn"),
    ],
)
def test_what_cannot_be_drawn_is_exit_2_before_the_model_is_read(
    generate: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr(checkpoint, "load", refuse)
    assert refused(generate("--prompt", "jail", *words.split())).startswith(message)


def test_a_folder_and_a_layer_that_is_not_there_are_refused(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    folder = tmp_path / "a.png"
    folder.mkdir()
    message = refused(generate("--prompt", "jail", "--attention-plot", str(folder)))
    assert message.endswith("a.png: is a folder (expected a file)")
    path = str(tmp_path / "b.png")
    message = refused(
        generate("--prompt", "jail", "--attention-plot", path, "--attention-layer", "3")
    )
    assert message == "--attention-layer: 3 is too large (the decoder's layers are 1 to 2)"
