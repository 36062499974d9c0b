"""Attacks by what lies where the user stands, by names, and by text: what runs, what is written
over, what reaches the terminal, a spreadsheet or a page."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from arena import Arena, Try, attack, edit
from commands import (
    BENCH,
    CHECK,
    CODE,
    QUICK,
    SAY,
    SOUND,
    generate,
)
from subjects import RUN

HERE = "Settings in the folder where the user stands"
OVER = "Outputs onto what is read"
FULL = "A full disk"
SCREEN = "Escape sequences"
INERT = "Formulas, HTML and mathematics in names"
RED, TITLE, C1 = "\x1b[31m", "\x1b]0;evil\x07", "\x9b31m"


# --- where the user stands


@attack(HERE, ".numba_config.yaml names a cache of pickles")
def _(a: Arena) -> Try:
    (a.here / ".numba_config.yaml").write_text(f"cache_dir: {a.here / 'cache'}\ndisable_jit: 1\n")
    made = a.here / "cache"

    def held(ended: Any) -> str:
        return "its settings were followed" if made.exists() else ""

    return generate(a.model(), refused=False, held=held)


@attack(HERE, ".numba_config.yaml is a FIFO")
def _(a: Arena) -> Try:
    os.mkfifo(a.here / ".numba_config.yaml")
    return generate(a.model(), refused=False)


@attack(HERE, "matplotlibrc asks for TeX")
def _(a: Arena) -> Try:
    (a.here / "matplotlibrc").write_text("text.usetex: True\nbackend: evil\n")
    plot = a.here / "gap.png"
    return Try(
        ["verify-cache", "--model", a.model(), *CHECK, "--plot", plot],
        refused=False,
        held=lambda e: "" if plot.exists() else "no plot",
    )


@attack(HERE, "matplotlibrc is a FIFO")
def _(a: Arena) -> Try:
    os.mkfifo(a.here / "matplotlibrc")
    return Try(["verify-cache", "--model", a.model(), *CHECK, "--plot", a.here / "gap.png"],
               refused=False)  # fmt: skip


for module in ("numba", "yaml", "torch", "numpy", "rich", "kvtool_evil", "sitecustomize", "json"):

    def _beside(a: Arena, module: str = module) -> Try:
        (a.here / f"{module}.py").write_text(a.code + "\nraise SystemExit(0)")
        script = Path(sys.executable).parent / "kvtool"
        python = (str(script),) if script.exists() else (sys.executable, "-P", "-m", "kvtool")
        return generate(a.model(), refused=False, python=python)

    attack(HERE, f"a module {module}.py")(_beside)


@attack(HERE, "a module numba.py, and python -m kvtool")
def _(a: Arena) -> Try:
    (a.here / "numba.py").write_text(a.code)
    return generate(a.model(), refused=None, python=(sys.executable, "-m", "kvtool"))


@attack(HERE, "a cache of native code that others can write to")
def _(a: Arena) -> Try:
    cache = a.here / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    return generate(a.model(), refused=False, env={"NUMBA_CACHE_DIR": str(cache)},
                    held=lambda e: "it was used" if any(cache.iterdir()) else "")  # fmt: skip


@attack(HERE, "a sitecustomize and a .pth in the model's folder, where the user stands")
def _(a: Arena) -> Try:
    folder = a.model()
    (folder / "sitecustomize.py").write_text(a.code)
    (folder / "x.pth").write_text(f"import os; {a.code}\n")
    return generate(folder, refused=False, cwd=folder)


# --- outputs


def _over(a: Arena, argv: list[Any], over: Path) -> Try:
    before = over.read_bytes()
    return Try(argv, held=lambda e: "" if over.read_bytes() == before else "it was overwritten")


def _named(folder: Path, name: str, way: str) -> Path:
    """A name for a file of a folder: itself, a link to it, a hard link, or by another way."""
    path, other = folder / name, folder.parent / f"other{Path(name).suffix}"
    if way == "a link to":
        other.symlink_to(path)
    elif way == "a hard link to":
        os.link(path, other)
    elif way == "another way to":
        other = folder / ".." / folder.name / name
    return path if not way else other


@attack(SOUND, "verify-cache --output --plot, onto a terminal")
def _(a: Arena) -> Try:
    argv = ["verify-cache", "--model", a.model(), *CHECK, "--output", a.here / "o.json"]
    return Try([*argv, "--plot", a.here / "o.png"], refused=False, tty=True)


for way in ("", "a link to", "a hard link to", "another way to"):

    def _config(a: Arena, way: str = way) -> Try:
        folder = a.model()
        path = _named(folder, "config.json", way)
        argv = ["verify-cache", "--model", folder, *CHECK, "--output", path]
        return _over(a, argv, folder / "config.json")

    attack(OVER, f"--output is {way or 'itself'} the model's config.json")(_config)

for flag, name in (("--save-cache", "model.safetensors"), ("--save-cache", "tokenizer.json")):

    def _saved(a: Arena, flag: str = flag, name: str = name) -> Try:
        folder = a.model()
        return _over(a, ["generate", "--model", folder, *SAY, flag, folder / name], folder / name)

    attack(OVER, f"{flag} is the model's {name}")(_saved)


@attack(OVER, "--save-reference is the model's weights")
def _(a: Arena) -> Try:
    folder = a.model()
    path = folder / "model.safetensors"
    argv = ["verify-logits", "--model", folder, "--against", "numpy", "--save-reference", path]
    return _over(a, argv, path)


@attack(OVER, "--save-reference is a shard of the model's weights")
def _(a: Arena) -> Try:
    folder = a.model("shards")
    path = sorted(folder.glob("model-*.safetensors"))[0]
    argv = ["verify-logits", "--model", folder, "--against", "numpy", "--save-reference", path]
    return _over(a, argv, path)


@attack(OVER, "--output is the tokenizer, read by transformers")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    argv = ["verify-cache", "--impl", "transformers", "--model", folder, *CHECK]
    return _over(a, [*argv, "--output", folder / "tokenizer.json"], folder / "tokenizer.json")


@attack(OVER, "--out of training is the model's folder of another")
def _(a: Arena) -> Try:
    folder = a.model()
    (a.here / "pairs.tsv").write_text("a\tb\n" * 3)
    argv = ["train-seq2seq", "--data", a.here / "pairs.tsv", "--out", folder, "--steps", "1"]
    return _over(a, argv, folder / "config.json")


@attack(OVER, "--data lies in the folder of the run that goes on")
def _(a: Arena) -> Try:
    run = a.run()
    argv = [word if word != "pairs.tsv" else "run/log.jsonl" for word in RUN]
    return Try([*argv, "3", "--resume"], cwd=a.here,
               held=lambda e: "" if run.exists() else "the run is gone")  # fmt: skip


# --- full disks: no file may be longer than some bytes


def _result(words: str) -> Any:
    return lambda e: "" if words in e.out else f"the result is lost: {e.out[-200:]!r}"


@attack(FULL, "verify-cache --output")
def _(a: Arena) -> Try:
    argv = ["verify-cache", "--model", a.model(), *CHECK, "--output", a.here / "o.json"]
    return Try(argv, file_limit=64, held=_result("token-by-token"), says="o.json")


@attack(FULL, "verify-cache --plot")
def _(a: Arena) -> Try:
    argv = ["verify-cache", "--model", a.model(), *CHECK, "--plot", a.here / "o.png"]
    return Try(argv, file_limit=64, held=_result("token-by-token"), says="o.png")


@attack(FULL, "verify-cache --json --output")
def _(a: Arena) -> Try:
    argv = ["verify-cache", "--model", a.model(), *CHECK, "--json", "--output", a.here / "o.json"]
    return Try(argv, file_limit=64, held=_result('"conclusion"'), says="o.json")


@attack(FULL, "bench --output --save")
def _(a: Arena) -> Try:
    argv = ["bench", "--model", a.model(), *BENCH,
            "--output", a.here / "o.json", "--save", "x"]  # fmt: skip
    return Try(argv, file_limit=64, held=_result("dynamic"), says="o.json")


@attack(FULL, "verify-logits --output --save-reference")
def _(a: Arena) -> Try:
    argv = ["verify-logits", "--model", a.model(), "--against", "numpy", "--prompt", "To be",
            "--threads", "1", "--output", a.here / "o.md", "--save-reference",
            a.here / "r.safetensors"]  # fmt: skip
    return Try(argv, file_limit=64, held=_result("rounding only"))


@attack(FULL, "generate --save-cache")
def _(a: Arena) -> Try:
    argv = ["generate", "--model", a.model(), *SAY, "--save-cache", a.here / "c.safetensors"]
    return Try(
        argv,
        file_limit=64,
        held=lambda e: "" if e.out.strip() else "the text is lost",
        says="c.safetensors",
    )


# --- text


def _evil_tokens(folder: Path) -> None:
    """Let every token but the bytes of the prompt be an escape sequence."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    sequences = (RED, TITLE, C1, "\x1b[2J", "\r", "\x08", "\u202e")
    size = len(spec["model"]["vocab"])
    vocab = {f"{sequences[i % len(sequences)]}{i}": i for i in range(1, size)}
    spec |= {
        "model": {"type": "WordLevel", "vocab": {"a": 0, **vocab}, "unk_token": "a"},
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None, "normalizer": None,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@attack(SCREEN, "the model's own text")
def _(a: Arena) -> Try:
    folder = a.model()
    _evil_tokens(folder)
    argv = ["generate", "--model", folder, "--prompt", "a", "--max-tokens", "20", "--threads", "1"]
    return Try(argv, refused=False, tty=True)


@attack(SCREEN, "the prompt")
def _(a: Arena) -> Try:
    argv = ["generate", "--model", a.model(), "--prompt", f"To{TITLE}{C1} be", *QUICK]
    return Try(argv, refused=False, tty=True)


@attack(SCREEN, "the name of a written file")
def _(a: Arena) -> Try:
    path = a.here / f"x{TITLE}{C1}.json"
    argv = ["verify-cache", "--model", a.model(), *CHECK, "--output", path]
    return Try(argv, refused=False, tty=True)


@attack(SCREEN, "the name of the model's folder")
def _(a: Arena) -> Try:
    folder = a.model(called=f"m{RED}{C1}")
    return Try(["verify-cache", "--model", folder, *CHECK], refused=False, tty=True)


@attack(SCREEN, "fields of a baseline")
def _(a: Arena) -> Try:
    path = a.file("b.json")
    data = json.loads(path.read_text())
    data["environment"] |= {"cpu": f"cpu{TITLE}{C1}", "torch": RED}
    data["measurements"][0] |= {"cache": f"dyn{RED}"}
    path.write_text(json.dumps(data))
    argv = ["bench", "--model", a.model(), *BENCH]
    return Try([*argv, "--compare", path], refused=None, tty=True)


@attack(SCREEN, "the name of a tensor and of a field")
def _(a: Arena) -> Try:
    folder = a.model()
    edit(folder / "config.json", **{f"x{TITLE}": 1})
    return generate(folder, tty=True)


@attack(SCREEN, "pieces of a reference's text")
def _(a: Arena) -> Try:
    folder = a.model()
    prompt = f"a{TITLE}{C1}b"
    return Try(["verify-logits", "--model", folder, "--against", "numpy", "--prompt", prompt,
                "--threads", "1"], refused=False, tty=True)  # fmt: skip


@attack(INERT, "a CSV cell that is a formula")
def _(a: Arena) -> Try:
    folder = a.model(called="=1+cmd")
    path = a.here / "o.csv"

    def held(ended: Any) -> str:
        rows = list(csv.reader(path.open(newline="")))
        cells = [cell for row in rows for cell in row]
        evil = [c for c in cells if c[:1] in "=@+-" and c and not _is_number(c)]
        return f"a formula: {evil[0]}" if evil else ""

    argv = ["verify-cache", "--model", "=1+cmd", *CHECK, "--output", path]
    return Try(argv, refused=False, held=held) if folder else Try([])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@attack(INERT, "HTML and a picture from elsewhere in Markdown")
def _(a: Arena) -> Try:
    folder = a.model(called="<img src=x onerror=alert(1)>![p](http:x)")
    path = a.here / "o.md"

    def held(ended: Any) -> str:
        text = path.read_text()
        return "a tag" if "<img" in text else "a picture" if "![p](" in text else ""

    argv = ["verify-cache", "--model", folder.name, *CHECK, "--output", path]
    return Try(argv, refused=False, held=held)


@attack(INERT, "mathematics in the title of a plot")
def _(a: Arena) -> Try:
    folder = a.model(called="$\\frac{$")
    path = a.here / "o.png"
    argv = ["verify-cache", "--model", folder.name, *CHECK, "--plot", path]
    return Try(argv, refused=False, held=lambda e: "" if path.exists() else "no plot")


@attack(CODE, "the target of a target's name is a folder's __init__, beside a module that runs")
def _(a: Arena) -> Try:
    (a.here / "numpy.py").write_text(a.code)
    target = a.here / "mine" / "decoder.py"
    target.parent.mkdir()
    target.write_text("class Mine:\n    pass\n")
    shutil.copy(a.here / "numpy.py", a.here / "torch.py")
    return Try(["verify-cache", "--target", f"{target}:Mine"], refused=None)
