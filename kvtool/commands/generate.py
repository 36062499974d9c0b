"""kvtool generate: continue a text, or turn a source into its target."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool.config import RunConfig, check_float, check_int
from kvtool.errors import CapacityError, FileError, UsageError
from kvtool.files import read_text, write_durable
from kvtool.ui import options as o
from kvtool.ui.output import Output, present

if TYPE_CHECKING:
    import torch

    from kvtool.core.checkpoint import Checkpoint
    from kvtool.core.sampling import Sampler

DEFAULT_TOKENS = 200
SAMPLING = "Choosing tokens"
LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines would also split at form feeds and others


@dataclass(frozen=True)
class Settings:
    """Everything that generate was asked for; None means that the kind of model decides."""

    run: RunConfig
    prompt: str | None
    prompt_file: Path | None
    input_file: Path | None
    max_tokens: int | None
    temperature: float | None
    top_k: int
    top_p: float
    cache: str
    kernels: str = "default"
    text_file: Path | None = None  # --output, if it is a .txt

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_int("--max-tokens", self.max_tokens, 1)
        if self.temperature is not None:
            check_float("--temperature", self.temperature, 0.0)
        check_int("--top-k", self.top_k, 0)
        check_float("--top-p", self.top_p, 0.0, 1.0, open_low=True)
        given = {
            "--prompt": self.prompt,
            "--prompt-file": self.prompt_file,
            "--input": self.input_file,
        }
        named = [flag for flag, value in given.items() if value is not None]
        if len(named) > 1:
            raise UsageError(f"{named[0]}: contradicts {named[1]}", "Give one of them.")
        if self.text_file is not None:
            check_text_file(self.text_file)


def check_text_file(path: Path) -> None:
    """Refuse a .txt file that could not be written, before the work that it is meant for."""
    if path.is_dir():
        raise FileError(f"--output {path}: is a folder (expected a file)")
    if not path.parent.is_dir():
        raise FileError(f"--output {path}: the folder {path.parent} does not exist")


@dataclass
class Result:
    """One prompt and what was made of it."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    ended: bool  # by the model, not by --max-tokens


@dataclass
class Generated:
    """All results, in the order of the prompts."""

    results: list[Result]
    seconds: float
    tokens_per_second: float
    cache: str
    cache_bytes: int  # the largest, keys and values of a source included
    exit_code: int = 0

    def rows(self) -> list[dict[str, Any]]:
        return [vars(result) for result in self.results]


def run(settings: Settings, out: Output) -> Generated:
    """Generate for every prompt, streaming to stdout."""
    from kvtool.core import checkpoint
    from kvtool.core.machine import prepare

    prompts = read_prompts(settings)
    device, dtype = prepare(settings.run)
    loaded = checkpoint.load(settings.run.model, device, dtype)
    if not prompts.lines and loaded.source_tokenizer is not None:
        prompts = Prompts(lines_of(prompts.texts[0]), lines=True)
    generator = Generator(loaded, settings, device, dtype)
    encoded = [generator.encode(text, i) for i, text in enumerate(prompts.texts)]  # check all first
    started = time.perf_counter()
    results = []
    for text, ids in zip(prompts.texts, encoded, strict=True):
        results.append(generator.one(text, ids, out if settings.input_file is None else None))
        if settings.input_file is None:
            out.stream("\n")
        elif out.output_file is None and settings.text_file is None:
            out.stream(one_line(results[-1].text) + "\n")
    seconds = time.perf_counter() - started
    n_new = sum(result.new_tokens for result in results)
    return Generated(results, seconds, n_new / seconds, settings.cache, generator.cache_bytes)


@dataclass
class Prompts:
    """The texts to start from; `lines` if each stood on a line of its own."""

    texts: list[str]
    lines: bool


