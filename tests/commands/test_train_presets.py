"""The presets of train-seq2seq: they set what a command line leaves out, and nothing else."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import training_commands as commands
from kvtool.commands.train.options import train_length
from kvtool.commands.train.presets import PRESETS
from kvtool.commands.train.seq2seq import command
from kvtool.config import TrainLength
from small_models import answer
from training_commands import Command

tsv, seq2seq = commands.tsv, commands.seq2seq
NAMES = {"encoder_layers": "n_encoder_layers", "decoder_layers": "n_layers", "heads": "n_heads"}
GIVEN = {"dropout": 0.5, "steps": 2, "d_model": 16, "heads": 2}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_sets_the_options_that_are_not_given(
    kv: Command, tsv: Path, tmp_path: Path, name: str
) -> None:
    preset = PRESETS[name].options
    assert set(preset) <= set(inspect.signature(command).parameters)
    words = [w for key, v in GIVEN.items() for w in (f"--{key.replace('_', '-')}", str(v))]
    words += ["--data", str(tsv), "--out", str(tmp_path / "run"), "--threads", "1", "--json"]
    settings = answer(kv("--preset", name, *words, command="train-seq2seq"))["settings"]
    found: dict[str, Any] = {**settings, **settings["model"], **settings["train"]}
    found |= settings["train"]["length"]
    wanted = {**preset, **GIVEN}
    assert {key: found[NAMES.get(key, key)] for key in wanted} == wanted


def test_a_preset_has_steps_of_its_own_unless_another_length_is_given() -> None:
    assert train_length(None, None, None, 7) == TrainLength(steps=7)
    assert train_length(None, None, 2.0, 7) == TrainLength(minutes=2.0)
    assert train_length(None, None, None) == TrainLength(minutes=5.0)


def test_a_run_of_a_preset_is_resumed_with_it_alone(seq2seq: Command) -> None:
    assert seq2seq("--preset", "deep").code == 0
    refusal = seq2seq("--resume")
    assert refusal.code == 2 and "encoder" in refusal.err
    assert seq2seq("--preset", "deep", "--resume").code == 0
