"""kvtool bench --impl: transformers' own generate beside ours, on the same weights."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import bench_cases
import family_cases
from cli_probe import Ran, refused
from kvtool.commands.bench.compare import FOLDER
from kvtool.core.bench import peers, timing
from kvtool.core.bench.peers import Agreement, TransformersGenerate, agreement, load_peer
from kvtool.core.checkpoint import checkpoint
from kvtool.errors import CheckFailed
from kvtool.ui import plots
from small_models import answer, save_decoder, save_seq2seq

decoder, small_array, bench = (
    bench_cases.decoder,
    bench_cases.small_array,
    bench_cases.bench,
)
BOTH = ("--impl", "kvtool", "transformers")
PROMPT = 4  # tokens, as `bench` asks for


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[str], Path]:
    return lambda case: family_cases.save(
        family_cases.build(family_cases.CASES[case]).float(), tmp_path / case
    )


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that a run takes, by implementation; nothing is timed."""
    seconds = {"kvtool": 1.0, "transformers": 2.0}
    for impl, work in (("kvtool", timing.Workload), ("transformers", TransformersGenerate)):

        def run(self: Any, kind: str, length: int, impl: str = impl) -> timing.TimedRun:
            taken = seconds[impl] * (3 if kind == "none" else 1)
            return timing.TimedRun(taken, 0.0, taken, taken / length, 8, 8)

        monkeypatch.setattr(work, "run", run)
    return seconds


def contenders(document: dict[str, Any]) -> list[tuple[str, str]]:
    return [(row["cache"], row["impl"]) for row in document["measurements"]]


def pair(folder: Path) -> tuple[timing.Workload, Any]:
    """Our work on a folder of Hugging Face, and transformers' model of it."""
    loaded = checkpoint.load(str(folder), torch.device("cpu"), torch.float32)
    prompt = torch.randint(loaded.config.vocab_size, (2, 9), generator=torch.manual_seed(0))
    return timing.Workload(loaded.model, prompt), load_peer(folder, loaded.model)


# Who is measured


def test_only_kvtool_is_measured_unless_more_is_asked_for(bench: Callable[..., Ran]) -> None:
    found = answer(bench("--json"))
    assert contenders(found) == [(kind, "kvtool") for kind in ("none", "dynamic", "static")]
    assert found["settings"]["impl"] == ["kvtool"]
    assert "transformers" not in found["resolved"]
    assert "impl" not in bench().out


def test_both_take_turns_on_each_kind(
    bench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    visited = []
    for impl, work in (("kvtool", timing.Workload), ("transformers", TransformersGenerate)):

        def run(
            self: Any, kind: str, n: int, impl: str = impl, real: Any = work.run
        ) -> timing.TimedRun:
            visited.append((kind, impl))
            return real(self, kind, n)

        monkeypatch.setattr(work, "run", run)
    found = answer(bench(*BOTH, "--json", "--repeats", "2"))
    turn = [(kind, i) for kind in ("none", "dynamic", "static") for i in BOTH[1:]]
    assert contenders(found) == turn
    visit = turn[2:] + turn[:2]  # what keeps nothing comes last
    assert visited[-2 * len(turn) :] == visit + visit
    assert all(len(row["samples_s"]) == 2 for row in found["measurements"])


def test_transformers_can_be_measured_alone(bench: Callable[..., Ran]) -> None:
    ran = bench("--impl", "transformers", "--json")
    assert contenders(answer(ran)) == [(k, "transformers") for k in ("none", "dynamic", "static")]
    assert "impl" not in bench("--impl", "transformers").out


def test_kinds_that_transformers_has_not_are_left_out_and_said(bench: Callable[..., Ran]) -> None:
    ran = bench(*BOTH, "--caches", "dynamic", "paged", "--json", "--repeats", "1")
    names = [("dynamic", "kvtool"), ("dynamic", "transformers"), ("paged", "kvtool")]
    assert contenders(answer(ran)) == names
    assert "transformers: not measured with paged" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--impl transformer", "--impl: 'transformer' is not known"),
        ("--impl", "--impl: needs at least one value, e.g. --impl kvtool transformers"),
        (
            "--impl transformers --caches dynamic paged",
            "--caches: paged is no kind of transformers (expected none, dynamic, static)",
        ),
        ("--impl kvtool transformers --caches int8", "--caches: int8 is no kind of transformers"),
        ("--impl transformers --kernels exact", "--kernels: exact kernels are kvtool's"),
    ],
)
def test_what_transformers_cannot_do_is_exit_2(
    bench: Callable[..., Ran], words: str, message: str
) -> None:
    assert refused(bench(*words.split())).startswith(message)


