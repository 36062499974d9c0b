"""kvtool verify-logits, as a user meets it."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cli_probe import Ran, refused
from kvtool.core.reference import reference
from kvtool.core.reference.reference import Reference
from kvtool.core.text.tokenizer import Tokenizer
from small_models import (
    answer,
    change_weights,
    explains_every_option,
    save_decoder,
    save_seq2seq,
    with_nan,
)

PROMPT = "Hear me."


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def verify(kv: Callable[..., Ran], decoder: Path) -> Callable[..., Ran]:
    def call(*args: str, model: Path = decoder) -> Ran:
        return kv(
            "--model",
            str(model),
            "--threads",
            "1",
            "--device",
            "cpu",
            *args,
            command="verify-logits",
        )

    return call


@pytest.fixture
def kept(verify: Callable[..., Ran], tmp_path: Path) -> str:
    """A reference of the decoder, made by the oracle."""
    path = tmp_path / "kept.safetensors"
    assert verify("--against", "numpy", "--prompt", PROMPT, "--save-reference", str(path)).code == 0
    return str(path)


# The answer is yes


def test_the_oracle_and_the_model_agree_and_a_sentence_says_so(verify: Callable[..., Ran]) -> None:
    ran = verify("--against", "numpy", "--prompt", PROMPT)
    assert ran.code == 0
    last = ran.out.splitlines()[-1]
    assert last.startswith("✓ rounding only: 8 positions agree with the NumPy oracle to ")
    assert last.endswith("in float64; top token the same at 8 of 8 in float32")


def test_a_blank_token_can_be_seen_in_the_table(verify: Callable[..., Ran]) -> None:
    assert " ' ' " in verify("--against", "numpy", "--prompt", PROMPT).out


def test_without_a_prompt_the_oracle_computes_three(verify: Callable[..., Ran]) -> None:
    found = answer(verify("--against", "numpy", "--json"))
    assert {row["prompt"] for row in found["positions"]} == {0, 1, 2}


def test_a_saved_reference_holds_what_the_oracle_said(
    verify: Callable[..., Ran], kept: str
) -> None:
    fresh = answer(verify("--against", "numpy", "--prompt", PROMPT, "--json"))
    found = answer(verify("--reference", kept, "--json"))
    assert found["against"] == "kept.safetensors"
    assert found["positions"] == fresh["positions"]
    assert [row["piece"] for row in found["positions"]] == list(PROMPT)


def test_the_models_own_reference_is_the_default(
    verify: Callable[..., Ran], decoder: Path, tmp_path: Path
) -> None:
    own = change_weights(decoder, tmp_path / "own", lambda weights: weights)
    given = ["--against", "numpy", "--save-reference", str(own / "reference.safetensors")]
    assert verify(*given).code == 0
    assert answer(verify("--json", model=own))["against"] == "reference.safetensors"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_dtype_is_compared_and_float64_decides(
    verify: Callable[..., Ran], kept: str, dtype: str
) -> None:
    for words in (["--reference", kept], ["--against", "numpy", "--prompt", PROMPT]):
        found = answer(verify(*words, "--dtype", dtype, "--json"))
        assert found["dtype"] == dtype
        assert found["worst_float64"] < 1e-14


def test_a_float32_npz_is_compared_as_exactly_as_it_is_stored(
    verify: Callable[..., Ran], kept: str, tmp_path: Path
) -> None:
    (right,) = reference.load(Path(kept))
    path = tmp_path / "r.npz"
    np.savez(path, ids=right.ids, logits=right.logits.astype(np.float32))
    found = answer(verify("--reference", str(path), "--json"))
    assert 1e-12 < found["worst_float64"] < found["tolerance_float64"] < 5e-6
    np.savez(path, ids=right.ids, logits=(right.logits * (1 + 1e-5)).astype(np.float32))
    found = answer(verify("--reference", str(path), "--json"), code=1)
    assert found["conclusion"].startswith("mismatch: ")


def test_the_reports_hold_a_row_for_every_position(
    verify: Callable[..., Ran], kept: str, tmp_path: Path
) -> None:
    for name in ("rows.csv", "rows.md"):
        path = tmp_path / name
        ran = verify("-q", "--reference", kept, "--output", str(path))
        assert (ran.code, ran.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
    assert [row["piece"] for row in rows] == list(PROMPT)
    written = (tmp_path / "rows.md").read_text()
    assert written.count("\n| ") == 2 + len(PROMPT)
    assert written.splitlines()[-1].startswith("rounding only: ")
    document = answer(verify("--reference", kept, "--json"))
    assert document["schema"] == "kvtool.verify-logits/1"
    assert document["settings"]["run"]["seed"] == 0


@pytest.mark.parametrize("columns", [80, 60])
def test_the_table_fits_the_terminal(
    verify: Callable[..., Ran], kept: str, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = verify("--reference", kept).out.splitlines()
    assert max(len(line.rstrip()) for line in lines[:-1]) <= columns


def test_the_help_explains_every_option(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert explains_every_option(kv("-h", command="verify-logits"), "verify-logits")


# The answer is no


def nudged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights["layers.1.attn.qkv.weight"][5, 3] += 1e-3
    return weights


def swapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return {other.get(name[:9], name[:9]) + name[9:]: value for name, value in weights.items()}


@pytest.mark.parametrize("change", [nudged, swapped])
def test_wrong_weights_are_exit_1_and_the_first_place_is_named(
    verify: Callable[..., Ran],
    decoder: Path,
    kept: str,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    ran = verify("--reference", kept, model=change_weights(decoder, tmp_path / "wrong", change))
    assert ran.code == 1
    last = ran.out.splitlines()[-1]
    assert last.startswith("✗ mismatch: ") and "also in float64" in last
    assert "first at prompt 0, position " in last


def test_a_wrong_last_position_is_named(verify: Callable[..., Ran], kept: str) -> None:
    (right,) = reference.load(Path(kept))
    right.logits[7, 4] += 1e-6
    reference.save(Path(kept), [right])
    ran = verify("--reference", kept)
    assert ran.code == 1
    assert "mismatch: 1 of 8 positions are wrong" in ran.out
    assert ran.out.splitlines()[-1].endswith("first at prompt 0, position 7")


def test_nan_weights_are_exit_1(
    verify: Callable[..., Ran], decoder: Path, kept: str, tmp_path: Path
) -> None:
    broken = change_weights(decoder, tmp_path / "nan", with_nan)
    for words in (["--reference", kept], ["--against", "numpy"]):
        ran = verify(*words, model=broken)
        assert (ran.code, ran.out) == (1, "")
        assert "layers.0.mlp.up.weight holds 1 NaN" in ran.err


def test_logits_that_overflow_the_working_dtype_are_no_rounding(
    verify: Callable[..., Ran], decoder: Path, tmp_path: Path
) -> None:
    def large(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**weights, "norm.weight": weights["norm.weight"] * 2.0**15}

    loud = change_weights(decoder, tmp_path / "loud", large)
    words = ["--against", "numpy", "--prompt", PROMPT]
    assert verify(*words, "--dtype", "float32", model=loud).code == 0
    ran = verify(*words, "--dtype", "float16", model=loud)
    assert ran.code == 1
    assert "positions are not finite in float16, first at prompt 0" in ran.out.splitlines()[-1]
    found = answer(verify(*words, "--dtype", "float16", "--json", model=loud), code=1)
    assert None in [row["max_difference"] for row in found["positions"]]


def test_another_tokenizer_is_a_mismatch(
    verify: Callable[..., Ran], decoder: Path, kept: str, tmp_path: Path
) -> None:
    other = change_weights(decoder, tmp_path / "other", lambda weights: weights)
    Tokenizer.train("bpe", [PROMPT * 9], 260, specials=False).save(other / "tokenizer.json")
    ran = verify("--reference", kept, model=other)
    assert ran.code == 1
    assert "mismatch: the tokenizer makes other tokens" in ran.out.splitlines()[-1]


# What cannot be compared


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--against torch",
            "--against: 'torch' is not known (expected one of numpy, transformers)",
        ),
        ("--against numpy --reference a.npz", "--reference: contradicts --against"),
        ("--prompt x", "--prompt: needs --against"),
        ("--save-reference a.safetensors", "--save-reference: needs --against"),
        ("--against numpy --save-reference a.npz", "--save-reference a.npz: .npz (expected"),
        ("--against numpy --save-reference no/a.safetensors", "--save-reference no/a.safetensors:"),
        ("--against numpy --prompt=", "--prompt: is empty"),
        ("--reference a.npz", "--reference a.npz: not found (expected reference logits)"),
        ("--device cuda", "--device cuda: there is no CUDA device here"),
    ],
)
def test_wrong_usage_is_exit_2(
    verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(verify(*words.split())).startswith(message)


def test_a_model_of_transformers_agrees_with_the_oracle(verify: Callable[..., Ran]) -> None:
    pytest.importorskip("transformers")
    ran = verify("--against", "transformers", "--prompt", "To be")
    assert ran.code == 0
    assert "positions agree with transformers' model to" in ran.out


def test_a_missing_transformers_is_named(
    verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refused(verify("--against", "transformers"))
    assert message.startswith("--against transformers: transformers is not installed")
    assert "pip install 'kvtool[hf]'" in message


def test_a_prompt_longer_than_the_context_is_refused(verify: Callable[..., Ran]) -> None:
    message = refused(verify("--against", "numpy", "--prompt", "x" * 65))
    assert message == "--prompt: is 65 tokens long (the model holds 64)"


def test_a_model_without_a_reference_gets_the_ways_to_have_one(verify: Callable[..., Ran]) -> None:
    message = refused(verify())
    assert "reference.safetensors: not found, so the model has no reference of its own" in message
    assert message.endswith("or --against numpy to compute one now.")


def test_a_reference_of_another_vocabulary_or_length_is_exit_2(
    verify: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "r.safetensors"
    for found in (Reference([1], np.zeros((1, 99))), Reference([1] * 65, np.zeros((65, 260)))):
        reference.save(path, [found])
        assert refused(verify("--reference", str(path))).startswith("--reference: ")


def test_an_encoder_decoder_is_refused_whatever_the_reference(
    verify: Callable[..., Ran], tmp_path: Path
) -> None:
    model = save_seq2seq(tmp_path / "seq2seq", vocab_size=40)
    path = tmp_path / "r.safetensors"
    reference.save(path, [Reference([1, 2], np.zeros((2, 40)))])
    for words in (["--against", "numpy"], ["--reference", str(path)], []):
        message = refused(verify(*words, model=model))
        assert message.startswith("--model: is an encoder-decoder")
        assert message.endswith("use verify-cache.")


@pytest.mark.parametrize("broken", ["pickled", "cut"])
def test_a_broken_reference_is_exit_2(
    verify: Callable[..., Ran], kept: str, tmp_path: Path, broken: str
) -> None:
    path = tmp_path / "r.npz"
    if broken == "pickled":
        np.savez(path, ids=np.array([object()]), logits=np.zeros((1, 260)))
    else:
        path = Path(kept)
        path.write_bytes(path.read_bytes()[:-8])
    assert refused(verify("--reference", str(path))).startswith(str(path))


@pytest.mark.parametrize("context", [8, 56])  # that hold none of them, and some
def test_texts_that_nobody_asked_for_fit_a_short_context(
    context: int, kv: Callable[..., Ran], tmp_path: Path
) -> None:
    folder = save_decoder(tmp_path, context=context)
    ran = kv("--model", str(folder), "--against", "numpy", command="verify-logits")
    assert ran.code == 0
    assert f"texts left out: the model holds {context} tokens" in ran.err
