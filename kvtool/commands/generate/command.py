"""kvtool generate: continue a text, or turn a source into its target."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvtool.commands.generate.attention_plot import check_attention, draw
from kvtool.commands.generate.chat import (
    Chat,
    SpecialTokens,
    System,
    judge_special_tokens,
    write_chats,
)
from kvtool.commands.generate.prompt_cache import CacheFiles, LoadCache, SaveCache
from kvtool.commands.generate.prompts import encode_all, note_blank, read_prompts, warn_unknown
from kvtool.commands.generate.results import (
    GenerateReport,
    Result,
    blank,
    lines_of_results,
    one_line,
)
from kvtool.commands.generate.settings import SEARCH as SEARCH_RULES
from kvtool.commands.generate.settings import Settings
from kvtool.config import LENGTH_PENALTY, RunConfig
from kvtool.files import model_folder, write_durable
from kvtool.reading import require_file
from kvtool.ui import options as o
from kvtool.ui.documents import SUFFIXES
from kvtool.ui.option_rules import require
from kvtool.ui.output import Output, present

if TYPE_CHECKING:
    from kvtool.core.decoding.generation import Generator

SAMPLING = "Choosing tokens"
SEARCH = "Beam search"
ATTENTION = "Attention"


def run(settings: Settings, out: Output) -> GenerateReport:
    """Generate for every prompt, streaming to stdout."""
    prompts = read_prompts(settings.prompt, settings.prompt_file, settings.input_file)
    folder, chats = model_folder(settings.run.model), None
    if settings.load_cache is not None:
        require_file(settings.load_cache, "a saved cache", "--load-cache")
    if settings.chat:
        chats = write_chats(folder, prompts.texts, settings, out)
    # All that can be refused without torch, which takes seconds to load, is refused by now.
    from kvtool.core.cache import settings_of
    from kvtool.core.checkpoint import checkpoint
    from kvtool.core.decoding.generation import Generator
    from kvtool.core.machine import prepare
    from kvtool.core.native import arrays as native

    device, dtype = prepare(settings.run)
    if settings.max_tokens is not None:
        checkpoint.require_context(settings.run.model, "--max-tokens", settings.max_tokens)
    loaded = checkpoint.load(settings.run.model, device, dtype)
    if not prompts.lines and loaded.source_tokenizer is not None:
        prompts = prompts.by_line()
    if settings.attention_plot is not None:
        check_attention(settings, loaded, len(prompts.texts))
    generator = Generator(loaded, settings.how)
    cache_files = CacheFiles(settings, loaded, generator, out)
    judge_special_tokens(loaded, prompts.texts, settings, out)
    encoded = encode_all(prompts, chats, loaded, generator, settings)
    note_blank(prompts, out)
    read = [text for text, ids in zip(prompts.texts, encoded, strict=True) if ids]
    warn_unknown(loaded.source_tokenizer or loaded.tokenizer, read, out)
    if settings.attention_plot is not None:
        out.later(lambda report, _: draw(settings, loaded, encoded[0], report.results[0], out))
    started = time.perf_counter()
    n_most = sum(generator.n_new(ids) for ids in encoded if ids)
    with native.native_if_worthwhile(n_most), cache_files:
        results = continue_all(settings, generator, prompts.texts, encoded, out)
    seconds = time.perf_counter() - started
    if told := generator.decode.summary():
        out.detail(f"decoded {told}")
    cache_files.note(len(encoded[0]))
    n_new = sum(result.new_tokens for result in results)
    cache = generator.how.cache
    return GenerateReport(
        results,
        seconds,
        n_new / seconds,
        cache,
        generator.cache_bytes,
        generator.n_reused,
        resolved={
            **loaded.facts,
            "device": str(device),
            "temperature": generator.temperature,
            "cache_settings": {cache: settings_of(cache)},
        },
    )


def continue_all(
    settings: Settings,
    generator: Generator,
    texts: list[str],
    encoded: list[list[int]],
    out: Output,
) -> list[Result]:
    """The continuation of each prompt, shown as it is generated; nothing if `encoded` is empty."""
    # Nothing is drawn, and each source's target ends by itself: then many are decoded together.
    greedy_sources = generator.reads_sources and not settings.temperature
    prompts = list(zip(texts, encoded, strict=True))
    if settings.beams > 1 or (settings.input_file is not None and greedy_sources):
        found = iter(generator.search([ids for ids in encoded if ids]))
        results = [
            result
            for number, (text, ids) in enumerate(prompts, start=1)
            for result in (
                [Result.of(text, ids, each, number) for each in next(found)]
                if ids
                else [blank(number)]
            )
        ]
        for result, line in zip(results, lines_of_results(results, settings), strict=True):
            show_result(result, line, settings, out)
        return results
    goes_on = not generator.reads_sources and not settings.chat
    results = []
    for number, (text, ids) in enumerate(prompts, start=1):
        if not ids:
            results.append(blank(number))
        elif settings.input_file is None:
            if out.interactive and goes_on:
                out.echo(text)
            results.append(Result.of(text, ids, generator.one(ids, out.stream), number))
        else:
            results.append(Result.of(text, ids, generator.one(ids), number))
        if settings.input_file is None:
            out.stream("\n")
        else:
            show_result(results[-1], one_line(results[-1].text), settings, out)
    return results


def show_result(result: Result, line: str, settings: Settings, out: Output) -> None:
    """Print a result: as it is, or as one line of several, unless those go to a file."""
    if settings.input_file is None:
        out.stream((result.text if settings.n_best == 1 else line) + "\n")
    elif not out.output_files and settings.text_file is None:
        out.stream(line + "\n")


def write_lines(report: GenerateReport, settings: Settings, out: Output) -> None:
    """Write --output's text, a result a line."""
    assert settings.text_file is not None
    lines = lines_of_results(report.results, settings)
    write_durable(settings.text_file, "".join(f"{line}\n" for line in lines).encode())
    out.note(f"written to {settings.text_file}")