def read_prompts(settings: Settings) -> Prompts:
    """Find the prompts. Raises UsageError where there are none, FileError for a bad file."""
    if settings.input_file is not None:
        lines = lines_of(read_text(settings.input_file, "a file of prompts"))
        empty = next((i for i, line in enumerate(lines, start=1) if not line), None)
        if empty is not None:
            raise UsageError(f"{settings.input_file}: line {empty}: is empty (expected a prompt)")
        if not lines:
            raise UsageError(f"{settings.input_file}: holds no line (expected prompts)")
        return Prompts(lines, lines=True)
    if settings.prompt is not None:
        return Prompts([non_empty(settings.prompt, "--prompt")], lines=False)
    if settings.prompt_file is not None:
        text = read_text(settings.prompt_file, "a prompt")
        return Prompts([non_empty(text.removesuffix("\n"), str(settings.prompt_file))], lines=False)
    return Prompts([non_empty(read_stdin().removesuffix("\n"), "stdin")], lines=False)


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends."""
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def read_stdin() -> str:
    """The text on stdin. Raises UsageError on a terminal, or for bytes that are not UTF-8."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "--prompt: is missing (stdin is a terminal)",
            "Give --prompt TEXT or --prompt-file FILE, or pipe a text in.",
        )
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise UsageError(f"stdin: is not UTF-8 ({found})", "Convert it to UTF-8.") from error


def non_empty(text: str, where: str) -> str:
    """Raise UsageError for an empty prompt."""
    if not text:
        raise UsageError(f"{where}: is empty (expected a prompt)")
    return text


def one_line(text: str) -> str:
    """`text` with line breaks and backslashes escaped, so that each result is one line."""
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")


