"""A chat template is a program by a stranger: what it may not reach, and what it may not use up."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kvtool.core.text import chat
from kvtool.core.text.chat import ChatTemplate, conversation
from kvtool.ending import Ended
from kvtool.errors import UsageError

HINT = "Leave --chat out, and write the prompt as the model expects it."


def refusal(source: str, system: str | None = None) -> str:
    """Why a template is refused, after the words that name it."""
    with pytest.raises(UsageError) as caught:
        chat.render(ChatTemplate(source, {}, Path("t.jinja")), [conversation("hi", system)])
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2 and caught.value.hint == HINT
    return caught.value.message.removeprefix("--chat: the template in t.jinja ")


LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (f"{{% for i in range(10**9) %}}{END}", "cannot write this conversation (OverflowError"),
        (f"{LOOP}{LOOP}{END}{END}", "takes more than 1 s of processor time"),
        ("{{ 3 ** (10**8) > 0 }}", "takes more than 1 s of processor time"),
        ("{{ 'x' * 10**10 }}", "takes more than 512 MiB of memory"),
        ("{{ '%01000000000d' % 1 }}", "takes more than 512 MiB of memory"),
        ("{{ [0] * 10**9 }}", "takes more than 512 MiB of memory"),
        ("{% set l = namespace(x='x') %}" + LOOP + "{% set l.x = l.x ~ l.x %}" + END, "takes more"),
        ("{{ 'x' * 2000000 }}", "writes more than 1,048,576 characters"),
        (f"{LOOP}{{{{ 'x' * 1000 }}}}{END}", "writes more than 1,048,576 characters"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself too often"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "calls itself too often"),
    ],
)
def test_a_template_that_takes_too_much_is_refused(
    monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1)
    assert refusal(source).startswith(reason)


def test_half_a_character_is_no_text() -> None:
    assert refusal("{{ '\\ud800' }}").startswith(
        "cannot write this conversation (UnicodeEncodeError"
    )


@pytest.mark.parametrize(
    "output",
    [b"", b"[]", b'{"texts": []}', b'{"texts": ["a", "b"]}', b'{"texts": [1]}', b"[" * 10**5,
     b'{"texts": ["a"], "texts": ["b"]}', b'{"error": "other", "said": ""}', b'{"error": "failed"}',
     b'{"error": "failed", "said": 3}'],
)  # fmt: skip
def test_what_the_worker_cannot_have_written_is_not_taken_for_its_answer(
    monkeypatch: pytest.MonkeyPatch, output: bytes
) -> None:
    monkeypatch.setattr(chat, "_run_worker", lambda data: (0, output))
    assert refusal("x") == "ended the process that rendered it"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ cycler.__init__.__globals__ }}", "__init__"),
        ("{{ (''|attr('__class__')).x }}", "__class__"),
        ("{{ ''.format.__self__.x }}", "__self__"),
        ("{{ '{0.__class__.x}'.format(messages) }}", "__class__"),
        ("{{ raise_exception.__globals__.x }}", "__globals__"),
        ("{{ strftime_now.__closure__.x }}", "__closure__"),
        ("{{ dict.__call__.x }}", "__call__"),
        ("{% set n = namespace(__class__=1) %}", "__class__"),
        ("{% set n = namespace() %}{% set n.__call__ = 1 %}", "__call__"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages[0].update(role='x') }}", "update"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
    ],
)
def test_a_template_reaches_nothing(source: str, what: str) -> None:
    said = refusal(source)
    assert said.startswith("cannot write this conversation (") and what in said


def test_whatever_gets_out_of_the_sandbox_finds_no_file_and_no_network(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    confined = chat.WORKER.read_text().replace(
        'environment.globals["raise_exception"] = raise_exception',
        'environment.globals["python"] = lambda text: eval(text, {"os": os, "socket": socket})',
    )
    assert '"python"' in confined
    worker.write_text(f"import os, socket\n{confined.replace('from __future__', '# ')}")
    source = "{{ python(messages[0].content) }}"
    for attempt in ("open('/etc/passwd')", "socket.socket()", "os.listdir('/')", "os.pipe()"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat, "WORKER", worker)
            with pytest.raises(UsageError, match="OSError"):
                chat.render(ChatTemplate(source, {}, worker), [conversation(attempt, None)])


def test_the_environment_of_the_user_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    worker = tmp_path / "worker.py"
    worker.write_text("import json, os; print(json.dumps({'texts': [' '.join(os.environ)]}))")
    monkeypatch.setattr(chat, "WORKER", worker)
    (pieces,) = chat.render(ChatTemplate("", {}, worker), [conversation("", None)])
    passed_on = {name for text, _ in pieces for name in text.split()}
    assert "TZ" in passed_on and passed_on <= {"TZ", "LD_LIBRARY_PATH", "LC_CTYPE"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% if %}", "line 1: Expected an expression"),
        ("a\n{% endfor %}", "line 2: "),
        ("{{ raise_exception('two\nlines') }}", "two lines"),
        ("{{ messages[0].nothing.more }}", "'dict object' has no attribute 'nothing'"),
        ("{{ 1 + 'a' }}", "TypeError: "),
        ("{{ raise_exception('x' * 10**6) }}", "x" * 300 + ")"),
    ],
)
def test_what_a_template_says_is_in_the_refusal(source: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        chat.render(ChatTemplate(source, {}, Path("t")), [conversation("hi", None)])
    assert said in " ".join(caught.value.message.split())


def test_a_template_without_a_system_role_says_what_to_leave_out() -> None:
    source = "{{ raise_exception('System role not supported') }}"
    assert "(System role not supported)" in refusal(source)
    with pytest.raises(UsageError) as caught:
        chat.render(ChatTemplate(source, {}, Path("t")), [conversation("hi", "be brief")])
    assert caught.value.hint == "Leave --system out."


# The process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("signals_as_in_the_app")
def test_a_signal_ends_the_process_that_renders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    worker, pid = tmp_path / "worker.py", tmp_path / "pid"
    worker.write_text(
        "import os, signal\n"
        f"open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        f"os.kill(os.getppid(), {int(number)})\n"
        "while True: signal.pause()\n"
    )
    monkeypatch.setattr(chat, "WORKER", worker)
    with pytest.raises(Ended):
        chat.render(ChatTemplate("", {}, worker), [conversation("hi", None)])
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.abort()", "ended the process that rendered it"),
        ("raise SystemExit(3)", "ended the process that rendered it"),
        ("print('no JSON')", "ended the process that rendered it"),
        ("import signal; signal.pause()", "is not done after 1 s"),
    ],
)
def test_a_process_that_gives_no_answer_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    program: str,
    reason: str,
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(program)
    monkeypatch.setattr(chat, "WORKER", worker)
    if "pause" in program:
        monkeypatch.setattr(chat, "WAIT_SECONDS", 1)
    assert refusal("") == reason


def test_many_conversations_have_more_time() -> None:
    assert [chat.seconds_for(n) for n in (1, 999, 1000, 5000)] == [2, 2, 3, 7]