def test_models_that_transformers_has_not_are_exit_2_with_a_way_out(
    bench: Callable[..., Ran], tmp_path: Path
) -> None:
    mixed = save_decoder(tmp_path / "mixed", positions="rotary", activation="swiglu")
    for model in (mixed, save_seq2seq(tmp_path / "seq2seq")):
        message = refused(bench(*BOTH, model=model))
        assert message.startswith("--impl transformers: this mixture of positions, norm")
        assert message.endswith("Leave it out, or give --model a folder of Hugging Face.")


def test_weights_of_a_name_that_only_kvtool_reads_are_handed_to_transformers_too(
    bench: Callable[..., Ran], folders: Callable[[str], Path]
) -> None:
    folder = folders("gpt2")
    weights = folder / "model.safetensors"
    torch.save(safetensors.torch.load_file(weights), folder / "model.pt")
    weights.unlink()
    found = answer(bench(*BOTH, "--json", model=folder))["resolved"]
    assert found["agreement"]["same"] == 16


def test_without_transformers_the_message_says_what_to_install(
    bench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = refused(bench(*BOTH))
    assert message.startswith("--impl transformers: transformers is not installed. Install it with")


# The same work


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in ("gpt2", "llama, yarn", "qwen2") for kind in ("none", "static")]
    + [("mistral, window", "dynamic"), ("qwen3, biases and window", "dynamic")],
)
def test_a_folder_is_read_by_both_and_generates_the_same_tokens(
    case: str, kind: str, folders: Callable[[str], Path]
) -> None:
    ours, model = pair(folders(case))
    found = agreement(ours, TransformersGenerate(model, ours.prompt), [kind])
    assert (found.tokens, found.same, found.margin) == (2 * 16, 2 * 16, None)
    assert found.gap < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_checkpoint_of_kvtool_becomes_a_model_of_transformers(
    bench: Callable[..., Ran], dtype: str
) -> None:
    ran = bench(*BOTH, "--json", "--dtype", dtype, "--repeats", "1", "--batch-size", "2")
    resolved = answer(ran)["resolved"]
    found = resolved["agreement"]
    assert resolved["architecture"] == "GPT2LMHeadModel" and resolved["transformers"]
    assert found["tokens"] == found["same"] == 2 * 16 and found["gap"] < 1e-5
    assert "GPT2LMHeadModel: the same 32 greedy tokens as kvtool in float32" in ran.err


def test_other_key_value_heads_are_the_same_random_weights_for_both(
    bench: Callable[..., Ran], tmp_path: Path
) -> None:
    llama = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
    model = save_decoder(tmp_path, **llama)
    ran = bench(*BOTH, "--n-kv-heads", "2", "--json", "--repeats", "1", model=model)
    assert answer(ran)["resolved"]["agreement"]["same"] == 16
    *_, dynamic, _, static, _ = answer(ran)["measurements"]
    assert dynamic["bytes_measured"] == static["bytes_measured"] == 2 * 2 * (4 + 3) * 8 * 4


def test_a_generation_that_would_end_or_be_penalised_is_neither(
    folders: Callable[[str], Path],
) -> None:
    folder = folders("llama")
    ours, model = pair(folder)
    tokens = TransformersGenerate(model, ours.prompt).tokens("dynamic", 20)
    settings = {"eos_token_id": tokens[:, 3].tolist(), "repetition_penalty": 9.0, "top_k": 5}
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True}))
    _, other = pair(folder)
    again = TransformersGenerate(other, ours.prompt)
    assert again.tokens("dynamic", 20).equal(tokens) and tokens.shape == (2, 20)
    assert again.run("static", 20).decode_s > 0


