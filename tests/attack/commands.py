"""Commands that users run on a stranger's folder, and the kinds of attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arena import Try

QUICK = ["--max-tokens", "2", "--threads", "1"]
SAY = ["--prompt", "To be, or not", *QUICK]
FOREIGN = "Weights that are not the model's, read by transformers"
PLACES = "Names that lead elsewhere"
CODE = "Code in a folder"
PICKLES = "Pickles that hang or inflate"
SIZES = "Sizes that a file claims"
TOKENIZERS = "Rules hidden in a tokenizer"
LIBRARIES = "Inputs on which a library fails in its own way"
TWICE = "Files that say two things"
BENCH = ["--lengths", "4", "--caches", "dynamic", "--threads", "1"]
CHECK = ["--caches", "dynamic", "--scenarios", "token-by-token", "--tokens", "4", "--threads", "1"]
SOUND = "Controls: sound files are read"


def generate(folder: Path, **options: Any) -> Try:
    return Try(["generate", "--model", folder, *SAY], **options)


def theirs(folder: Path, **options: Any) -> Try:
    argv = ["verify-cache", "--impl", "transformers", "--model", folder, "--caches", "dynamic",
            "--scenarios", "token-by-token", "--tokens", "4", "--threads", "1"]  # fmt: skip
    return Try(argv, **options)
