"""A model whose weights the processes of torchrun share: what is said of it, by whom, and what
becomes of all if one fails.

Started by torchrun's own module, as users start it, from processes that have loaded torch.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli_probe import HANGS, Ran
from kvtool.core.training.team import Share, Team
from kvtool.core.verify.hf.shared import shared_out
from kvtool.errors import UsageError, lost_a_process, pass_on_shortage
from kvtool.ui.problems import explain_machine

transformers = pytest.importorskip("transformers")

LAUNCHER = "torch.distributed.run"
PROGRAM = Path(__file__).parents[1] / "support" / "shared_model.py"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CPU = torch.device("cpu")
LOST = (
    "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding is tied, so that a weight has two places in the plan."""
    path = tmp_path_factory.mktemp("shared") / "tied"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def start(folder: Path, warm_python: Callable[..., str]) -> Callable[..., subprocess.Popen[str]]:
    python = warm_python(LAUNCHER, "transformers.models.llama.modeling_llama")

    def call(how: str, *args: str) -> subprocess.Popen[str]:
        launch = ["-m", LAUNCHER, "--standalone", "--nproc-per-node=2", str(PROGRAM), how]
        given = ["--impl", "transformers", "--model", str(folder), "--device", "cpu", *args]
        return subprocess.Popen(
            [python, *launch, "verify-cache", *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python},
        )

    return call


def test_two_processes_judge_the_model_that_they_share_and_one_tells_it(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    report, rows = tmp_path / "report.json", tmp_path / "rows.jsonl"
    asked = ["--caches", "dynamic", "static", "--scenarios", "chunks", "prompts"]
    files = ["--output", str(report), "--resume", str(rows)]
    process = start("widens", *asked, "--dtype", "bfloat16", *files)
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    assert stdout.count("the planted bug was found") == 1
    assert stderr.count("2 processes share the weights") == stderr.count("written to") == 1
    assert stderr.count("widened") == 2  # where the leader says so, every process does
    found = json.loads(report.read_text())
    assert found["resolved"]["processes"] == 2
    assert found["resolved"]["parameters"] == 96 * 32 + 2 * 32 * (32 * 3 + 64 * 3 + 2) + 32
    checks = found["checks"]
    assert len(checks) == 4 and all(row["right"] and row["steps"] for row in checks)
    gaps = [row["gap_float64"] for row in checks if row["gap_float64"] is not None]
    assert gaps and max(gaps) < 1e-15
    assert len(rows.read_text().splitlines()) == 1 + len(checks)


def test_what_fails_in_one_process_is_told_once_and_ends_all(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start("fails", "--caches", "dynamic")
    _, stderr = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert stderr.count("kvtool: error: shard 2: cannot be read") == 1
    assert "SIGKILL" not in stderr  # nobody had to be killed after half a minute of waiting


@pytest.mark.parametrize("args", [[], ["--impl", "transformers", "--model", "qwen3"]])
def test_processes_that_would_each_judge_the_same_are_refused(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    ran = kv(*args, command="verify-cache")
    assert ran.code == 2 and "--impl transformers --model FOLDER" in ran.err


def test_a_number_of_processes_that_splits_heads_is_refused() -> None:
    whole = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with pytest.raises(UsageError, match="4 processes cannot share 2 num_key_value_heads"):
        shared_out(whole, CPU, torch.float32, Team(Share(0, 4)))


def test_a_model_that_transformers_has_no_plan_for_is_refused() -> None:
    config = transformers.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    with pytest.raises(UsageError, match="GPT2LMHeadModel has no tp_plan"):
        shared_out(transformers.GPT2LMHeadModel(config), CPU, torch.float32, Team(Share(0, 2)))


def test_that_another_process_ended_says_nothing_of_the_code_that_waited_for_it() -> None:
    error = RuntimeError(LOST)
    with pytest.raises(RuntimeError):
        pass_on_shortage(error)
    told = explain_machine(error)
    assert told is not None and "another process" in told.message
    assert not lost_a_process(RuntimeError("Connection closed by peer"))  # of whom?