class Generator:
    """One checkpoint and one way of choosing tokens, for any number of prompts."""

    def __init__(
        self, loaded: Checkpoint, settings: Settings, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.loaded = loaded
        self.settings = settings
        self.device = device
        self.dtype = dtype
        self.cache_bytes = 0
        if settings.top_k > loaded.config.vocab_size:
            raise UsageError(
                f"--top-k: {settings.top_k} is above the vocabulary of {loaded.config.vocab_size}"
            )

    def encode(self, text: str, index: int) -> list[int]:
        """Token ids of a prompt, after checking that everything fits. Raises CapacityError."""
        from kvtool.core.engine import check_context
        from kvtool.core.translation import check_sources

        context = self.loaded.config.context
        if self.loaded.source_tokenizer is not None:
            ids = self.loaded.source_tokenizer.encode(text)
            check_sources([ids], context, first=index)
            check_context(1, self.n_new(ids), context)
            return ids
        ids = self.loaded.tokenizer.encode(text)
        try:
            if not ids:  # blanks are no token of a word tokenizer
                raise CapacityError(f"the prompt holds no token (found {text!r})")
            check_context(len(ids), self.n_new(ids), context)
        except CapacityError as error:
            if self.settings.input_file is None:
                raise
            where = f"{self.settings.input_file}: line {index + 1}"
            raise CapacityError(f"{where}: {error.message}", error.hint) from error
        return ids

    def n_new(self, ids: list[int]) -> int:
        """How many tokens to generate at most."""
        from kvtool.core.translation import target_limit

        if self.settings.max_tokens is not None:
            return self.settings.max_tokens
        context = self.loaded.config.context
        if self.loaded.source_tokenizer is not None:
            return target_limit(len(ids), context)
        return max(1, min(DEFAULT_TOKENS, context - len(ids)))

    def one(self, text: str, ids: list[int], out: Output | None) -> Result:
        """Generate from one prompt, streaming to `out`."""
        emit: Callable[[str], None] = out.stream if out is not None else lambda text: None
        if out is not None and out.interactive and self.loaded.source_tokenizer is None:
            out.text(text, style="dim", end="")
        eos = self.loaded.tokenizer.eos_id
        stream = self.loaded.tokenizer.stream()
        made: list[int] = []
        pieces: list[str] = []
        for token in self.tokens(ids):
            made.append(int(token))
            if made[-1] == eos:
                break
            pieces.append(stream.step(made[-1]))
            emit(pieces[-1])
        pieces.append(stream.finish())
        emit(pieces[-1])
        ended = bool(made) and made[-1] == eos
        return Result(text, "".join(pieces), len(ids), len(made), ended)

    def tokens(self, ids: list[int]) -> Any:
        """The tokens that follow `ids`, each a tensor (1,)."""
        import torch

        from kvtool.core import engine
        from kvtool.core.cache import CacheSpec, make_cache
        from kvtool.core.kernels import make_kernels

        kernels = make_kernels(self.settings.kernels)
        model, config = self.loaded.model, self.loaded.config
        with torch.inference_mode():
            start = torch.tensor([ids], device=self.device)
            prompt, source = engine.begin(model, start, kernels)
        n_new = self.n_new(ids)
        spec = CacheSpec.of(config, 1, prompt.shape[1] + n_new, self.dtype, self.device, kernels)
        cache = make_cache(self.settings.cache, spec)
        for token in engine.generate(model, prompt, cache, n_new, self.sampler(), source):
            yield token
            used = cache.nbytes().allocated + (source.nbytes() if source else 0)
            self.cache_bytes = max(self.cache_bytes, used)

    def sampler(self) -> Sampler:
        """A fresh sampler, so that a prompt's result does not depend on those before it."""
        from kvtool.core.sampling import Sampler

        s = self.settings
        temperature = s.temperature
        if temperature is None:
            temperature = 0.0 if self.loaded.source_tokenizer is not None else 0.8
        return Sampler(temperature, s.top_k, s.top_p, s.run.seed)


def show(report: Generated, out: Output) -> None:
    """The text is out already; say how fast it came."""
    n_new = sum(result.new_tokens for result in report.results)
    out.note(
        f"{n_new} tokens in {report.seconds:.2f} s ({report.tokens_per_second:,.0f} tokens/s), "
        f"{report.cache} cache: {report.cache_bytes / 2**20:.2f} MiB"
    )


def command(
    prompt: o.Prompt = None,
    prompt_file: o.PromptFile = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="One prompt or source a line; one result a line, breaks in it written as \\n.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            show_default="200, or what the model holds",
            help="Stop after N tokens.",
        ),
    ] = None,
    cache: o.Cache = "dynamic",
    kernels: o.Kernels = "default",
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            metavar="X",
            show_default="0.8; 0 for encoder-decoders",
            help="0 always takes the likeliest token.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            metavar="N",
            help="Choose among the N likeliest (0: all).",
            rich_help_panel=SAMPLING,
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            metavar="X",
            help="Choose among the likeliest that together have probability X.",
            rich_help_panel=SAMPLING,
        ),
    ] = 1.0,
    model: o.Model = "",
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    threads: o.Threads = 0,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Also write the result here: .txt, .json, .csv or .md.",
            rich_help_panel=o.REPORT,
        ),
    ] = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Generate text with a cache: continue a prompt, or turn a source into its target.

    Without --prompt, --prompt-file or --input, stdin is read; an encoder-decoder takes each line of
    it as a source.

      kvtool generate --prompt "ROMEO:" --max-tokens 100

      echo kvtool | kvtool generate --model runs/seq2seq/best
    """
    plain = output_file is not None and output_file.suffix.lower() == ".txt"
    out = Output(as_json, None if plain else output_file, quiet, verbose)
    settings = Settings(
        run=RunConfig(model, device, dtype, threads, seed),
        prompt=prompt,
        prompt_file=prompt_file,
        input_file=input_file,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        cache=cache,
        kernels=kernels,
        text_file=output_file if plain else None,
    )

    def work(settings: Settings, out: Output) -> Generated:
        report = run(settings, out)
        if settings.text_file is not None:
            lines = [one_line(result.text) + "\n" for result in report.results]
            write_durable(settings.text_file, "".join(lines).encode())
            out.note(f"written to {settings.text_file}")
        return report

    present("generate", settings, work, show, out)
