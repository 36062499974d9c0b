"""Tiny checkpoints with random weights, and how a test runs a command on one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cli_probe import Ran
from kvtool.app import build_command
from kvtool.config import ModelConfig
from kvtool.core.checkpoint import checkpoint
from kvtool.core.models import Model, build_model
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.registry import COMMANDS, load

TEXT = "To be, or not to be, that is the question.\n"
WORDS = ["abacus", "beach", "cabbage", "fig", "jail", "kvtool", "mop", "quartz", "sly", "wren"]
PHONES = [" ".join(word.upper()) for word in WORDS]

SIZES: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 24, "context": 64}


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    """A model of some ten thousand weights, decoder-only unless `changes` has n_encoder_layers."""
    torch.manual_seed(seed)
    return build_model(ModelConfig(**{"vocab_size": 23, **SIZES, **changes})).to(dtype).eval()


def save_decoder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A decoder-only checkpoint over byte-level tokens, which no text can be unknown to."""
    tokenizer = Tokenizer.train("bpe", [TEXT], 260, specials=False)
    model = random_model(seed, **{"vocab_size": tokenizer.vocab_size, **changes})
    checkpoint.save(folder, model, tokenizer)
    return folder


def save_seq2seq(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A checkpoint that turns spelling into something."""
    source, target = Tokenizer.train("char", WORDS), Tokenizer.train("symbol", PHONES)
    sizes = {
        "vocab_size": target.vocab_size,
        "source_vocab_size": source.vocab_size,
        "n_encoder_layers": 1,
    }
    checkpoint.save(folder, random_model(seed, **{**sizes, **changes}), target, source)
    return folder


def change_weights(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
) -> Path:
    """A copy of a checkpoint whose weights are what `change` makes of them."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(dict(change(weights)), target / "model.safetensors")
    return target


def with_nan(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One value of the first layer is NaN."""
    weights["layers.0.mlp.up.weight"][3, 1] = float("nan")
    return weights


def answer(ran: Ran, code: int = 0) -> dict[str, Any]:
    """The document of a run with --json that ended with `code`; NaN is refused."""
    assert ran.code == code, ran.err
    return json.loads(ran.out, parse_constant=_refuse)


def _refuse(name: str) -> None:
    raise AssertionError(f"the document holds {name}")


def explains_every_option(ran: Ran, command: str) -> bool:
    """Whether the help page `ran` names each flag of a command, on lines that fit 60 columns, and
    breaks none of the examples."""
    built = build_command(command, load(COMMANDS, command))
    params = built.params
    flags = {flag for param in params for flag in param.opts}
    assert len(flags) > 10 and (ran.code, ran.err) == (0, "")
    words = ran.out.replace(",", " ").split()
    assert max(map(len, ran.out.splitlines())) <= 60
    assert flags <= set(words), flags - set(words)
    examples = {line for line in built.help.splitlines() if line.startswith("  ")}
    assert examples and examples <= set(ran.out.splitlines())
    return True
