"""README and docs tell the truth: commands run, links lead somewhere, what they name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import kvtool
from kvtool import app
from kvtool.app import build_command
from kvtool.core.decoding import dispatch
from kvtool.core.verify import api, scenarios
from kvtool.core.verify.subject import ABILITIES
from kvtool.registry import COMMANDS as COMMAND_NAMES
from kvtool.registry import load
from listings import listings
from small_models import random_model

FLAGS = re.MULTILINE | re.DOTALL
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "weights" / "README.md"]
COMMANDS = re.findall(r"^\$ kvtool (.+)$", README, flags=re.MULTILINE)
LISTED = {listing.command for listing in listings()}  # those test_listings.py runs

FENCED = re.compile(r"^```.*?^```$", FLAGS)
JOURNEY = README.partition("## One token's journey")[2].partition("\n## ")[0]

# The same commands, made short: the last value of an option counts.
SHORTER = {
    "bench": "--lengths 2 3 --repeats 1",
    "verify-cache": "--tokens 4 --caches static",
    "train-lm": "--steps 2 --d-model 32 --context 64 --batch-tokens 64",
    "train-seq2seq": "--steps 2 --d-model 32 --data pairs.tsv",
    "generate": "--max-tokens 3",
    "evaluate": "--data pairs.tsv",
}


DROPPED = {"--minutes": 2, "--lengths": 6}  # options that would contradict or outlast, with values


def shorter(command: str) -> list[str]:
    words = shlex.split(command)
    for flag, n_words in DROPPED.items():
        if flag in words:
            at = words.index(flag)
            del words[at : at + n_words]
    return [*words, *SHORTER[words[0]].split()]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# Commands


def test_every_command_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    Path("pairs.tsv").write_text("".join(f"{a}{b}\t{a} {b}\n" for a in "abcde" for b in "abcdefk"))
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        if command not in LISTED:
            assert app.run(shorter(command)) == 0, (command, capfd.readouterr().err)


def test_every_command_takes_the_options_that_all_are_said_to_take() -> None:
    found = re.search(
        r"^Every command takes (.+?) all but the training ones (.+?)\.",
        text_of(ROOT / "docs" / "options.md"),
        FLAGS,
    )
    assert found is not None
    every, untrained = (set(re.findall(r"`(--[a-z]+)\b", part)) for part in found.groups())
    assert {"--json", "--seed"} < every and untrained == {"--model", "--dtype"}
    for name in COMMAND_NAMES.keys() - {"promote", "plan"}:  # they run no model
        params = build_command(name, load(COMMAND_NAMES, name)).params
        options = {option for param in params for option in param.opts}
        assert every <= options, name
        assert name.startswith("train-") or untrained <= options, name
        assert not name.startswith("train-") or not untrained & options, name


def test_every_make_target_of_the_pages_exists() -> None:
    text = "".join(map(text_of, PAGES))
    targets = set(re.findall(r"(?:`|^    )make ([a-z]+)\b", text, re.MULTILINE))
    makefile = text_of(ROOT / "Makefile")
    assert {"demo", "test", "lint", "bench", "baseline", "crash", "attack", "peers"} <= targets
    assert [name for name in targets if f"\n{name}:" not in makefile] == []


def test_the_tests_that_pages_show_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    blocks = [
        code
        for page in PAGES
        for code in re.findall(r"^```python\n(.+?)^```$", text_of(page), FLAGS)
        if "def test_the_cache_changes_nothing" in code
    ]
    assert len(blocks) == 3
    for code in blocks:
        space: dict[str, Any] = {}
        # my_decoder has a slip, which the test is there to find. One scenario shows it, and a few
        # tokens; the listing of the command plays them all.
        few = {name: scenarios.SCENARIOS[name] for name in ("decode", "crop")}  # which it cannot
        monkeypatch.setattr(api, "SCENARIOS", few)
        monkeypatch.setitem(api.verify.__kwdefaults__, "tokens", 12)
        exec(compile(code, "page", "exec", dont_inherit=True), space)
        given = {"kvtool_verify": kvtool.verify} if "kvtool_verify" in code else {}
        with pytest.raises(AssertionError, match="positions after the first step") as caught:
            space["test_the_cache_changes_nothing"](**given)
        if given:  # the page shows what pytest then says
            verdict, *lines = str(caught.value).splitlines()
            quoted = text_of(ROOT / "docs" / "ci.md")
            assert f"\nkvtool: {verdict}\n" in quoted
            told = [found.strip() for found in lines if re.match(" +(where|what): ", found)]
            assert len(told) == 2 and all(f"\n  {found}\n" in quoted for found in told)


# Links


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", FENCED.sub("", text_of(page))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_asks_the_question_of_every_page() -> None:
    index = text_of(ROOT / "docs" / "README.md")
    for page in DOCS:
        title, question = text_of(page).splitlines()[0].removeprefix("# "), page.name != "README.md"
        assert title.endswith("?"), page.name
        assert not question or f"| {title} | [{page.name}]({page.name})" in index, page.name


def test_a_page_named_in_the_code_exists() -> None:
    for path in sorted((ROOT / "kvtool").rglob("*.py")):
        for name in re.findall(r"docs/\w+\.md", text_of(path)):
            assert (ROOT / name).exists(), (path, name)


def test_the_readme_counts_the_bugs_of_the_sweep() -> None:
    sweep = text_of(ROOT / "docs" / "sweep.md")
    judged = re.findall(r"^\d+ types, (\d+) judged.* (\d+) bug,", sweep, re.MULTILINE)
    (causal, bugs), (both, theirs) = judged
    said = f"Of {causal} causal types {bugs} have a bug, and of {both} encoder-decoders {theirs}."
    assert said in " ".join(README.split())


# The journey, the tree, and what is added


def test_the_journey_is_as_long_as_it_says() -> None:
    rows = re.findall(r"^\| .+ \| \[(.+?)\]\((.+?)\) \| (\d+) \|$", JOURNEY, re.MULTILINE)
    said = re.search(r"\*\*all (\d+)\*\* \| \*\*([\d,]+)\*\*", JOURNEY)
    assert said is not None and len(rows) == int(said[1]) >= 10
    assert f"passes {said[1]} files, {said[2]} lines" in " ".join(README.split())
    counted = {name: len(text_of(ROOT / link).splitlines()) for name, link, _ in rows}
    assert int(said[2].replace(",", "")) == sum(int(n) for _, _, n in rows)
    total = sum(counted.values())
    assert abs(total - sum(int(n) for _, _, n in rows)) <= 0.05 * total, counted


def test_the_command_beside_the_journey_counts_its_files() -> None:
    command = re.search(r"wc -l ((?:.*\\\n)*.+)$", JOURNEY, re.MULTILINE)
    assert command is not None
    found = []
    for word in command[1].replace("\\\n", " ").split():
        before, names, after = re.fullmatch(r"(.*)\{(.+)\}(.*)", word).groups()
        found += [f"{before}{name}{after}" for name in names.split(",")]
    assert sorted(found) == sorted(re.findall(r"\[(\S+\.py)\]\(kvtool/core/\1\) \|", JOURNEY))


def test_what_the_journey_names_is_in_its_files() -> None:
    path = JOURNEY.partition("**The fast ways.**")[0]
    code = "".join(text_of(ROOT / link) for link in re.findall(r"\((kvtool/\S+\.py)\)", path))
    names = set(re.findall(r"`([A-Za-z_]+)`", path))
    assert {"begin", "attend", "visible"} <= names
    assert [name for name in names if not re.search(rf"\b(?:def|class) {name}\b", code)] == []


def test_the_fast_ways_are_named_as_they_are_told() -> None:
    table = JOURNEY.partition("| way | when |\n")[2]
    named = re.findall(r"^\| (\w.+?) \| \w", table, re.MULTILINE)
    one_call, graph = dispatch.ONE_CALL.name, dispatch.GRAPH.name
    assert named == [one_call, dispatch.LAYERWISE, graph, dispatch.FLAT, dispatch.MODULES]


def test_the_thresholds_of_the_journey_are_those_of_the_code() -> None:
    said = dict(re.findall(r"`([A-Z_]+)` \((\d+)\b", JOURNEY))
    assert said
    code = "".join(map(text_of, sorted((ROOT / "kvtool" / "core").rglob("*.py"))))
    for name, value in said.items():
        assert value in re.findall(rf"^{name} = (\d+)\b", code, re.MULTILINE), name


def test_the_tree_names_every_folder_and_none_that_is_not_there() -> None:
    named, above = set(), [""] * 8
    for line in text_of(ROOT / "docs" / "tree.md").splitlines():
        if found := re.match(r"((?:  )+)(\w+)/(?: |$)", line):
            depth = len(found[1]) // 2
            above[depth] = found[2]
            named.add("/".join(above[2 : depth + 1]))
    assert [name for name in named if not (ROOT / name).is_dir()] == []
    files = (path for top in ("kvtool", "tests") for path in (ROOT / top).rglob("*.py"))
    wings = {Path(name).name for name in named if name.startswith("kvtool/")}
    there = {str(path.parent.relative_to(ROOT)) for path in files}
    # A folder of tests has the name of the wing that it tests.
    assert {name for name in there - named if name.removeprefix("tests/") not in wings} == set()


def test_no_folder_of_the_tree_imports_one_above_it() -> None:
    _, _, core = text_of(ROOT / "docs" / "tree.md").partition("      core/\n")
    wings = re.findall(r"^ {8}(\w+)/ ", core.partition("    tests/")[0], re.MULTILINE)
    assert len(wings) > 5
    for at, wing in enumerate(wings):
        for path in (ROOT / "kvtool" / "core" / wing).rglob("*.py"):
            found = re.findall(r"^ *from kvtool\.core\.(\w+)", text_of(path), re.MULTILINE)
            assert not {*found} & {*wings[:at]}, path


def test_the_tables_to_add_to_are_where_the_readme_says() -> None:
    adding = README.partition("## Adding to it")[2]
    for path in re.findall(r"`(kvtool/[\w/.]+)`", adding):
        assert (ROOT / path).exists(), path
    code = "".join(map(text_of, sorted((ROOT / "kvtool").rglob("*.py"))))
    for table in re.findall(r"`([A-Z]+)`", adding):
        assert re.search(rf"^{table}(?:: .+)? = ", code, re.MULTILINE), table


def test_the_page_names_what_a_scenario_can_need() -> None:
    page = " ".join(text_of(ROOT / "docs" / "extending.md").split())
    named = re.search(r"Abilities are `ABILITIES` in \S+ (.+?)\.", page)
    assert named is not None and named[1].split(", ") == list(ABILITIES)


def test_the_scenario_of_the_page_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    page = text_of(ROOT / "docs" / "extending.md")
    script, line = re.findall(r"^```python\n# kvtool/core/verify/scen.+?\n(.+?)^```$", page, FLAGS)
    space = dict(vars(scenarios))
    exec(compile(script, "page", "exec", dont_inherit=True), space)
    added = eval(line, space)
    monkeypatch.setitem(scenarios.SCENARIOS, added.name, added)
    report = kvtool.verify(random_model(0), scenarios=[added.name], caches=["dynamic"])
    assert report.ok and {added.name} <= {finding.scenario for finding in report.findings}
