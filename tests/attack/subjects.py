"""Sound folders and files to put faults into, and the command that reads each."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "support"))
from kvtool import app
from kvtool.core.checkpoint import checkpoint
from kvtool.core.text.tokenizer import Tokenizer
from small_models import save_decoder, save_seq2seq

PAIRS = "".join(f"word{i}\tW O {i}\n" for i in range(30))
QUIET = ["-q", "--device", "cpu", "--threads", "1"]
SAID = ["--prompt", "a"]
SAYS = ["--prompt", "To be, or not", "--max-tokens", "2", *QUIET]


@dataclass(frozen=True)
class Subject:
    """A folder, the names in it that may be changed, and a command on it ({} is the folder).

    share: how many of a hundred mutants are of this subject.
    """

    name: str
    folder: Path
    names: tuple[str, ...]
    command: tuple[str, ...]
    share: int

    def copied(self, place: Path) -> Path:
        """A fresh copy to be changed."""
        shutil.rmtree(place, ignore_errors=True)
        return Path(shutil.copytree(self.folder, place))

    def argv(self, place: Path) -> list[str]:
        return [word.replace("{}", str(place)) for word in self.command]


def make_subjects(root: Path) -> list[Subject]:
    """All of them, made in a folder. Takes seconds."""
    own, pair = save_decoder(root / "own"), save_seq2seq(root / "pair")
    generate = ("generate", "--model", "{}", *SAYS)
    spelled = ("generate", "--model", "{}", "--prompt", "abacus", "--max-tokens", "2", *QUIET)
    found = [
        Subject("own decoder", own, _names(own), generate, 22),
        Subject("own encoder-decoder", pair, _names(pair), spelled, 12),
    ]
    for name, share in (("shards", 18), ("pickle", 14), ("theirs", 14)):
        folder = _hub_folder(root / name, name)
        command = generate
        if name == "theirs":
            command = (
                "verify-logits",
                "--model",
                "{}",
                "--against",
                "numpy",
                "--prompt",
                "a",
                *QUIET,
            )
        found.append(Subject(f"Hugging Face, {name}", folder, _names(folder), command, share))
    found += _files(root, own)
    _run(root / "runs")
    return found


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir()))


def _hub_folder(folder: Path, form: str) -> Path:
    """A tiny Llama as transformers would save it: in shards, as a pickle, or in one file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer.train("bpe", ["To be, or not to be"], 260, specials=False)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="20KB" if form == "shards" else "1GB")
    if form == "pickle":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    tokenizer.save(folder / "tokenizer.json")
    said = {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


RUN = ("train-seq2seq", "--data", "pairs.tsv", "--out", "run", "--eval-every", "1",
       "--d-model", "8", "--threads", "1", "--steps")  # fmt: skip


def _run(folder: Path) -> None:
    """A run that was ended after two of its three steps, and what it was trained on."""
    folder.mkdir()
    (folder / "pairs.tsv").write_text(PAIRS)
    here = Path.cwd()
    os.chdir(folder)
    try:
        if app.run([*RUN, "3", "-q"]):
            raise RuntimeError("training did not end well")
        sorted(Path("run").glob("state-*.pt"))[-1].unlink()
    finally:
        os.chdir(here)


def _files(root: Path, own: Path) -> list[Subject]:
    """A saved cache, references, a baseline, pairs and a run: single files beside a sound model."""
    folder = root / "files"
    folder.mkdir()
    model = ["--model", str(own)]
    loaded = checkpoint.load(str(own), torch.device("cpu"), torch.float32)
    ids = loaded.tokenizer.encode("To be")
    with torch.inference_mode():
        logits = loaded.model.double()(torch.tensor([ids]))[0].numpy()
    np.savez(folder / "r.npz", ids=np.array(ids), logits=logits)
    saved = "--save-reference", str(folder / "r.safetensors")
    made = [
        ["generate", *model, *SAYS, "--save-cache", str(folder / "c.safetensors")],
        ["bench", *model, "--lengths", "4", "--caches", "dynamic", "--threads", "1", "-q",
         "--output", str(folder / "b.json")],
        ["verify-logits", *model, "--against", "numpy", "--prompt", "To be", *saved, *QUIET],
    ]  # fmt: skip
    for argv in made:
        if app.run(argv):
            raise RuntimeError(f"{argv} did not end well")
    (folder / "pairs.tsv").write_text(PAIRS)
    trains = ("--data", "{}/pairs.tsv", "--out", "{}/run", "--steps", "1", "--d-model", "8", *QUIET)
    compared = ("verify-logits", *model, "--reference")
    return [
        Subject("saved cache", folder, ("c.safetensors",),
                ("generate", *model, *SAYS, "--load-cache", "{}/c.safetensors"), 7),
        Subject("reference, npz", folder, ("r.npz",), (*compared, "{}/r.npz", *QUIET), 5),
        Subject("reference, safetensors", folder, ("r.safetensors",),
                (*compared, "{}/r.safetensors", *QUIET), 5),
        Subject("pairs", folder, ("pairs.tsv",), ("train-seq2seq", *trains), 3),
    ]  # fmt: skip
