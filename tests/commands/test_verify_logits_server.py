"""kvtool verify-logits --server: right and wrong weights behind a server, and llama.cpp itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_engine
from cli_probe import Ran, refused
from fake_engine import FakeEngine, llama_cpp, served
from gguf_files import Made
from kvtool.core.reference import rounding
from kvtool.core.reference.served import divergence
from kvtool.core.text.tokenizer import Tokenizer
from llama_server import llama_server
from small_models import answer, random_model, save_decoder

# No token ends within a letter: llama.cpp tells no logprobs of those.
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["<end>", *LETTERS, *map("".join, itertools.product(LETTERS, repeat=2))][:300]
PROMPTS = (
    "[3, 7, 2, 30, 41, 5, 19, 22, 8, 15, 44, 51, 6]\n[9, 9, 4, 18, 27, 33, 2, 50, 12, 1, 40, 16]\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the weights that FakeEngine serves."""
    return save_decoder(tmp_path / "model", vocab_size=300, context=fake_engine.CONTEXT)


@pytest.fixture
def engine(folder: Path) -> FakeEngine:
    found = FakeEngine()
    found.model = random_model(0, vocab_size=300, context=fake_engine.CONTEXT)
    return found


def speaking_as(folder: Path) -> Any:
    """llama.cpp's answers, with the tokenizer of a checkpoint."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")

    def speak(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if path == "/tokenize":
            return {"tokens": tokenizer.encode(body["content"])}
        return llama_cpp(engine, path, body)

    return speak


@pytest.fixture
def ask(kv: Callable[..., Ran], folder: Path, tmp_path: Path) -> Callable[..., Ran]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)

    def call(engine: FakeEngine, *args: str, speak: Any = None) -> Ran:
        given = ("--model", str(folder), "--prompts", str(prompts), "--tokens", "8", "--json")
        with served(engine, speak or speaking_as(folder)) as url:
            return kv("--server", url, *given, *args, command="verify-logits")

    return call


def test_a_server_of_the_same_weights_agrees(ask: Callable[..., Ran], engine: FakeEngine) -> None:
    found = answer(ask(engine))
    assert (found["schema"], found["verdict"]) == ("kvtool.verify-logits.server/1", "agrees")
    assert found["tokens_agree"] is True and found["ratio"] < 0.1  # it computes in float32
    assert len(found["positions"]) == 2 * 9
    assert min(found["controls"].values()) > 2
    assert found["conclusion"].startswith("agrees within its format's rounding at 18 positions")
    assert {"gap", "expected", "noise", "kl", "same_top1"} <= found["positions"][0].keys()


def test_other_weights_are_found_with_the_position(
    ask: Callable[..., Ran], engine: FakeEngine
) -> None:
    engine.model = random_model(1, vocab_size=300, context=fake_engine.CONTEXT)
    found = answer(ask(engine), 1)
    assert found["verdict"] == "differs" and found["first"]["position"] == 13
    assert found["conclusion"].startswith("differs from position 13 of prompt 0 on")


@pytest.mark.parametrize("part", ["layers.0.attn.out.weight", "norm.weight"])
def test_one_wrong_tensor_is_enough(ask: Callable[..., Ran], engine: FakeEngine, part: str) -> None:
    tensor = engine.model.get_parameter(part)
    with torch.no_grad():
        tensor.copy_(1.05 * tensor + 0.02)
    assert answer(ask(engine), 1)["verdict"] == "differs"


def test_weights_of_fewer_bits_are_found(ask: Callable[..., Ran], engine: FakeEngine) -> None:
    with rounding.coarser_weights(engine.model):
        assert answer(ask(engine), 1)["verdict"] == "differs"


def test_a_server_that_makes_other_tokens_of_a_text_differs(
    ask: Callable[..., Ran], engine: FakeEngine
) -> None:
    found = answer(ask(engine, speak=llama_cpp), 1)
    assert (found["verdict"], found["tokens_agree"]) == ("agrees", False)
    assert "makes other tokens of a text" in found["conclusion"]


def test_where_rounding_hides_faults_it_cannot_be_told(
    ask: Callable[..., Ran], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_brain", lambda x: (4 * x).round() / 4)
    found = answer(ask(engine), 1)
    assert found["verdict"] == "cannot tell"
    assert "kvtool promote, would show them" in found["conclusion"]


def test_another_vocabulary_is_no_verdict(
    kv: Callable[..., Ran], engine: FakeEngine, tmp_path: Path
) -> None:
    small = save_decoder(tmp_path / "small", vocab_size=265, context=fake_engine.CONTEXT)
    with served(engine, speaking_as(small)) as url:
        ran = kv("--server", url, "--model", str(small), command="verify-logits")
    assert "names token" in refused(ran) and "(the model has 265)" in ran.err


def test_people_get_the_largest_gaps_and_a_sentence(
    kv: Callable[..., Ran], engine: FakeEngine, folder: Path
) -> None:
    with served(engine, speaking_as(folder)) as url:
        ran = kv("--server", url, "--model", str(folder), command="verify-logits")
    assert ran.code == 0
    assert ran.out.startswith("llama.cpp against float64, the 8 largest gaps of 100")
    assert "agrees within its format's rounding at 100 positions" in ran.out


def test_a_server_that_is_not_there_is_one_line(kv: Callable[..., Ran], folder: Path) -> None:
    ran = kv("--server", "http://127.0.0.1:9", "--model", str(folder), command="verify-logits")
    assert "cannot be reached" in refused(ran)


def test_divergence_is_zero_for_the_same_and_counts_what_is_not_told_as_one() -> None:
    right = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64).log().numpy()
    same = dict(enumerate(right[:2].tolist()))
    assert divergence(right, same) < 1e-15
    other = {0: right[1], 1: right[0]}
    assert divergence(right, other) == pytest.approx(0.2 * (right[0] - right[1]))


def test_llama_cpp_agrees_with_the_file_that_it_serves_and_with_no_other(
    kv: Callable[..., Ran], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    path, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    for seed, file in enumerate((path, other)):
        Made(formats=("Q8_0", "Q4_1"), tokens=WORDS, seed=seed).write(file)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    given = ("--prompts", str(prompts), "--tokens", "8", "--json")
    with llama_server(path) as url:
        right, wrong = (
            kv("--server", url, "--model", str(model), *given, command="verify-logits")
            for model in (path, other)
        )
    found = answer(right)
    assert found["verdict"] == "agrees" and found["rounding"].startswith("activations of 8 bits")
    assert 0.05 < found["ratio"] < 2
    assert answer(wrong, 1)["verdict"] == "differs"


def test_the_gaps_are_drawn_beside_what_rounding_explains(
    ask: Callable[..., Ran], engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "kvtool.ui.noise_plot.save_figure", lambda figure, path: seen.append(figure)
    )
    page = tmp_path / "a.html"
    found = answer(ask(engine, "--plot", str(tmp_path / "a.png")))
    (figure,) = seen
    monkeypatch.undo()
    ask(engine, "--output", str(page))
    assert page.read_text().count("<svg") == 1
    assert [axes.get_title() for axes in figure.axes] == ["prompt 1: agrees", "prompt 2: agrees"]
    dots = [axes.lines[0].get_xydata() for axes in figure.axes]
    assert sum(map(len, dots)) == len(found["positions"])
    assert dots[0][0].tolist() == pytest.approx([
        found["positions"][0]["position"], max(found["positions"][0]["gap"], 1e-9)
    ])  # fmt: skip
    labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert labels == {"rounding", "a wrong token", "server against float64"}


def test_a_dry_run_names_the_requests_that_are_sent(
    ask: Callable[..., Ran], engine: FakeEngine
) -> None:
    planned = answer(ask(engine, "--dry-run"))
    assert [path for path, _, _ in engine.seen] == ["/props"]
    assert planned["schema"] == "kvtool.verify-logits.server.dry-run/1"
    engine.seen.clear()
    answer(ask(engine))
    sent = [(path, body.get("prompt", [])[:12]) for path, body, _ in engine.seen[1:]]
    asked = [(r["path"], r["body"].get("prompt", [])[:12]) for r in planned["requests"]]
    assert asked == sent
    assert {r["for"] for r in planned["requests"]} == {
        "whether the tokenizer is the same", "prompt 1", "prompt 2"
    }  # fmt: skip


def test_a_plot_that_could_not_be_written_is_refused_before_anything_is_asked(
    ask: Callable[..., Ran], engine: FakeEngine, tmp_path: Path
) -> None:
    said = refused(ask(engine, "--plot", str(tmp_path / "none" / "a.png")))
    assert "--plot" in said and engine.seen == []
