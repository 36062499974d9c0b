"""Nothing is injected: text of others cannot steer a terminal, a spreadsheet or a renderer."""

from __future__ import annotations

import ast
import csv
import inspect
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cli_probe
import kvtool
import terminals
from cli_probe import Ran
from kvtool import app
from kvtool.core.checkpoint import checkpoint
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.ui import documents, inert
from kvtool.ui.output import Notes, Output
from kvtool.ui.problems import error_line
from kvtool.ui.tables import Column
from small_models import random_model, save_decoder
from terminals import EVIL, SEEN, obeyed

on_terminal = terminals.on_terminal
PLACE = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a folder with an evil name."""
    return save_decoder(tmp_path_factory.mktemp("models") / EVIL, n_layers=1)


@pytest.fixture(scope="module")
def evil_speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokens are the letters of EVIL, so that it says little else."""
    tokenizer = Tokenizer.train("char", [EVIL])
    folder = tmp_path_factory.mktemp("speaker")
    checkpoint.save(folder, random_model(vocab_size=tokenizer.vocab_size), tokenizer)
    return folder


# Characters


def test_what_steers_is_an_escape_and_what_is_read_stays() -> None:
    assert inert.visible(EVIL) == SEEN
    plain = "häß 本 \u00a0 👩\u200d🔬 \t\n"  # a no-break blank, and a joined picture
    assert inert.visible(plain + "\r\n") == plain + "\n"
    assert inert.in_a_line("a\tb\nc\udcff") == "a\\tb\\nc\\udcff"


def test_no_control_or_reordering_character_of_unicode_is_left() -> None:
    every = set(map(chr, range(0x110000)))
    gone = every - set(inert.visible("".join(sorted(every))))
    marks = set("\u061c\u200e\u200f") | set(map(chr, range(0x206A, 0x2070)))  # also deprecated ones
    assert gone == set(obeyed("".join(every))) | marks


# Everything that Output prints


PRINTS: dict[str, Callable[[Output], Any]] = {
    "table": lambda out: out.table(EVIL, [EVIL, Column(EVIL, spare=1)], [[EVIL, EVIL]]),
    "text": lambda out: out.text(EVIL),
    "echo": lambda out: out.echo(EVIL),
    "verdict": lambda out: out.verdict(False, EVIL),
    "stream": lambda out: out.stream(EVIL),
    "note": lambda out: out.note(EVIL),
    "hint": lambda out: out.hint(EVIL),
    "warn": lambda out: out.warn(EVIL),
    "detail": lambda out: out.detail(EVIL),
    "progress": lambda out: show_bar(out, EVIL),
    "annotate": lambda out: (setattr(out, "github", True), out.annotate([EVIL])),
    "draw_later": lambda out: (
        out.draw_later(Path(EVIL), lambda *_: None),
        out._later[0](None, {}),
    ),
    "warn_of_failed": lambda out: (out.failed.append(OSError(EVIL)), out.warn_of_failed()),
}
PRINTS_NOTHING = {  # that it is given
    "interactive", "documented", "later", "attempt", "telling", "without_commands",
}  # fmt: skip


def show_bar(out: Output, words: str) -> None:
    with out.progress(words, total=2) as bar:
        bar.update(words, loss=words)
        bar.advance()


def test_every_way_to_print_is_tried_below() -> None:
    public = {name for name, _ in inspect.getmembers(Output) if not name.startswith("_")}
    assert public == PRINTS.keys() | PRINTS_NOTHING


@pytest.mark.parametrize("name", PRINTS)
def test_a_terminal_is_sent_escapes_of_what_would_steer_it(
    on_terminal: Callable[..., str], name: str
) -> None:
    sent = on_terminal(lambda: PRINTS[name](Output(verbose=True)))
    assert obeyed(sent) == []
    assert "\\x1b]0;evil" in sent


def test_the_caption_and_what_the_core_says_are_inert_too(on_terminal: Callable[..., str]) -> None:
    def work() -> None:
        out = Output()
        out.caption = EVIL
        out.table("", ["a"], [["b"]])
        logging.getLogger("kvtool").info("about %s", EVIL)
        Notes.take(Output())

    sent = on_terminal(work)
    assert obeyed(sent) == [] and sent.count(SEEN[:12]) == 2


