"""A prompt's cache in a file: what is saved, who may load it, and that nothing changes by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cli_probe import Ran, refused
from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.decoding import prompt_cache as cache_file
from kvtool.core.decoding.engine import feed
from kvtool.core.decoding.prompt_cache import Origin, common_prefix, load_cache, save_cache
from kvtool.errors import CacheOpUnsupported, FileError
from small_models import answer, change_weights, random_model, save_decoder, save_seq2seq

WHOLE = ("dynamic", "static", "paged")  # the kinds that store all that the model computes
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
CONFIG = random_model(context=64).config.to_dict()
ORIGIN = Origin("ab" * 32, CONFIG, "cd" * 32)
PROMPT, N_PROMPT = "abacus beach", 10  # tokens of the small tokenizer


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def generate(kv: Callable[..., Ran], decoder: Path) -> Callable[..., Ran]:
    def call(*args: str, model: Path = decoder) -> Ran:
        given = ["--model", str(model), "--threads", "1", "--device", "cpu", "--temperature", "0"]
        return kv(*given, "--max-tokens", "6", *args, command="generate")

    return call


@pytest.fixture
def spec() -> CacheSpec:
    return CacheSpec.of(random_model(context=64).config, 1, 20)


@pytest.fixture
def saved(tmp_path: Path, spec: CacheSpec) -> Path:
    path = tmp_path / "prompt.safetensors"
    cache = make_cache("dynamic", spec)
    feed(random_model(context=64), cache, torch.tensor([IDS]))
    save_cache(path, cache, IDS, ORIGIN)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    return cache_file.SafetensorsFile(path).metadata


def changed(path: Path, **metadata: str) -> Path:
    """The file with other metadata."""
    tensors = safetensors.torch.load(path.read_bytes())
    path.write_bytes(safetensors.torch.save(tensors, {**metadata_of(path), **metadata}))
    return path


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("n", [1, 5, 8])
def test_a_filled_cache_holds_what_was_saved(
    saved: Path, spec: CacheSpec, kind: str, n: int
) -> None:
    model, cache = random_model(context=64), make_cache(kind, spec)
    load_cache(saved, spec, ORIGIN).fill(cache, n)
    assert cache.length == n
    ids = torch.tensor([[*IDS[:n], 7, 7]])
    fresh = make_cache(kind, spec)
    feed(model, fresh, ids[:, :n])
    torch.testing.assert_close(feed(model, cache, ids), feed(model, fresh, ids))


@pytest.mark.parametrize("kind", ["none", "sliding", "int8", "int4"])
def test_a_kind_that_does_not_store_everything_is_refused(
    saved: Path, tmp_path: Path, spec: CacheSpec, kind: str
) -> None:
    cache = make_cache(kind, spec)
    with pytest.raises(CacheOpUnsupported, match=f"{kind} cache cannot be saved"):
        save_cache(tmp_path / "x", cache, IDS, ORIGIN)
    with pytest.raises(CacheOpUnsupported, match=f"{kind} cache cannot be filled from a file"):
        load_cache(saved, spec, ORIGIN).fill(cache, 3)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "is not a saved cache"),
        ({"format": "kvtool.cache/1"}, "is of an older kvtool, and does not say of what config"),
        ({"sha256": "ef" * 32}, "with other weights (SHA-256 efefefefefef..., expected abababab"),
        ({"tokenizer": "ef"}, "with other rules of the tokenizer (SHA-256 ef..., expected cdcdcd"),
        ({"config": "{"}, "is damaged (its configuration is no object)"),
        ({"config": "[]"}, "is damaged (its configuration is no object)"),
        ({"config": json.dumps({**CONFIG, "norm_eps": 0.1})}, "norm_eps was 0.1 and is now 1e-05"),
        ({"config": json.dumps({**CONFIG, "window": 9})}, "window was 9 and is now None"),
        (
            {"config": json.dumps({**CONFIG, "norm": "x", "tied": 3, "rope_theta": 2})},
            "another configuration: norm was 'x' and is now 'layernorm', and 2 more. Save it again",
        ),
        ({"ids": "[1, 2, 1e400]"}, "its tokens are no list of whole numbers"),
        ({"ids": f"[{'9' * 5000}]"}, "its tokens are no list of whole numbers"),
        ({"ids": "[" * 10**5}, "its tokens are no list of whole numbers"),
        ({"ids": "[3, 1, 4, 1, 5, 9, 2, 23]"}, "its tokens are not all within 0 to 22"),
        ({"ids": "[3, 1, 4, 1, 5, 9, 2, -1]"}, "its tokens are not all within 0 to 22"),
        ({"ids": json.dumps([1] * 65)}, "holds 65 tokens (the model holds 64)"),
        ({"ids": "[1, 2"}, "its tokens are no list of whole numbers"),
        ({"ids": "[]"}, "its tokens are no list of whole numbers"),
        ({"ids": "[true]"}, "its tokens are no list of whole numbers"),
        ({"ids": "[1, 2]"}, "tensor k.0 has the shape [4, 8, 4] (expected [4, 2, 4])"),
    ],
)
def test_a_file_of_another_model_or_a_damaged_one_is_refused(
    saved: Path, spec: CacheSpec, metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(FileError) as caught:
        load_cache(changed(saved, **metadata), spec, ORIGIN)
    assert message in str(caught.value) and str(saved) in str(caught.value)


def altered(path: Path, **tensors: Any) -> Path:
    """The file with other tensors; None takes one away."""
    found = {**safetensors.torch.load(path.read_bytes()), **tensors}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    path.write_bytes(safetensors.torch.save(kept, metadata_of(path)))
    return path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"v.1": None}, "tensor v.1 is missing"),
        ({"k.7": torch.zeros(4, 8, 4)}, "tensor k.7 is unknown"),
        ({"k.1": torch.full((4, 8, 4), float("nan"))}, "tensor k.1 holds NaN"),
        ({"k.0": torch.zeros(4, 8, 4, dtype=torch.float64)}, "holds float64 (expected float32)"),
    ],
)
def test_tensors_that_are_not_those_of_the_model_are_named(
    saved: Path, spec: CacheSpec, tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(FileError) as caught:
        load_cache(altered(saved, **tensors), spec, ORIGIN)
    assert message in str(caught.value)


def test_two_texts_share_tokens_up_to_the_first_that_differs() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1], [1, 2]) == 1
    assert common_prefix([2], [1]) == common_prefix([], [1]) == 0


# As a user meets it


@pytest.mark.parametrize("kind", WHOLE)
def test_a_prompt_from_a_file_gives_the_same_text(
    generate: Callable[..., Ran], tmp_path: Path, kind: str
) -> None:
    path = str(tmp_path / "prompt")
    first = generate("--prompt", PROMPT, "--save-cache", path)
    again = generate("--prompt", PROMPT, "--load-cache", path, "--cache", kind)
    longer = generate("--prompt", PROMPT + "es", "--load-cache", path, "--cache", kind)
    assert first.code == again.code == longer.code == 0
    assert again.out == first.out
    assert longer.out == generate("--prompt", PROMPT + "es").out
    n = N_PROMPT
    assert f"the prompt's cache: {path}" in first.err
    assert f"{n - 1} of {n} prompt tokens from {path}" in again.err
    assert f"{n} of {n + 2} prompt tokens from {path}" in longer.err, longer.err


def test_a_prompt_that_starts_otherwise_is_said_and_computed(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    path = str(tmp_path / "prompt")
    generate("--prompt", PROMPT, "--save-cache", path)
    ran = generate("--prompt", "wren", "--load-cache", path)
    assert ran.out == generate("--prompt", "wren").out
    assert "warning: --load-cache" in ran.err and "does not start as that one" in ran.err


def test_the_file_is_written_before_the_text_is_finished(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "prompt"
    generate("--prompt", PROMPT, "--save-cache", str(path), "--max-tokens", "1")
    assert len(json.loads(cache_file.SafetensorsFile(path).metadata["ids"])) == N_PROMPT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--save-cache p --input lines", "--save-cache: contradicts --input"),
        ("--prompt a --load-cache p --beams 2", "--load-cache: contradicts --beams"),
        (
            "--prompt a --load-cache none/p",
            "--load-cache none/p: not found (expected a saved cache). The folder",
        ),
        ("--prompt a --load-cache .", "--load-cache .: is a folder (expected a saved cache)"),
        ("--prompt a --save-cache none/p", "--save-cache none/p: the folder "),
        ("--prompt a --save-cache p --cache int8", "int8 cache cannot be saved"),
        ("--prompt a --load-cache lines --cache sliding", "sliding cache cannot be filled"),
        (
            "--prompt a --load-cache lines",
            "--load-cache lines: is cut short or no",
        ),
    ],
)
def test_what_cannot_be_saved_or_loaded_is_exit_2_before_any_work(
    generate: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lines").write_text("a\n")
    assert refused(generate(*words.split())).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


def test_a_cache_is_of_one_configuration_and_one_tokenizer(
    generate: Callable[..., Ran], decoder: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "prompt")
    generate("--prompt", PROMPT, "--save-cache", path)

    def changed_model(name: str, file: str, change: Callable[[dict[str, Any]], None]) -> Path:
        other = shutil.copytree(decoder, tmp_path / name)
        data = json.loads((other / file).read_text())
        change(data)
        (other / file).write_text(json.dumps(data))
        return other

    def split_otherwise(data: dict[str, Any]) -> None:
        data["pre_tokenizer"]["use_regex"] = False

    eps = changed_model("eps", "config.json", lambda data: data.update(norm_eps=0.5))
    found = refused(generate("--prompt", PROMPT, "--load-cache", path, model=eps))
    assert "another configuration: norm_eps was 1e-05 and is now 0.5. Save it again" in found
    rules = changed_model("rules", "tokenizer.json", split_otherwise)
    found = refused(generate("--prompt", PROMPT, "--load-cache", path, model=rules))
    assert "was computed with other rules of the tokenizer (SHA-256 " in found
    same = changed_model("same", "config.json", lambda data: None)
    assert generate("--prompt", PROMPT, "--load-cache", path, model=same).code == 0


def test_values_that_no_model_computed_are_no_verdict_on_the_model(
    generate: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "prompt"
    generate("--prompt", PROMPT, "--save-cache", str(path))
    tensors = safetensors.torch.load(path.read_bytes())
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in tensors.items()}
    message = refused(generate("--prompt", PROMPT, "--load-cache", str(altered(path, **huge))))
    assert message.startswith(f"--load-cache {path}: step 0: the logits are not finite. Leave it")


def test_another_model_or_an_encoder_decoder_is_refused(
    generate: Callable[..., Ran], decoder: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "prompt")
    generate("--prompt", PROMPT, "--save-cache", path)
    other = change_weights(
        decoder, tmp_path / "other", lambda weights: {k: v * 0.5 for k, v in weights.items()}
    )
    message = refused(generate("--prompt", PROMPT, "--load-cache", path, model=other))
    assert "was computed with other weights" in message
    pairs = save_seq2seq(tmp_path / "pairs")
    message = refused(generate("--prompt", "a", "--load-cache", path, model=pairs))
    assert message.startswith(f"--load-cache: {pairs} is an encoder-decoder")


def test_the_document_says_what_was_reused(generate: Callable[..., Ran], tmp_path: Path) -> None:
    path = str(tmp_path / "prompt")
    generate("--prompt", PROMPT, "--save-cache", path)
    found = answer(generate("--prompt", PROMPT, "--load-cache", path, "--json"))
    assert found["reused_tokens"] == N_PROMPT - 1
