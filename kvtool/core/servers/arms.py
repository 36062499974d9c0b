"""The arms: sequences of requests whose answers depend on the server's cache."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kvtool.core.servers.client import Refused
from kvtool.core.servers.engine import Engine, NotFinite
from kvtool.core.servers.texts import FORKED, MIN_VARIANTS, TAIL, Measured, Prompt

CUT_TAIL = 8
FRESH = 4  # tokens
DECODED = 4  # of the server's own tokens that a next turn must reuse at least
FIRST_OF_LONG = 8  # tokens before the cut in a long text, and tokens that are cut
MAX_CORRECTIONS = 4  # times that a diverging continuation is corrected
LONG_TAIL = 32
AROUND = 64  # tokens; kernels change there, so the boundaries of a long prompt lie about a multiple
MAX_CHUNK = 2**16  # tokens, and MAX_SLOTS: larger servers would need too many requests
MAX_SLOTS = 64
FILLERS = 8  # tokens of the requests that evict a prompt from its slot
NO_SAVING = 501  # the HTTP code of a server without --slot-save-path


def warm_prefix(prompt: Prompt, into: Measured) -> None:
    """A prefix that another request left in the cache, then the rest."""
    for split in prompt.splits():
        prompt.ask(prompt.parted(split))
        prompt.probe(into, split)


def long_prefix(prompt: Prompt, into: Measured) -> None:
    """Prefixes that end before, at and behind the end of a prefill chunk."""
    chunk = prompt.engine.chunk
    for split in (prompt.random.randrange(chunk // 2, chunk), chunk, chunk + chunk // 16):
        prompt.begin()
        prompt.ask(prompt.parted(split))
        prompt.probe(into, split)


def decode(prompt: Prompt, into: Measured) -> None:
    """Tokens decoded one by one, compared with a prefill of the same tokens. If the server
    continues differently, its text is corrected and it is asked again."""
    prompt.ask(prompt.ids[: prompt.n_prompt - 1])
    begin = prompt.n_prompt
    for _ in range(MAX_CORRECTIONS):
        found = prompt.ask(prompt.ids[:begin], prompt.end - begin + 1)
        answers = list(prompt.shared(found, begin))
        if judged := [f for f in answers if f[0] >= prompt.start]:
            into.add(judged, found.reused)
        begin = max(begin + len(answers), begin + 1, prompt.start)
        if begin > prompt.end:
            return


def turns(prompt: Prompt, into: Measured) -> None:
    """The next turn of a chat: the server decodes an answer, which is then part of the prompt, with
    more behind it. What was decoded must be reused too."""
    into.least = prompt.n_prompt + DECODED
    for length in prompt.replies():
        prompt.begin()
        _reply(prompt, length)
        prompt.probe(into, length)


def _reply(prompt: Prompt, length: int) -> None:
    """Let the server decode the text up to this length. The last token of an answer is in no cache
    yet. If the server continues differently, its text is corrected and it is asked again."""
    begin = prompt.n_prompt
    for _ in range(MAX_CORRECTIONS):
        found = prompt.ask(prompt.ids[:begin], length - begin + 1)
        begin += common(found.tokens, prompt.ids[begin : length + 1]) + 1
        if begin > length:
            return


def fork(prompt: Prompt, into: Measured) -> None:
    """A fork: one prefix, another decoded continuation, then the first continuation again."""
    split = prompt.split(0)
    prompt.ask(prompt.ids)
    prompt.ask(prompt.parted(split), FORKED)
    prompt.probe(into, split)


def between(prompt: Prompt, into: Measured) -> None:
    """Another request in between, which shares nothing."""
    split = prompt.split(1)
    other = prompt.ids[:0:-1][: prompt.n_prompt // 2]
    prompt.ask(prompt.ids[:split], anywhere=True)
    prompt.ask(other, FORKED, anywhere=True)
    prompt.probe(into, split, anywhere=True)


def second_slot(prompt: Prompt, into: Measured) -> None:
    """Another request at the same time."""
    split = prompt.split(2)
    prompt.ask(prompt.ids[:split], anywhere=True)
    with prompt.beside(cached=True):
        prompt.probe(into, split, anywhere=True)


def evicted(prompt: Prompt, into: Measured) -> None:
    """One request more than there are slots: the prompt is evicted, and must be computed or
    restored."""
    if not prompt.engine.slots:
        into.unsupported = "it has no slots to fill"
        return
    if prompt.engine.slots > MAX_SLOTS:
        into.unsupported = f"it has more than {MAX_SLOTS} slots to fill"
        return
    prompt.ask(prompt.ids[: prompt.end - 1], anywhere=True)
    for _ in range(prompt.engine.slots + 1):
        prompt.ask(prompt.others(FILLERS), anywhere=True)
    prompt.probe(into, prompt.start - 1, anywhere=True)


def restored(prompt: Prompt, into: Measured) -> None:
    """A slot saved to a file, and read from there into another slot that held something else."""
    if prompt.slot is None or prompt.other_slot is None:
        into.unsupported = "it has no slots to save"
        return
    prompt.ask(prompt.ids[: prompt.end - 1])
    try:
        prompt.engine.file_slot(prompt.slot, "save")
        prompt.ask(prompt.others(FILLERS), slot=prompt.other_slot)
        n_restored = prompt.engine.file_slot(prompt.other_slot, "restore")
    except Refused as error:
        why = f"it failed to save and restore a slot: {error.message}"
        into.unsupported = "--slot-save-path is not set" if error.code == NO_SAVING else why
        return
    if not n_restored:  # reused tokens come from elsewhere then
        into.unsupported = "it restored no tokens of a slot"
        return
    prompt.probe(into, prompt.start - 1, slot=prompt.other_slot)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the prefix that two texts share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def cut(prompt: Prompt, into: Measured) -> None:
    """A text without its middle, so that the rest moves to lower positions. A server that shifts
    cached keys answers by design with keys of another history."""
    into.approximate = True
    longest = 0
    for text, first, last in _to_cut(prompt):
        rest, longest = [*text[:first], *text[last:]], len(text) - last
        prompt.begin()
        prompt.ask(text)
        found = prompt.ask(rest, CUT_TAIL + 1)
        if found.reused is not None and found.reused > common(rest, text):
            shorter = Prompt(prompt.engine, prompt.number, rest, CUT_TAIL)
            into.cold = shorter.cold
            # The first history has one shape alone, so its noise is that of the other texts.
            into.cold.answers[shorter.n_prompt] *= MIN_VARIANTS
            into.add(shorter.shared(found, shorter.n_prompt), found.reused)
            return
    into.unsupported = f"it reuses nothing behind a cut, up to {longest} tokens"


def _to_cut(prompt: Prompt) -> Iterator[tuple[list[int], int, int]]:
    """A text, and the ends of what is cut from it: a middle third, or little of a long text, since
    a server shifts pieces of so many tokens alone (--cache-reuse of llama.cpp, often 256). Each
    begins as no text before, so that what it reuses is not what an earlier visit left."""
    fresh = [random.SystemRandom().choice(prompt.ids) for _ in range(FRESH)]
    yield [*fresh, *prompt.ids], prompt.n_prompt // 3, 2 * prompt.n_prompt // 3
    text = [*fresh[::-1], *prompt.ids, *prompt.more]
    fits = not 0 < prompt.engine.context <= len(text) + CUT_TAIL + 1
    if prompt.more and fits:
        yield text, FIRST_OF_LONG, 2 * FIRST_OF_LONG


class Arm(NamedTuple):
    """One arm: what is done to a cache, and whether it needs a long prompt."""

    about: str
    play: Callable[[Prompt, Measured], None]
    long: bool = False
    crowded: bool = False  # whether others' tokens lie between: no cold request varies that


ARMS: dict[str, Arm] = {
    "prefix": Arm("a prefix that another request left, then the rest", warm_prefix),
    "decode": Arm("tokens decoded one by one, against a prefill of them", decode),
    "turns": Arm("the server's own answer, then the next turn of a chat", turns),
    "fork": Arm("one prefix, two continuations, the first again", fork),
    "between": Arm("another request in between", between, crowded=True),
    "slot": Arm("another request at the same time", second_slot, crowded=True),
    "evicted": Arm(
        "more other requests than there are slots, then the first again", evicted, crowded=True
    ),
    "restored": Arm("a slot saved to a file, and read from there", restored, crowded=True),
    "cut": Arm("a prompt cut in the middle (reuse with shifted positions)", cut),
    "long": Arm("a prompt longer than what is computed at a time", long_prefix, long=True),
}
SHORT = [name for name, arm in ARMS.items() if not arm.long]


def play(prompt: Prompt, name: str) -> Measured:
    """Play one arm on one prompt. NaN from the cache counts as an answer. Raises ServerError."""
    measured = Measured(name, prompt.number, prompt.cold, least=prompt.least)
    prompt.tally = measured.tally
    prompt.begin()
    try:
        ARMS[name].play(prompt, measured)
    except NotFinite:
        measured.add([(prompt.end, {})], None)
    return measured


def open_prompt(
    engine: Engine, number: int, prompts: Sequence[Sequence[int]], tail: int = TAIL
) -> Prompt:
    """Ask for the cold answers that cached answers to a prompt are compared with.

    Raises ServerError.
    """
    prompt = Prompt(engine, number, prompts[number], tail)
    prompt.more = [i for ids in (*prompts[number + 1 :], *prompts[:number]) for i in ids]
    prompt.add_company()
    prompt.add_controls()
    return prompt


def lengthened(prompts: Sequence[Sequence[int]], engine: Engine) -> list[int]:
    """A prompt longer than a prefill chunk, joined from shorter ones; [] if it exceeds the context,
    or the engine does not report its sizes."""
    length = engine.chunk + engine.chunk // 8
    length = length // AROUND * AROUND - LONG_TAIL // 2
    fits = not 0 < engine.context <= length + LONG_TAIL + FORKED
    if not 0 < engine.chunk <= MAX_CHUNK or not fits:
        return []
    joined = [i for ids in prompts for i in ids]
    return (joined * (length // len(joined) + 1))[:length]
