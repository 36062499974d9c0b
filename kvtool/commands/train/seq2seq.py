"""kvtool train-seq2seq: train the encoder-decoder on pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool.commands.train import options as t
from kvtool.commands.train.presets import PresetName, steps_of
from kvtool.commands.train.report import TrainReport, score_columns, show
from kvtool.commands.train.run import best_of, device_of, train, with_vocab
from kvtool.config import ModelConfig, RunConfig, TrainConfig, check_float, check_int
from kvtool.registry import choose
from kvtool.ui import options as o
from kvtool.ui.output import Output, output_of_rank, present

if TYPE_CHECKING:
    from kvtool.core.text.tokenizer import Tokenizer
    from kvtool.core.training.pairs import Pair, Splits
    from kvtool.core.training.translation import Translation

TOKENIZERS = ("auto", "char", "symbol", "word", "bpe")


@dataclass(frozen=True)
class Settings:
    """All settings of train-seq2seq."""

    data: str
    valid: Path | None
    test: Path | None
    tokenizer: str
    run: RunConfig
    model: ModelConfig
    batch_tokens: int
    label_smoothing: float
    beams: int
    train: TrainConfig

    def __post_init__(self) -> None:
        choose(self.tokenizer, TOKENIZERS, "--tokenizer")
        check_int("--batch-tokens", self.batch_tokens, 1)
        check_float("--label-smoothing", self.label_smoothing, 0.0, 0.99)
        check_int("--beams", self.beams, 1, 1000)
        check_int("--encoder-layers", self.model.n_encoder_layers, 1)


def require_data(data: str, valid: Path | None, test: Path | None) -> None:
    """Raise FileError for a file that is not there, before torch is loaded."""
    from kvtool.core.training.pairs import CMUDICT, data_path

    parts = [("--data", None if data == CMUDICT else data_path(data))]
    parts += [("--valid", valid), ("--test", test)]
    o.require_inputs("", *((flag, path, "a TSV file") for flag, path in parts))


def run(settings: Settings, out: Output) -> TrainReport:
    """Train, then decode all held-out sources with the best checkpoint."""
    from kvtool.core.models import build_model
    from kvtool.core.training.pairs import load_data
    from kvtool.core.training.scoring import require_libraries
    from kvtool.core.training.translation import Translation

    require_libraries("train-seq2seq")
    device = device_of(settings.run, settings.train)
    splits = load_data(settings.data, settings.valid, settings.test)
    for note in splits.notes:
        out.note(note)
    source, target = make_tokenizers(settings, splits)
    out.note(f"tokens: {source.kind} ({source.vocab_size}) to {target.kind} ({target.vocab_size})")
    config = with_vocab(settings.model, target.vocab_size, source.vocab_size)
    task = Translation(
        splits,
        source,
        target,
        config.context,
        settings.batch_tokens,
        settings.label_smoothing,
        settings.run.seed,
        device,
    )
    model = build_model(config).to(device)
    at = train(model, task, settings.train, "train-seq2seq", out)
    best = best_of(at, model, task, settings.train)
    parts = [("dev", splits.valid_name, splits.valid), ("test", splits.test_name, splits.test)]
    beams = [1, settings.beams] if settings.beams > 1 else [1]
    scores = [
        score_row(task, best.model, part, name, pairs, n, out)
        for part, name, pairs in parts
        if pairs
        for n in (beams if part == "test" else [1])
    ]
    return TrainReport.of(at, best, scores, splits.valid[0].source)


def make_tokenizers(settings: Settings, splits: Splits) -> tuple[Tokenizer, Tokenizer]:
    """Tokenizers of both sides, learned from the training pairs alone."""
    from kvtool.core.text.tokenizer import Tokenizer, guess_kind

    sides = [pair.source for pair in splits.train], [x for p in splits.train for x in p.targets]
    made = []
    for texts in sides:
        kind = guess_kind(texts) if settings.tokenizer == "auto" else settings.tokenizer
        made.append(Tokenizer.train(kind, texts, settings.model.vocab_size))
    return made[0], made[1]


def score_row(
    task: Translation,
    model: Any,
    part: str,
    name: str,
    pairs: tuple[Pair, ...],
    beams: int,
    out: Output,
) -> dict[str, Any]:
    """Decode a held-out part, and say what the score is of."""
    from kvtool.core.decoding.beam import Beam

    decoding = "greedy" if beams == 1 else f"beam {beams}"
    out.note(f"decoding {len(pairs):,} {part} sources, {decoding}")
    score = task.score(model, pairs, None if beams == 1 else Beam(beams))
    row: dict[str, Any] = {"part": part, "data": name, "sources": score.n, "decoding": decoding}
    row.update(score_columns(score, task.error_rate))
    return row


def command(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="cmudict|FILE",
            help="The embedded dictionary, or a file of lines: source TAB target.",
        ),
    ] = "cmudict",
    valid: Annotated[
        Path | None,
        typer.Option("--valid", metavar="FILE", help="Dev pairs; else a part of --data is used."),
    ] = None,
    test: Annotated[
        Path | None, typer.Option("--test", metavar="FILE", help="Test pairs, scored at the end.")
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer", metavar="KIND", help="char, symbol, word or bpe; auto suits each side."
        ),
    ] = "auto",
    preset: PresetName = None,
    out_folder: t.OutFolder = Path("runs/seq2seq"),
    resume: t.Resume = False,
    tensorboard: t.TensorBoard = False,
    steps: t.Steps = None,
    epochs: t.Epochs = None,
    minutes: t.Minutes = None,
    patience: t.Patience = 0,
    eval_every: t.EvalEvery = 250,
    encoder_layers: Annotated[
        int,
        typer.Option(
            "--encoder-layers", metavar="N", help="Encoder layers.", rich_help_panel=t.MODEL
        ),
    ] = 1,
    decoder_layers: Annotated[
        int,
        typer.Option(
            "--decoder-layers", metavar="N", help="Decoder layers.", rich_help_panel=t.MODEL
        ),
    ] = 1,
    heads: t.Heads = 8,
    n_kv_heads: t.KvHeads = 0,
    d_model: t.DModel = 256,
    context: t.Context = 256,
    positions: t.Positions = "sinusoidal",
    norm: t.Norm = "layernorm",
    activation: t.Activation = "gelu",
    tied: t.Untied = False,
    dropout: t.Dropout = 0.1,
    vocab_size: t.VocabSize = 4096,
    batch_tokens: t.BatchTokens = 2048,
    lr: t.LearningRate = 2e-3,
    warmup: t.Warmup = 100,
    schedule: t.Schedule = "cosine",
    clip: t.Clip = 1.0,
    weight_decay: t.WeightDecay = 0.01,
    label_smoothing: Annotated[
        float,
        typer.Option(
            "--label-smoothing",
            metavar="X",
            help="Probability spread over wrong tokens.",
            rich_help_panel=t.OPTIMIZER,
        ),
    ] = 0.1,
    average: t.Average = 0,
    amp: t.Amp = None,
    beams: Annotated[
        int,
        typer.Option(
            "--beams",
            metavar="N",
            help="Score the test part by beam search too, at the end (1: greedy only).",
        ),
    ] = 4,
    device: o.Device = "auto",
    threads: o.Threads = 0,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    output_file: o.OutputFile = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Train an encoder-decoder Transformer on pairs: words to phones, or your own TSV.

    Without --steps, --epochs, --minutes or a preset it trains for five minutes; one minute already
    gives a model that pronounces. Ctrl-C finishes the step and saves; --resume goes on.

      kvtool train-seq2seq --minutes 1

      kvtool train-seq2seq --data pairs.tsv --epochs 20
    """
    out = output_of_rank(as_json, output_file, quiet, verbose)
    check_int("--decoder-layers", decoder_layers, 1)
    check_int("--vocab-size", vocab_size, 1)
    settings = Settings(
        data=data,
        valid=valid,
        test=test,
        tokenizer=tokenizer,
        run=RunConfig(device=device, threads=threads, seed=seed),
        model=ModelConfig(
            vocab_size=vocab_size,
            n_layers=decoder_layers,
            n_encoder_layers=encoder_layers,
            source_vocab_size=vocab_size,
            n_heads=heads,
            n_kv_heads=n_kv_heads,
            d_model=d_model,
            context=context,
            positions=positions,
            norm=norm,
            activation=activation,
            tied=tied,
            dropout=dropout,
        ),
        batch_tokens=batch_tokens,
        label_smoothing=label_smoothing,
        beams=beams,
        train=TrainConfig(
            out=out_folder,
            length=t.train_length(steps, epochs, minutes, steps_of(preset)),
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
    require_data(data, valid, test)
    present("train-seq2seq", settings, run, show, out)
