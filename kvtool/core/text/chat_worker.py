"""Renders a chat template in a process of its own, which `chat.render` starts and watches.

A template is an untrusted program. jinja2's sandbox keeps it from Python's objects, and the process
has no files, no network, no children, little memory and little time. stdin has {source,
conversations, variables, ...}; stdout gets {texts}, or {error, refused}. It imports only the
standard library and jinja2, which is not on the path of an isolated interpreter.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

OLDEST = (3, 1, 6)  # templates can escape the sandboxes of older versions of jinja2

LONGEST_ERROR = 300  # characters
# A template whose rendering makes Python and jinja2 import all they need, while files can be read.
WARM_UP = "{{ strftime_now('%c') }}{{ '\\n' | pprint | wordwrap | urlize | tojson }}"


class TooLong(Exception):
    """The text is longer than the limit."""


def make_environment() -> Any:
    """A sandbox that offers templates the same as transformers, and no more.

    Raises ImportError for a jinja2 older than OLDEST.
    """
    import jinja2.constants  # jinja2 would import it later, when no file can be opened
    import jinja2.debug
    import jinja2.ext
    import jinja2.sandbox

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < OLDEST:
        raise ImportError(f"jinja2 {jinja2.__version__} is too old")

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks the text of an assistant; its body is rendered as usual."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["dict"] = NewDict()
    environment.globals["namespace"] = namespace_of(jinja2)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class NewDict:
    """A substitute for the type `dict`, through whose attributes a template might escape."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*args)


def namespace_of(jinja2: Any) -> Any:
    """The class of jinja2's namespace without names that Python itself looks up."""

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc]
        def __init__(*args: Any, **kwargs: Any) -> None:  # so `self` stays free, as in jinja2
            for name in dict(*args[1:], **kwargs):
                check(name)
            jinja2.utils.Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return Namespace


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """A value as JSON; the filter of jinja2 would escape < for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def confine(seconds: int, nbytes: int) -> None:
    """Limit this process to `seconds` of CPU time, `nbytes` of address space, and no new files."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    end = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (end, end + 1))
    for kind, limit in (
        (resource.RLIMIT_AS, nbytes),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def render(template: Any, limit: int, variables: dict[str, Any]) -> str:
    """Render one text. Raises TooLong as soon as it exceeds `limit` characters, and
    UnicodeEncodeError for half a surrogate pair."""
    parts, size = [], 0
    for part in template.generate(**variables):
        size += len(part)
        if size > limit:
            raise TooLong
        parts.append(part)
    text = "".join(parts)
    text.encode()  # raises for half a surrogate pair
    return text


def answer(asked: dict[str, Any], environment: Any) -> dict[str, Any]:
    """The rendered texts, or an error with its reason."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        template = environment.from_string(asked["source"])
        common = {**asked["variables"], "tools": None, "documents": None}
        texts = [
            render(
                template,
                asked["characters"],
                {**common, "messages": messages, "add_generation_prompt": True},
            )
            for messages in asked["conversations"]
        ]
    except TooLong:
        return {"error": "long", "said": ""}
    except MemoryError:
        return {"error": "memory", "said": ""}
    except RecursionError:
        return {"error": "deep", "said": ""}
    except TemplateSyntaxError as error:
        return {"error": "failed", "said": f"line {error.lineno}: {error.message}"[:LONGEST_ERROR]}
    except TemplateError as error:
        return {"error": "failed", "said": str(error)[:LONGEST_ERROR]}
    except Exception as error:  # a template can raise anything
        return {"error": "failed", "said": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}
    return {"texts": texts}


def main() -> None:
    """Read a request from stdin and write the answer to stdout, both as JSON."""
    asked = json.loads(sys.stdin.buffer.read())
    sys.path += asked["path"]
    environment = make_environment()
    environment.from_string(WARM_UP).render()
    confine(asked["seconds"], asked["nbytes"])
    found = answer(asked, environment)
    sys.stdout.buffer.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
