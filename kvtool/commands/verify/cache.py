"""kvtool verify-cache: is the difference between cached and uncached logits a bug or rounding?"""

from __future__ import annotations

from functools import partial

import typer

from kvtool.commands.verify import hf as hf_models
from kvtool.commands.verify import options as v
from kvtool.commands.verify import self_test as self_tests
from kvtool.commands.verify import server as server_visits
from kvtool.commands.verify import sweep as sweeps
from kvtool.commands.verify.check import Settings, run
from kvtool.commands.verify.hf import check_team, require_model
from kvtool.commands.verify.show import draw, gaps_plot, show
from kvtool.config import RunConfig, check_int
from kvtool.registry import IMPLEMENTATIONS, choose
from kvtool.ui import options as o
from kvtool.ui.documents import OF_CHECKS
from kvtool.ui.option_rules import require
from kvtool.ui.output import Output, output_of_rank, present
from kvtool.ui.tables import Column


def command(
    impl: v.Impl = IMPLEMENTATIONS[0],
    caches: v.Caches = o.ALL_CACHES,
    kernels: o.KernelsList = o.ALL_KERNELS,
    window: v.Window = None,
    sinks: v.Sinks = None,
    group: v.Group = None,
    residual: v.Residual = None,
    page: v.Page = None,
    scenarios: v.Scenarios = v.EVERY,
    tokens: v.Tokens = v.DEFAULT_TOKENS,
    prompt_length: v.PromptLength = 0,
    thorough: v.Thorough = False,
    layers: v.Layers = None,
    prompt: o.Prompt = None,
    target: v.Target = None,
    lossy: v.Lossy = False,
    self_test: v.SelfTest = False,
    server: v.Server = None,
    engine: v.EngineName = "",
    prompts: v.Prompts = None,
    requests: v.Requests = v.MAX_REQUESTS,
    timeout: v.Timeout = v.REQUEST_TIMEOUT,
    dry_run: v.DryRun = False,
    promoted: v.Promoted = None,
    against: v.Against = None,
    plot: o.Plot = None,
    sweep: v.Sweep = False,
    types: v.Types = v.EVERY,
    time_limit: v.TimeLimit = v.TIME_LIMIT,
    resume: v.Resume = None,
    model: o.Model = "",
    device: o.Device = "auto",
    device_map: v.DeviceMap = "",
    dtype: o.Dtype = "float32",
    threads: o.Threads = 0,
    seed: v.Seed = 0,
    as_json: o.Json = False,
    output_files: o.OutputOfChecks = [],  # noqa: B006
    github: o.GitHub = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Compare cached with uncached logits, and say whether a difference is a bug or rounding.

    Both arms are fed the same tokens; the uncached one computes whole sequences and touches no
    cache. Rounding all but vanishes in float64 and a bug stays, so the float64 run decides. What
    vanishes only when every cast to a lower type is promoted is a matter of precision. A bug
    planted on purpose must be found too. Windows, groups and pages are small here, unless given, so
    that short texts fill them.

    ULP: units in the last place of a step's largest logit. gap: the largest difference over the
    largest logit. Exit code 0: no bug; 1: a bug, or nothing was checked.

      kvtool verify-cache --caches static --tokens 256

      kvtool verify-cache --target my_decoder.py:build

      kvtool verify-cache --impl transformers --model qwen3

      kvtool verify-cache --server http://127.0.0.1:8080
    """
    out = output_of_rank(as_json, output_files, quiet, verbose, OF_CHECKS, github)
    if scenarios == ["help"] and not self_test:
        show_scenarios(out, server is not None)
        raise typer.Exit
    machine = RunConfig(model, device, dtype, threads, seed)
    of_kinds = {
        "window": window, "sinks": sinks, "group": group, "residual": residual, "page": page,
    }  # fmt: skip
    hf = impl == "transformers"
    given = {
        "--self-test": self_test,
        "--caches": caches != o.ALL_CACHES,
        "--kernels": kernels != o.ALL_KERNELS,
        "--scenarios": scenarios,
        "--tokens": tokens != v.DEFAULT_TOKENS,
        "--prompt-length": prompt_length,
        "--thorough": thorough,
        "--layers": layers is not None,
        "--device-map": device_map,
        "--prompt": prompt is not None,
        "--target": target is not None,
        "--target or --against": target is not None or against is not None,
        "--lossy": lossy,
        "--server": server is not None,
        "--engine": engine,
        "--prompts": prompts,
        "--requests": requests != v.MAX_REQUESTS,
        "--timeout": timeout != v.REQUEST_TIMEOUT,
        "--dry-run": dry_run,
        "--promoted": promoted is not None,
        "--against": against is not None,
        "--resume": resume,
        "--plot": plot,
        "--model": model,
        "--dtype": dtype != "float32",
        "--impl": impl != IMPLEMENTATIONS[0],
        "--impl transformers": hf,
        "--impl transformers --sweep": hf and sweep,
        "--sweep": sweep,
        "--types": types,
        "--time-limit": time_limit != v.TIME_LIMIT,
        **{f"--{name}": value is not None for name, value in of_kinds.items()},
    }
    if self_test:
        require([v.OF_THE_SELF_TEST], given)
    else:
        choose(impl, IMPLEMENTATIONS, "--impl")
        require(v.RULES, given)
    if layers is not None:
        check_int("--layers", layers, 1)
    check_team(hf and not sweep and not self_test, model, device_map)
    hf_kinds = caches if given["--caches"] else []
    if self_test:
        its = self_tests.Settings(machine, resume)
        present("verify-cache.self-test", its, self_tests.run, self_tests.show, out)
    elif server is not None:
        visited = server_visits.Settings(
            server, engine, prompts, tokens if given["--tokens"] else None, requests, timeout,
            dry_run, promoted, against, scenarios, thorough, lossy, plot,
        )  # fmt: skip
        server_visits.present_visit(visited, out)
    elif sweep:
        n = tokens if given["--tokens"] else sweeps.TOKENS
        all_types = sweeps.Settings(machine, types, hf_kinds, scenarios, n, time_limit, resume)
        present("verify-cache.sweep", all_types, sweeps.run, sweeps.show, out)
    elif hf:
        one_model = hf_models.Settings(
            machine,
            hf_kinds,
            scenarios,
            tokens,
            resume,
            prompt_length,
            thorough,
            layers or 0,
            device_map,
        )
        drawn = partial(gaps_plot, settings=one_model)
        present("verify-cache", one_model, hf_models.run, show, out, drawn)
    else:
        if target is None:
            require_model(model)
        else:
            from kvtool.core.verify.target.spec import parse_spec

            parse_spec(target)  # is read again, but refused before torch is loaded
        chosen = o.kinds_with_settings(caches, **of_kinds)
        asked = Settings(
            machine, chosen, kernels, scenarios, tokens, prompt, target, plot, resume, lossy,
            prompt_length, thorough, layers or 0,
        )  # fmt: skip
        if plot is not None:
            out.draw_later(plot, partial(draw, settings=asked))
        present("verify-cache", asked, run, show, out, partial(gaps_plot, settings=asked))


def show_scenarios(out: Output, of_a_server: bool) -> None:
    """Print the list of --scenarios help."""
    if of_a_server:
        from kvtool.core.servers.arms import ARMS

        out.table(
            "Scenarios of a server", ["scenario", "about"], [[n, a.about] for n, a in ARMS.items()]
        )
        return
    from kvtool.core.verify.scenarios import SCENARIOS

    rows = [[s.name, s.about, ", ".join(s.needs) or "-"] for s in SCENARIOS.values()]
    columns = [
        Column("scenario", "left", key=True),
        Column("about", "left"),
        Column("needs", "left"),
    ]
    out.table("Scenarios", columns, rows)
