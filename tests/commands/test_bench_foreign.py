"""kvtool bench --impl transformers: causal models that only transformers has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import bench_cases
from cli_probe import Ran, refused
from kvtool.core.verify.hf.library import quiet_transformers
from kvtool.core.verify.hf.tiny import tiny_model
from small_models import answer

decoder, small_array, bench = bench_cases.decoder, bench_cases.small_array, bench_cases.bench
ALONE = ("--impl", "transformers", "--repeats", "1", "--json")


def test_a_type_is_built_tiny_and_measured_with_each_kind_and_setup(
    bench: Callable[..., Ran],
) -> None:
    words = ("--batch-size", "1", "2", "--dtype", "float32", "bfloat16")
    found = answer(bench(*ALONE, *words, model=Path("gemma3_text")))
    rows = found["measurements"]
    each = [(d, b) for d in ("float32", "bfloat16") for b in (1, 2)]
    assert [(r["cache"], r["dtype"], r["batch_size"]) for r in rows] == [
        (kind, *setup) for kind in ("none", "dynamic", "static") for setup in each
    ]
    assert {row["impl"] for row in rows} == {"transformers"}
    by = {(r["cache"], r["dtype"], r["batch_size"]): r["bytes_measured"] for r in rows}
    counts = 64  # bytes at most, of counts beside keys and values
    once = by["dynamic", "float32", 1]
    assert once > 2000 and abs(by["dynamic", "float32", 2] - 2 * once) <= counts
    assert abs(once - 2 * by["dynamic", "bfloat16", 1]) <= counts
    assert found["resolved"]["architecture"] == "Gemma3ForCausalLM"
    assert found["resolved"]["built"] == "tiny, with random weights"


def test_a_kind_that_a_type_cannot_do_is_named_in_one_line(bench: Callable[..., Ran]) -> None:
    ran = bench(*ALONE, model=Path("mamba"))
    rows = answer(ran)["measurements"]
    assert [row["cache"] for row in rows] == ["none", "dynamic"]
    assert rows[1]["bytes_measured"] > 0  # states count too
    (line,) = [line for line in ran.err.splitlines() if line.startswith("not measured")]
    assert line.startswith("not measured: static cache cannot be used: transformers declares none")
    assert f"N{line[1:]}." in answer(ran)["conclusion"]  # which --quiet leaves
    message = refused(bench(*ALONE, "--caches", "static", model=Path("mamba")))
    assert message.startswith("--model mamba: static cache cannot be used: transformers declares")


def test_a_folder_of_a_type_that_kvtool_has_not_is_read_by_transformers(
    bench: Callable[..., Ran], tmp_path: Path
) -> None:
    with quiet_transformers():
        tiny_model("bloom").model.save_pretrained(tmp_path)
    found = answer(bench(*ALONE, model=tmp_path))
    assert found["resolved"]["architecture"] == "BloomForCausalLM"
    assert len(found["resolved"]["sha256"]) == 64
    assert [row["cache"] for row in found["measurements"]] == ["none", "dynamic", "static"]
    assert "bloom" in refused(bench(model=tmp_path))  # kvtool does not read it


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("gemma3_txt", "", "--model gemma3_txt: is neither a folder nor a model type that"),
        ("t5", "", "--model t5: is an encoder-decoder of transformers (expected a causal model)"),
        ("bloom", "--lengths 9999", "--lengths 9999: behind --prompt-length 4 is beyond the"),
        ("bloom", "--n-kv-heads 2", "--n-kv-heads: is for models of kvtool"),
    ],
)
def test_what_cannot_be_measured_is_exit_2(
    bench: Callable[..., Ran], model: str, words: str, message: str
) -> None:
    ran = bench("--impl", "transformers", *words.split(), model=Path(model))
    assert refused(ran).startswith(message)
