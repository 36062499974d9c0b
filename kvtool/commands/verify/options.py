"""The options of verify-cache, and which of them contradict or need each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvtool.config import DECODE_TOKENS
from kvtool.registry import IMPLEMENTATIONS, TRANSFORMERS_CACHES
from kvtool.ui import options as o
from kvtool.ui.lists import list_option
from kvtool.ui.option_rules import contradicts, needs

EVERY: list[str] = []  # scenarios, or types
DEFAULT_TOKENS = DECODE_TOKENS
TIME_LIMIT = 60.0  # seconds
SWEEP = "Sweep (--impl transformers)"
SERVER = "A running server"
MAX_REQUESTS, REQUEST_TIMEOUT = 600, 120.0  # of a server; seconds for each
HF = "--impl transformers"
OF_KINDS = "--window --sinks --group --residual --page"

OF_THE_SELF_TEST = contradicts(
    "--self-test",
    "--caches --kernels --scenarios --tokens --prompt-length --thorough --layers --prompt "
    f"--device-map --target --lossy --plot --model --dtype --impl --sweep --server {OF_KINDS}",
    "It has models, caches and tokens of its own.",
)
OF_A_SERVER = "--engine --prompts --requests --timeout --dry-run --promoted --against"
RULES = (
    contradicts("--prompt", "--prompt-length", "Give one of them."),
    contradicts(
        "--against",
        "--promoted --scenarios --thorough",
        "It compares the answers of two servers, and judges neither.",
    ),
    needs("--server", OF_A_SERVER, "Add --server URL."),
    contradicts(
        "--server",
        f"--impl --target --sweep --model --layers --device-map --dtype --caches --kernels "
        f"--prompt --prompt-length --resume {OF_KINDS}",
        "A server has its own model and cache, and takes its prompts from --prompts.",
    ),
    needs("--sweep", "--types --time-limit", f"Add {HF} --sweep."),
    contradicts(
        HF,
        f"--kernels {OF_KINDS}",
        "Models and caches of transformers have their own: leave it out.",
    ),
    contradicts(HF, "--target --prompt --plot", "Random ids are fed to models of transformers."),
    contradicts(
        f"{HF} --sweep",
        "--model --layers --device-map --dtype --prompt-length --thorough",
        "It judges every type in float32, in a short time.",
    ),
    needs(HF, "--sweep --device-map", f"Add {HF}."),
    needs("--target or --against", "--lossy", "kvtool's own caches declare what they round."),
)
OF_A_TARGET = contradicts(
    "--target",
    "--model --layers --caches --kernels --prompt",
    "Your decoder has its own, and is fed random ids.",
)


def _text(text: str, flag: str) -> str:
    return text


def _kind(text: str, flag: str) -> list[str]:
    """A kind of kvtool's caches, or of those of transformers."""
    return [text] if text in TRANSFORMERS_CACHES else o.cache_kinds(text, flag)


Impl = Annotated[
    str,
    typer.Option(
        "--impl",
        metavar="|".join(IMPLEMENTATIONS),
        help="Whose models and caches. Of transformers, --model is a saved folder or a type; of a "
        "type that has both, such as bart, it is the encoder-decoder, and --sweep judges both.",
    ),
]
Caches = Annotated[
    list[str],
    list_option(
        "--caches",
        element=_kind,
        example="none static",
        help=f"Cache kinds: {', '.join(o.ALL_CACHES)}; or all; {o.WITH_SETTINGS}. "
        f"Of transformers: {', '.join(TRANSFORMERS_CACHES)}.",
        metavar="KIND...",
        unique=True,
        complete=lambda: o.ALL_CACHES,
    ),
]
# Small, so that a short check makes a kind do all that it does: see `small` of the kinds.
Window = Annotated[int | None, o.setting("window", "5")]
Sinks = Annotated[int | None, o.setting("sinks", "1")]
Group = Annotated[int | None, o.setting("group", "4")]
Residual = Annotated[int | None, o.setting("residual", "2")]
Page = Annotated[int | None, o.setting("page", "4")]
Sweep = Annotated[
    bool,
    typer.Option("--sweep", help="Judge every model type.", rich_help_panel=SWEEP),
]
Types = Annotated[
    list[str],
    list_option(
        "--types",
        element=_text,
        example="llama mamba",
        help="Only these types.",
        metavar="TYPE...",
        unique=True,
        panel=SWEEP,
    ),
]
TimeLimit = Annotated[
    float,
    typer.Option(
        "--time-limit",
        metavar="SECONDS",
        help="Give a type up after so long.",
        rich_help_panel=SWEEP,
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="FILE",
        help="Keep each verdict in FILE at once, and go on from those that it has.",
    ),
]
Scenarios = Annotated[
    list[str],
    list_option(
        "--scenarios",
        element=_text,
        example="decode crop",
        help="What to do to a cache; 'help' lists them.",
        metavar="NAME...",
        unique=True,
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        "--tokens",
        metavar="N",
        help="How many tokens the scenario decode compares after the prompt; of a server, how many "
        "follow each prompt (32).",
    ),
]
PromptLength = Annotated[
    int,
    typer.Option(
        "--prompt-length",
        metavar="N",
        show_default="11, or that of the text",
        help="How many tokens the prompt of the scenario decode has.",
    ),
]
Thorough = Annotated[
    bool,
    typer.Option(
        "--thorough",
        help="Feed more sizes of steps, after more pasts, and longer histories: in minutes.",
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(
        "--layers",
        metavar="N",
        show_default="all",
        help="Judge the first N layers alone, of a model that is too large as a whole.",
    ),
]
DeviceMap = Annotated[
    str,
    typer.Option(
        "--device-map",
        metavar="auto|DEVICE",
        show_default="--device alone",
        help="Spread a folder of transformers over all devices (needs accelerate).",
        rich_help_panel=o.MACHINE,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        help="Seed of the weights of tiny random models; ids are always the same.",
        rich_help_panel=o.MACHINE,
    ),
]
RecordedSeed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        help="Only recorded: nothing is random here.",
        rich_help_panel=o.MACHINE,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="FILE.py:NAME",
        help="Check your own decoder: an object, or a function that builds it.",
    ),
]
Lossy = Annotated[
    bool,
    typer.Option(
        "--lossy",
        help="The cache of --target or --against rounds on purpose: report the loss.",
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        help="Judge the cache of a running llama.cpp, vLLM or SGLang, from outside. A key is taken "
        "from KVTOOL_API_KEY or OPENAI_API_KEY.",
        rich_help_panel=SERVER,
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="llama.cpp|vllm|sglang",
        show_default="found from the server",
        help="What the server is.",
        rich_help_panel=SERVER,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts, one a line: text, or JSON of strings and lists of ids. Five or more.",
        rich_help_panel=SERVER,
    ),
]
Requests = Annotated[
    int,
    typer.Option(
        "--requests",
        metavar="N",
        help="How many requests may be sent to a server.",
        rich_help_panel=SERVER,
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        help="How long to wait for one answer.",
        rich_help_panel=SERVER,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the requests, and send only the one that identifies the server.",
        rich_help_panel=SERVER,
    ),
]
Promoted = Annotated[
    str | None,
    typer.Option(
        "--promoted",
        metavar="URL",
        help="A second server with the same numbers in float32: it tells a bug from rounding.",
        rich_help_panel=SERVER,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="URL",
        help="A second server whose answers are to be the same: another cache, or another build.",
        rich_help_panel=SERVER,
    ),
]
SelfTest = Annotated[
    bool,
    typer.Option("--self-test", help="Plant every known bug, and see whether it is reported."),
]