def test_other_weights_are_exit_1_before_anything_is_timed(
    bench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = peers.load_peer

    def perturbed(*args: Any) -> Any:
        model = real(*args)
        model.transformer.h[0].mlp.c_fc.bias += 0.1
        return model

    monkeypatch.setattr(peers, "load_peer", perturbed)
    monkeypatch.setattr(timing, "Measurement", None)  # calling it would fail
    ran = bench(*BOTH)
    assert ran.code == 1 and ran.err.count("\n") == 1
    assert ran.err.startswith("kvtool: error: --impl transformers: generates something else than")
    assert "verify-logits --against transformers" in ran.err


def test_tokens_that_part_at_a_tie_are_told_and_others_are_an_error(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' second token of row 1 is replaced: by one whose logit is as high, or lower."""
    ours, model = pair(folders("llama"))
    theirs, real = TransformersGenerate(model, ours.prompt), TransformersGenerate.tokens

    def changed(self: Any, kind: str, n: int) -> torch.Tensor:
        tokens = real(self, kind, n).clone()
        tokens[1, 1] = (tokens[1, 1] + 1) % family_cases.VOCAB
        return tokens

    monkeypatch.setattr(TransformersGenerate, "tokens", changed)
    with pytest.raises(CheckFailed, match="17 of 32 greedy tokens as kvtool, up to two tokens"):
        agreement(ours, theirs, ["static"])
    monkeypatch.setattr(
        TransformersGenerate,
        "tokens",
        lambda self, kind, n: (changed if kind == "none" else real)(self, kind, n),
    )
    with pytest.raises(CheckFailed, match="17 of 32"):  # one wrong kind among right ones
        agreement(ours, theirs, ["dynamic", "none", "static"])
    logits = torch.tensor([[[0.0, 2.0, 1.0], [4.0, 1.0, 3.0]]])
    assert peers._first_differences(torch.tensor([[1, 0]]), torch.tensor([[1, 2]]), logits) == (
        1,
        0.25,
    )
    tie = Agreement(32, 17, 1e-6, 2e-7)
    assert tie.right and "17 of 32 greedy tokens" in str(tie) and "2.0e-07 apart" in str(tie)
    assert not Agreement(32, 32, 1e-3, None).right and not Agreement(32, 17, 1e-6, 1e-3).right


# What is reported


def test_bytes_are_those_of_the_tensors_and_what_is_not_known_is_null(
    bench: Callable[..., Ran],
) -> None:
    found = answer(bench("--impl", "transformers", "--json", "--lengths", "3", "9"))
    token = 2 * 16 * 4  # keys and values of one layer, in float32
    by_cell = {(r["cache"], r["length"]): r for r in found["measurements"]}
    for n in (3, 9):
        assert by_cell["none", n]["bytes_measured"] == 0
        assert by_cell["dynamic", n]["bytes_measured"] == (PROMPT + n - 1) * token
        # The buffers, and a count beside them.
        assert 0 <= by_cell["static", n]["bytes_measured"] - (PROMPT + n) * token <= 16
        assert (
            by_cell["static", n]["bytes_predicted"] is by_cell["static", n]["token_bytes"] is None
        )
        assert by_cell["dynamic", n]["prefill_s"] > 0 and by_cell["dynamic", n]["token_s"] > 0


def test_behind_a_depth_only_the_decoding_is_a_sample(folders: Callable[[str], Path]) -> None:
    ours, model = pair(folders("gpt2"))
    whole = TransformersGenerate(model, ours.prompt).run("dynamic", 5)
    assert whole.seconds == whole.prefill_s + whole.decode_s
    deep = TransformersGenerate(model, ours.prompt, decode_only=True).run("dynamic", 5)
    assert deep.seconds == deep.decode_s
    assert deep.nbytes - whole.nbytes == whole.nbytes // (9 + 5 - 1)  # one token more


def test_the_first_token_ends_the_prefill_and_the_last_the_decoding(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that ticks each time it is read: at the start, with the prompt, with each token."""
    ours, model = pair(folders("gpt2"))
    ticks = itertools.count(1.0)
    monkeypatch.setattr(peers, "now", lambda device: next(ticks))
    found = TransformersGenerate(model, ours.prompt).run("dynamic", 5)
    assert (found.prefill_s, found.decode_s, found.token_s) == (2.0, 4.0, 1.0)


def test_the_table_names_the_implementations_and_the_end_compares_them(
    bench: Callable[..., Ran], pace: dict[str, float]
) -> None:
    out = bench(*BOTH, "--caches", "none", "static", "--lengths", "3", "9").out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("9")]
    assert [row[:3] for row in rows[:4]] == [
        ["9", kind, impl] for kind in ("none", "static") for impl in BOTH[1:]
    ]
    assert [row[7] for row in rows[:4]] == ["1.00x", "1.00x", "3.00x", "3.00x"]
    assert "kvtool static and transformers static pay from 3 tokens on" in out
    end = "At 9 tokens kvtool is faster than transformers by a factor of 2.00 without a cache and "
    assert f"{end}2.00 with static." in out
    pace["kvtool"] = 8.0
    out = bench(*BOTH, "--caches", "static").out
    assert "At 3 tokens transformers is faster than kvtool by a factor of 4.00 with static." in out


@pytest.mark.parametrize("columns", [80, 60])
def test_the_table_fits_the_terminal(
    bench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    tables = bench(*BOTH).out.partition("Memory was read")[0]
    assert "predicted KiB)" in tables
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= columns


def test_the_plot_has_a_line_for_each_implementation_and_kind(
    bench: Callable[..., Ran],
    pace: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_: figures.append(figure))
    bench(*BOTH, "--caches", "none", "static", "--plot", str(tmp_path / "a.png"))
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    names = [f"{impl}, {what}" for what in ("no cache", "static cache") for impl in BOTH[1:]]
    assert list(lines) == names
    assert [lines[name].get_linestyle() for name in names] == ["-", "--", "-", "--"]
    colours = [lines[name].get_color() for name in names]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == names


# Against an earlier run


@pytest.fixture
def words(
    bench: Callable[..., Ran],
    pace: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> tuple[str, ...]:
    """What was asked for in the run that is kept as "before"."""
    monkeypatch.chdir(tmp_path)
    words = (*BOTH, "--caches", "static")
    bench(*words, "--save", "before")
    return words


def test_a_run_is_compared_row_by_row_of_the_same_implementation(
    bench: Callable[..., Ran], pace: dict[str, float], words: tuple[str, ...]
) -> None:
    pace["transformers"] = 3.0
    found = answer(bench(*words, "--compare", "before", "--json"))
    assert [(c["impl"], c["before_s"], c["now_s"]) for c in found["changes"]] == [
        ("kvtool", 1.0, 1.0),
        ("transformers", 2.0, 3.0),
    ]
    ran = bench(*words, "--compare", "before", "--fail-if", "median:10%")
    assert ran.code == 1 and "transformers static at 3 tokens: median" in ran.out
    assert ["3", "transformers", "static", "2,000.0", "3,000.0", "+50.0%"] in [
        line.split() for line in ran.out.splitlines()
    ]
    kvtools = ("--caches", "static", "--compare", "before", "--fail-if", "median:10%")
    ran = bench(*kvtools)  # its rows alone; another version of transformers would not matter
    assert (ran.code, ran.err) == (0, "")


def test_another_version_of_transformers_is_another_condition_and_old_runs_are_kvtools(
    bench: Callable[..., Ran], words: tuple[str, ...]
) -> None:
    path = FOLDER / "before.json"
    content = json.loads(path.read_text())
    version, content["resolved"]["transformers"] = content["resolved"]["transformers"], "4.0"
    path.write_text(json.dumps(content))
    message = refused(bench(*words, "--compare", "before", "--fail-if", "min:1%"))
    assert f"transformers was 4.0 and is {version}" in message
    content["measurements"] = content["measurements"][:1]
    del content["measurements"][0]["impl"]
    path.write_text(json.dumps(content))
    found = answer(bench(*words, "--compare", "before", "--json"))
    assert [change["impl"] for change in found["changes"]] == ["kvtool"]