def print_unwritten(report: GenerateReport, settings: Settings, out: Output) -> None:
    """Print results that were meant for a file, if it could not be written."""
    if out.failed:
        for line in lines_of_results(report.results, settings):
            out.stream(f"{line}\n")


def show(report: GenerateReport, out: Output) -> None:
    """Say how fast the text was generated; it is shown already."""
    out.note(report.conclusion)


def command(
    prompt: o.Prompt = None,
    prompt_file: o.PromptFile = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="One prompt or source a line; one result a line, breaks in it written as \\n; "
            "a blank line for a blank one.",
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
    window: o.Window = None,
    sinks: o.Sinks = None,
    group: o.Group = None,
    residual: o.Residual = None,
    page: o.Page = None,
    chat: Chat = False,
    system: System = None,
    special_tokens: SpecialTokens = False,
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
    beams: Annotated[
        int,
        typer.Option(
            "--beams",
            metavar="N",
            help="Search with N continuations at a time; 1 takes or draws one token after another.",
            rich_help_panel=SEARCH,
        ),
    ] = 1,
    length_penalty: Annotated[float | None, o.length_penalty(SEARCH)] = None,
    n_best: Annotated[
        int,
        typer.Option(
            "--n-best",
            metavar="N",
            help="The N best results of each prompt, best first, a line each: the prompt's number "
            "if there are several, rank, score and text, with tabs between.",
            rich_help_panel=SEARCH,
        ),
    ] = 1,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--attention-plot",
            metavar="FILE",
            help="Draw what each new token of the (best) result read, a map a head: from the "
            "source, or a decoder from all tokens before it, with those that its cache has lost: "
            ".png, .svg or .pdf. For one prompt.",
            callback=o.plot_file,
            rich_help_panel=ATTENTION,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            "--attention-layer",
            metavar="N",
            show_default="the last",
            help="Which decoder layer to draw, from 1.",
            rich_help_panel=ATTENTION,
        ),
    ] = None,
    save_cache: SaveCache = None,
    load_cache: LoadCache = None,
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

    Without --prompt, --prompt-file or --input, stdin is read, without a line break at its end; an
    encoder-decoder takes each line of it as a source.

      kvtool generate --prompt "ROMEO:" --max-tokens 100

      kvtool generate --model DIR --chat --prompt "Who are you?"

      echo kvtool | kvtool generate --model runs/seq2seq/best
    """
    plain = output_file is not None and output_file.suffix.lower() == ".txt"
    out = Output(as_json, None if plain else output_file, quiet, verbose, (".txt", *SUFFIXES))
    require(SEARCH_RULES, {"--beams": beams != 1, "--length-penalty": length_penalty is not None})
    settings = Settings(
        run=RunConfig(model, device, dtype, threads, seed),
        prompt=prompt,
        prompt_file=prompt_file,
        input_file=input_file,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        cache=o.kinds_with_settings(
            [cache], window=window, sinks=sinks, group=group, residual=residual, page=page
        )[0],
        kernels=kernels,
        beams=beams,
        length_penalty=LENGTH_PENALTY if length_penalty is None else length_penalty,
        n_best=n_best,
        text_file=output_file if plain else None,
        attention_plot=plot,
        attention_layer=layer,
        save_cache=save_cache,
        load_cache=load_cache,
        chat=chat,
        system=system,
        special_tokens=special_tokens,
    )

    if plain:
        out.later(lambda report, _: write_lines(report, settings, out))
    if output_file is not None and input_file is not None and not as_json:
        out.later(lambda report, _: print_unwritten(report, settings, out))
    present("generate", settings, run, show, out)
