"""kvtool train-lm: train the decoder on a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtool.commands.train import options as t
from kvtool.commands.train.report import TrainReport, show
from kvtool.commands.train.run import best_of, device_of, train, with_vocab
from kvtool.config import ModelConfig, RunConfig, TrainConfig, check_int
from kvtool.errors import UsageError
from kvtool.reading import read_text
from kvtool.registry import MODELS, choose
from kvtool.ui import options as o
from kvtool.ui.output import Output, output_of_rank, present

if TYPE_CHECKING:
    from kvtool.core.text.tokenizer import Tokenizer


def _family(name: str) -> str:
    """A family of decoders. Raises UsageError for another name, with the nearest one."""
    if name == "seq2seq":
        raise UsageError("--family: seq2seq is an encoder-decoder", "Train it with train-seq2seq.")
    return choose(name, [family for family in MODELS if family != "seq2seq"], "--family")


@dataclass(frozen=True)
class Settings:
    """All settings of train-lm."""

    data: Path
    run: RunConfig
    model: ModelConfig
    batch_tokens: int
    train: TrainConfig

    def __post_init__(self) -> None:
        check_int("--context", self.model.context, 2)  # one token predicts nothing
        check_int("--batch-tokens", self.batch_tokens, 1)
        if self.batch_tokens < self.model.context:
            raise UsageError(
                f"--batch-tokens: {self.batch_tokens} is less than one sequence of --context "
                f"{self.model.context}",
                "Give as many at least, or a shorter --context.",
            )


def run(settings: Settings, out: Output) -> TrainReport:
    """Train, then measure the best checkpoint on the last 10 % of the text."""
    from kvtool.core.models import build_model
    from kvtool.core.text.tokenizer import Tokenizer, require_room
    from kvtool.core.training.lm import LanguageModelling, split_text

    device = device_of(settings.run, settings.train)
    text = read_text(settings.data, "a text to train on", "--data")
    require_room(f"--data {settings.data}", text)
    tokenizer = Tokenizer.train(
        "bpe", [split_text(text)[0]], settings.model.vocab_size, specials=False
    )
    config = with_vocab(settings.model, tokenizer.vocab_size)
    task = LanguageModelling(
        text, tokenizer, config.context, settings.batch_tokens, settings.run.seed, device
    )
    model = build_model(config).to(device)
    at = train(model, task, settings.train, "train-lm", out)
    best = best_of(at, model, task, settings.train)
    score = task.score(best.model)
    row = {
        "data": settings.data.name,
        "split": "last 10 %",
        "chars": score.n_chars,
        "nats/token": score.nats_per_token,
        "bits/char": score.bits_per_char,
    }
    return TrainReport.of(at, best, [row], opening(text, tokenizer, config.context))


def opening(text: str, tokenizer: Tokenizer, context: int) -> str:
    """The first words of a text, as many as leave half of the context to what follows them."""
    words = [word for word in text.split() if word.isprintable()][:3] or ["The"]
    ids = tokenizer.encode(" ".join(words))[: max(1, context // 2)]
    return tokenizer.decode(ids).rstrip("\ufffd") or words[0][0]


def command(
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="UTF-8 text; its last 10 % is held out."),
    ] = None,
    out_folder: t.OutFolder = Path("runs/lm"),
    resume: t.Resume = False,
    tensorboard: t.TensorBoard = False,
    steps: t.Steps = None,
    epochs: t.Epochs = None,
    minutes: t.Minutes = None,
    patience: t.Patience = 0,
    eval_every: t.EvalEvery = 250,
    family: Annotated[
        str,
        typer.Option(
            "--family",
            metavar="NAME",
            help="decoder, or a family of models that you have added.",
            callback=_family,
            rich_help_panel=t.MODEL,
        ),
    ] = "decoder",
    layers: Annotated[
        int,
        typer.Option("--layers", metavar="N", help="Decoder layers.", rich_help_panel=t.MODEL),
    ] = 2,
    heads: t.Heads = 8,
    n_kv_heads: t.KvHeads = 0,
    d_model: t.DModel = 256,
    context: t.Context = 1152,
    positions: t.Positions = "rotary",
    norm: t.Norm = "layernorm",
    activation: t.Activation = "gelu",
    tied: t.Tied = True,
    dropout: t.Dropout = 0.1,
    vocab_size: t.VocabSize = 1024,
    batch_tokens: t.BatchTokens = 4608,
    lr: t.LearningRate = 2e-3,
    warmup: t.Warmup = 200,
    schedule: t.Schedule = "cosine",
    clip: t.Clip = 1.0,
    weight_decay: t.WeightDecay = 0.1,
    average: t.Average = 0,
    amp: t.Amp = None,
    device: o.Device = "auto",
    threads: o.Threads = 0,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    output_file: o.OutputFile = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Train a decoder-only Transformer on a text, with a byte-level BPE tokenizer of its own.

    Without --steps, --epochs or --minutes it trains for five minutes. Ctrl-C finishes the step and
    saves; --resume goes on to the same bytes (on one machine, with as many threads, and a length in
    steps or epochs).

      kvtool train-lm --data input.txt --steps 1000
    """
    out = output_of_rank(as_json, output_file, quiet, verbose)
    if data is None:
        raise UsageError("--data: is missing", "Give a text file, e.g. --data input.txt.")
    check_int("--vocab-size", vocab_size, 1)
    settings = Settings(
        data=data,
        run=RunConfig(device=device, threads=threads, seed=seed),
        model=ModelConfig(
            vocab_size=vocab_size,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=n_kv_heads,
            d_model=d_model,
            context=context,
            positions=positions,
            norm=norm,
            activation=activation,
            tied=tied,
            dropout=dropout,
            family=family,
        ),
        batch_tokens=batch_tokens,
        train=TrainConfig(
            out=out_folder,
            length=t.train_length(steps, epochs, minutes),
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            clip=clip,
            weight_decay=weight_decay,
            eval_every=eval_every,
            patience=patience,
            average=average,
            amp=amp,
            seed=seed,
            resume=resume,
            tensorboard=tensorboard,
        ),
    )
    o.require_inputs("", ("--data", data, "a text to train on"))
    present("train-lm", settings, run, show, out)