def test_a_name_cannot_begin_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    name, out = "x\n✓ no bug", Output()
    out.text(name)
    out.verdict(False, name)
    out.table(name, [name], [[name]])
    out.note(name)
    out.warn(name)
    out.hint(name)
    captured = capsys.readouterr()
    lines = (captured.out + captured.err).splitlines()
    assert not [line for line in lines if line.lstrip().startswith("✓")]


def test_brackets_are_no_markup_of_a_progress_bar(on_terminal: Callable[..., str]) -> None:
    sent = on_terminal(lambda: show_bar(Output(), "[link=x]a[/link] [/b] :smile:"))
    assert "[link=x]a[/link] [/b] :smile:" in sent


def test_a_pipe_gets_what_a_model_writes_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Output().stream(EVIL)
    assert capsys.readouterr().out == EVIL


def test_a_name_that_is_no_utf8_can_be_printed_and_written(
    kv: Callable[..., Ran], tmp_path: Path
) -> None:
    name = os.fsdecode(b"\xff.md")
    ran = kv("--output", str(tmp_path / name))
    assert ran.code == 0 and "\\udcff.md" in ran.err
    assert documents.to_markdown(name, [{name: name}]).encode()
    assert documents.to_csv([{name: name}]).encode()


# Errors, tracebacks, and what libraries say


@pytest.mark.parametrize("work", ["lines", "defect", "panic"])
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_errors_and_tracebacks_are_inert(
    probe_command: None,
    on_terminal: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    work: str,
    debug: list[str],
) -> None:
    def defect() -> None:
        raise ZeroDivisionError(EVIL)

    monkeypatch.setitem(cli_probe.WORK, "defect", defect)
    codes: list[int] = []
    sent = on_terminal(lambda: codes.append(app.run(["probe", "-q", "--work", work, *debug])))
    assert codes == [2] and obeyed(sent) == [] and "\\x1b" in sent


def test_an_error_joins_its_lines_and_keeps_letters() -> None:
    assert error_line("a\r\n b\u2028c\td", "é 本\u200d") == "kvtool: error: a b c\\td. é 本\u200d"


@pytest.fixture
def guarded() -> Iterator[None]:
    """Libraries are listened to as in the app."""
    shown, made = warnings.showwarning, logging.getLogRecordFactory()
    inert.guard_libraries()
    yield
    warnings.showwarning = shown
    logging.setLogRecordFactory(made)


def test_warnings_and_logs_of_libraries_are_inert(
    guarded: None, on_terminal: Callable[..., str]
) -> None:
    def work() -> None:
        handler, logger = logging.StreamHandler(), logging.getLogger("a library")
        logger.addHandler(handler)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            inert.guard_libraries()  # pytest shows warnings in its own way
            warnings.warn(EVIL, stacklevel=1)
            logger.warning("tensor %s", EVIL)
        logger.removeHandler(handler)

    sent = on_terminal(work)
    assert obeyed(sent) == [] and sent.count(SEEN[:12]) >= 2


def test_the_app_listens_to_libraries(monkeypatch: pytest.MonkeyPatch, kv: Any) -> None:
    called: list[str] = []
    monkeypatch.setattr(app, "guard_libraries", lambda: called.append("guarded"))
    with pytest.raises(SystemExit):
        app.main(["--version"])
    assert called == ["guarded"]


PRINTERS = {"ui/output.py", "ui/problems.py", "ui/inert.py", "app.py", "core/text/chat_worker.py"}


def test_nothing_prints_but_the_sink() -> None:
    package = Path(kvtool.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "typer.echo", "os.write") or (
                    called.startswith("sys.std") and called.endswith(".write")
                ):
                    found.add(path.relative_to(package).as_posix())
    assert found <= PRINTERS and {"ui/output.py", "app.py"} <= found


# Whole commands


def run_on(on_terminal: Callable[..., str], *args: str) -> tuple[int, str]:
    codes: list[int] = []
    sent = on_terminal(lambda: codes.append(app.run([*args, *PLACE])))
    return codes[0], sent


