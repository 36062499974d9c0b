"""The options that train-lm and train-seq2seq share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtool.config import ACTIVATIONS, NORMS, TrainLength

LENGTH = "How long"
MODEL = "The model"
OPTIMIZER = "The optimizer"
DEFAULT_MINUTES = 5.0

OutFolder = Annotated[
    Path,
    typer.Option("--out", metavar="DIR", help="Where checkpoints, the log and the plot go."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --out, with the same settings.")
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Show the log in TensorBoard too: DIR/tensorboard.")
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", help="Stop after N steps.", rich_help_panel=LENGTH),
]
Epochs = Annotated[
    int | None,
    typer.Option("--epochs", metavar="N", help="Stop after N epochs.", rich_help_panel=LENGTH),
]
Minutes = Annotated[
    float | None,
    typer.Option(
        "--minutes",
        metavar="X",
        help="Stop after X minutes of training; the seed alone does not fix the result then.",
        rich_help_panel=LENGTH,
    ),
]
Patience = Annotated[
    int,
    typer.Option(
        "--patience",
        metavar="N",
        help="Stop after N evaluations without a better score (0: never).",
        rich_help_panel=LENGTH,
    ),
]
EvalEvery = Annotated[
    int,
    typer.Option(
        "--eval-every",
        metavar="N",
        help="Evaluate and save every N steps.",
        rich_help_panel=LENGTH,
    ),
]
DModel = Annotated[
    int, typer.Option("--d-model", metavar="N", help="Width.", rich_help_panel=MODEL)
]
Heads = Annotated[
    int, typer.Option("--heads", metavar="N", help="Attention heads.", rich_help_panel=MODEL)
]
KvHeads = Annotated[
    int,
    typer.Option(
        "--n-kv-heads",
        metavar="N",
        show_default="as many as heads",
        help="Key-value heads; fewer are shared by groups of heads, and make the cache smaller.",
        rich_help_panel=MODEL,
    ),
]
Norm = Annotated[
    str,
    typer.Option("--norm", metavar="KIND", help=f"{' or '.join(NORMS)}.", rich_help_panel=MODEL),
]
Activation = Annotated[
    str,
    typer.Option(
        "--activation",
        metavar="KIND",
        help=f"{', '.join(ACTIVATIONS[:-1])} or {ACTIVATIONS[-1]}.",
        rich_help_panel=MODEL,
    ),
]
TIED = "Let the logits head share the weights of the token embedding."
Tied = Annotated[
    bool, typer.Option("--tied/--untied", help=TIED, show_default="tied", rich_help_panel=MODEL)
]
Untied = Annotated[
    bool, typer.Option("--tied/--untied", help=TIED, show_default="untied", rich_help_panel=MODEL)
]
Context = Annotated[
    int,
    typer.Option(
        "--context",
        metavar="N",
        help="Longest sequence, in tokens.",
        rich_help_panel=MODEL,
    ),
]
Positions = Annotated[
    str,
    typer.Option(
        "--positions",
        metavar="KIND",
        help="sinusoidal, learned or rotary.",
        rich_help_panel=MODEL,
    ),
]
Dropout = Annotated[
    float,
    typer.Option(
        "--dropout",
        metavar="X",
        help="Share of the values that training drops.",
        rich_help_panel=MODEL,
    ),
]
VocabSize = Annotated[
    int,
    typer.Option(
        "--vocab-size", metavar="N", help="Pieces of a bpe tokenizer.", rich_help_panel=MODEL
    ),
]
BatchTokens = Annotated[
    int,
    typer.Option("--batch-tokens", metavar="N", help="Tokens per step.", rich_help_panel=OPTIMIZER),
]
LearningRate = Annotated[
    float, typer.Option("--lr", metavar="X", help="Peak learning rate.", rich_help_panel=OPTIMIZER)
]
Warmup = Annotated[
    int,
    typer.Option(
        "--warmup",
        metavar="N",
        help="Steps in which the learning rate rises to its peak.",
        rich_help_panel=OPTIMIZER,
    ),
]
Schedule = Annotated[
    str,
    typer.Option(
        "--schedule",
        metavar="KIND",
        help="How the rate falls after warm-up: cosine, inverse-sqrt or constant.",
        rich_help_panel=OPTIMIZER,
    ),
]
Clip = Annotated[
    float,
    typer.Option(
        "--clip", metavar="X", help="Scale gradients down to this norm.", rich_help_panel=OPTIMIZER
    ),
]
WeightDecay = Annotated[
    float,
    typer.Option(
        "--weight-decay", metavar="X", help="AdamW's weight decay.", rich_help_panel=OPTIMIZER
    ),
]
Average = Annotated[
    int,
    typer.Option(
        "--average",
        metavar="N",
        help="At each evaluation, also score the mean of the last N weights (0: no).",
        rich_help_panel=OPTIMIZER,
    ),
]
Amp = Annotated[
    bool | None,
    typer.Option(
        "--amp/--no-amp",
        show_default="where the hardware has bfloat16",
        help="Multiply in bfloat16 (autocast).",
        rich_help_panel=OPTIMIZER,
    ),
]


def train_length(
    steps: int | None, epochs: int | None, minutes: float | None, default_steps: int | None = None
) -> TrainLength:
    """The length that was asked for, or `default_steps`, or five minutes. Raises UsageError for two
    of them."""
    if steps is None and epochs is None and minutes is None:
        steps, minutes = default_steps, None if default_steps else DEFAULT_MINUTES
    return TrainLength(steps, epochs, minutes)