def test_what_a_model_writes_and_a_prompt_says_is_inert_on_a_terminal(
    on_terminal: Callable[..., str], evil_speaker: Path, tmp_path: Path
) -> None:
    given = ["generate", "--model", str(evil_speaker), "--max-tokens", "40"]
    for more in ([], ["--beams", "8", "--n-best", "8"]):
        out = tmp_path / f"{EVIL.replace('/', '')}.json"
        code, sent = run_on(on_terminal, *given, "--prompt", EVIL, *more, "--output", str(out))
        assert code == 0 and obeyed(sent) == []
        texts = "".join(each["text"] for each in json.loads(out.read_text())["results"])
        assert obeyed(texts)  # or nothing would be shown by this
    assert SEEN in sent


def test_a_pipe_gets_the_bytes_that_the_document_holds(
    kv: Callable[..., Ran], evil_speaker: Path
) -> None:
    given = ["--model", str(evil_speaker), "--max-tokens", "40", "--prompt", "a", *PLACE]
    ran = kv(*given, command="generate")
    document = kv(*given, "--json", command="generate").out
    assert document.isascii()
    assert ran.out == json.loads(document)["results"][0]["text"] + "\n"


def test_names_of_models_files_and_fields_of_a_baseline_are_inert(
    on_terminal: Callable[..., str],
    decoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--lengths", "2", "--repeats", "1", "--prompt-length", "2", "--caches", "static"]
    bench = ["bench", "--model", str(decoder), *small]
    assert run_on(on_terminal, *bench, "--save", "mine")[0] == 0
    baseline = json.loads((tmp_path / ".benchmarks/kvtool/mine.json").read_text())
    baseline["environment"]["cpu"] = baseline["kernels"] = EVIL
    theirs = tmp_path / f"{EVIL}.json"
    theirs.write_text(json.dumps(baseline))
    plot = tmp_path / f"{EVIL}.png"
    code, sent = run_on(on_terminal, *bench, "--compare", str(theirs), "--plot", str(plot))
    assert code == 0 and plot.exists()
    assert obeyed(sent) == []
    # The caption, the baseline's name in a title and a warning with its processor, and the plot.
    assert sent.count("\\x1b]0;evil") >= 5


# Documents


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        *[(f"{c}cmd|' /C calc'!A0", f"'{c}cmd|' /C calc'!A0") for c in "=+-@\t＝＋－＠"],
        ("\r=1", "\\r=1"),
        (" =1", "' =1"),
        ("a;=1;b", "a;'=1;b"),  # where a comma is no separator
        ('a\n"=1"', 'a\n\'"=1"'),
        ("plain - text", "plain - text"),
        (-1.5, "-1.5"),
        (float("-inf"), ""),
        (EVIL, SEEN),
    ],
)
def test_no_cell_of_a_csv_is_a_formula_and_numbers_are_numbers(cell: Any, written: str) -> None:
    read = list(csv.reader(io.StringIO(documents.to_csv([{"a": "x", "b": cell}]))))
    assert read == [["a", "b"], ["x", written]]


def test_a_name_of_a_column_is_no_formula_either() -> None:
    assert documents.to_csv([{"=1": 2}]) == "'=1\n2\n"


def test_many_lines_of_a_cell_take_time_by_their_number() -> None:
    assert documents.to_csv([{"a": "\n \t" * 200_000}]).count("\n") == 200_002


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<img src=x onerror=y>&amp;", "&lt;img src=x onerror=y>&amp;amp;"),
        ("![a](http://b)", "!\\[a\\](http&#58;//b)"),
        ("www.a.b, @c", "www&#46;a.b, &#64;c"),
        ("a\n\n# b | c", "a  \\# b \\| c"),
        ("\\|`*~", "\\\\\\|\\`\\*\\~"),
        ("> quoted -> not", "\\> quoted -> not"),
        (EVIL, SEEN.replace("\\", "\\\\").replace("]", "\\]").replace("[", "\\[")),
    ],
)
def test_markdown_shows_texts_and_takes_none_for_markup(text: str, written: str) -> None:
    found = documents.to_markdown(text, [{text: text}], text, text, {text: [{"a": text}]})
    cell = f"| {written} |\n"
    assert found == (
        f"# {written}\n\n{written}\n\n{cell}| --- |\n{cell}\n"
        f"## {written}\n\n| a |\n| --- |\n{cell}\n{written}\n"
    )
