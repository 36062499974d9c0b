"""A user's own decoder as a subject. kvtool.core.verify.target documents the protocol."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kvtool.core.verify.compare import distances
from kvtool.core.verify.copies import converted, widened
from kvtool.core.verify.fingerprint import fingerprint
from kvtool.core.verify.scenario_run import PREFILL, STEPS
from kvtool.core.verify.scenarios import GENERATED
from kvtool.core.verify.schedules import NORMAL, THOROUGH, Bounds
from kvtool.core.verify.subject import Same, SharedPasses, Start
from kvtool.core.verify.target import cost, saving, vacuous
from kvtool.core.verify.target.attributes import (
    contents,
    device_of,
    outermost,
    owned_modules,
    unwrap_attributes,
    whole_number,
)
from kvtool.core.verify.target.clues import sizes, special_ids
from kvtool.core.verify.target.eager import eager, quiet
from kvtool.core.verify.target.fitting import AGREES, adapt
from kvtool.core.verify.target.limits import Limits, find_limits
from kvtool.core.verify.target.moves import MovedCopies
from kvtool.core.verify.target.refusals import is_refusal
from kvtool.core.verify.target.session import TargetSession
from kvtool.core.verify.widened import Room, copy_crowds
from kvtool.errors import UsageError, first_line, pass_on_shortage

NEEDED = 2 * (PREFILL + STEPS)  # tokens that the longest scenario feeds, and some more
LEAST = 24  # tokens without which a check would be of little
CONTEXT_NAMES = (
    "context", "context_length", "block_size", "max_position_embeddings", "n_positions", "n_ctx",
    "max_seq_len", "max_seq_length", "max_len", "seq_len",
)  # fmt: skip


class TargetSubject:
    """A decoder that was given by its user: an object of the protocol, or an nn.Module.

    vocab_size, context: 0 looks for them. Raises UsageError if it cannot be called.
    """

    stores, converts = True, False
    pure = False  # as far as anyone knows
    passes: SharedPasses | None = None
    source_vocab_size = 0
    window = 0
    rounds_alike = False  # of what the cache rounds
    level = NORMAL  # of the schedules that are fed by default
    limits = Limits()

    def __init__(self, given: Any, name: str, vocab_size: int = 0, context: int = 0) -> None:
        self.name = name
        self.session: Callable[[TargetSubject, Start], Any] = TargetSession
        for module in owned_modules(given).values():
            module.eval()
        with torch.inference_mode(), quiet():
            self.device = device_of(given)
            if self.device.type == "meta":
                text = f"{name}: its weights are on the meta device, and hold no numbers"
                raise UsageError(text, "Load them, or build the decoder on the CPU.")
            known = context or whole_number(given, CONTEXT_NAMES)
            self._check_context(known or NEEDED)
            self.room = min(known or NEEDED, NEEDED)  # tokens, while it is tried out
            self.notes = unwrap_attributes(given) if is_decoder(given) else ()
            self.decoder: Any = given if is_decoder(given) else adapt(given, name, self.device)
            n_ids = vocab_size or whole_number(given, ("vocab_size",))
            self.vocab_size, self.dtype = self._probe(n_ids)
            self.context = known or self._longest()
            self.limits = self.step_limits()
            self.context = min(self.context, self.limits.capacity or self.context)
            self.abilities = self._abilities()
            self.sizes = sizes(given, self.context)
            self.special_ids = self.find_special_ids(given)
        self._check_context(self.context)
        self.lossy = self._declares_loss(given)
        self.fed_little = False  # most sizes of steps take too long
        self.reach = 0  # tokens of the longest history that is fed; 0: its cost is not known yet
        self.moves = MovedCopies()
        self._vacuous: tuple[str | None] | None = None

    def _check_context(self, n: int) -> None:
        """Raises UsageError for a decoder that holds too few tokens."""
        if n < LEAST:
            raise UsageError(
                f"{self.name}: holds {n} tokens (expected {LEAST} or more)",
                "A check feeds about that many: build it with a longer context.",
            )

    @property
    def guess(self) -> str:
        """How an nn.Module is called, in words; "" for a decoder of the protocol."""
        words = (getattr(self.decoder, "guess", ""), *self.notes, self.limits.words)
        return "; ".join(filter(None, words))

    @property
    def largest_step(self) -> int:
        """The most tokens that a step takes, 0 for any number."""
        return self.limits.largest_step

    @property
    def single_steps_only(self) -> bool:
        """Whether steps behind the first take one token."""
        return self.limits.single_steps_only

    @property
    def largest_pass(self) -> int:
        """The most tokens that an uncached pass takes, 0 for any number within the context."""
        return self.limits.largest_pass

    def step_limits(self) -> Limits:
        """The most tokens of its steps, prompts and passes."""
        return find_limits(self)

    # Calls

    def call_full(self, ids: Tensor, start: Start | None = None) -> Tensor:
        """One call of full: (B,T) -> (B,T,V), or (B,1,V) from a decoder that answers the last."""
        padding = None if start is None else start.padding
        with eager():
            logits = self.decoder.full(*([ids] if padding is None else [ids, padding]))
        return shaped(logits, ids, "full")

    def full(self, ids: Tensor, start: Start) -> Tensor:
        logits = self.call_full(ids, start)
        if logits.shape[1] == ids.shape[1]:
            return logits
        ends = range(1, ids.shape[1])
        return torch.cat([*(self.call_full(ids[:, :n], start) for n in ends), logits], dim=1)

    def last_of(self, ids: Tensor, start: Start, n: int) -> Tensor:
        """The uncached logits (B,n,V) of the last n tokens of ids, of a decoder whose passes answer
        all tokens, or the last alone."""
        logits = self.call_full(ids, start)
        if logits.shape[1] == ids.shape[1]:
            return logits[:, -n:]
        ends = range(ids.shape[1] - n + 1, ids.shape[1])
        return torch.cat([*(self.call_full(ids[:, :end], start) for end in ends), logits], dim=1)

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """(B,n) -> (B,n,V) or (B,1,V), and the next state."""
        with eager():
            answer = self.decoder.step(ids, state)
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise TypeError(f"step returned a {type(answer).__name__}, not (logits, state)")
        return shaped(answer[0], ids, "step"), answer[1]

    def initial_state(self, start: Start) -> Any:
        """The state before the first token."""
        make = getattr(self.decoder, "start", None)
        if make is None:
            return None
        if start.padding is None:
            return make(start.batch, start.capacity)
        return make(start.batch, start.capacity, start.padding)

    def reloaded(self, state: Any, start: Start) -> Any:
        """A new state that is loaded from what this one saves."""
        return saving.reloaded(self.decoder, state, lambda: self.initial_state(start))

    def reset_arguments(self, start: Start) -> tuple[Any, ...]:
        """The arguments of the decoder's reset besides the state."""
        return ()

    def start(self, start: Start) -> Any:
        return self.session(self, start)

    @property
    def pass_key(self) -> Hashable:
        """The key of an uncached pass: all that it depends on apart from its arguments and the
        format."""
        return Same(self.decoder)

    # Variants

    def with_session(self, session: Callable[[TargetSubject, Start], Any]) -> TargetSubject:
        """The same subject, decoding in another way."""
        other = copy.copy(self)
        other.session = session
        return other

    def unrounded(self) -> None:
        """A cache of the user's is compared with what the user's decoder computes, as it is."""

    def fingerprint(self) -> str:
        """The SHA-256 of the decoder's weights, as far as they can be found in its attributes."""
        held = {
            f"{name}.{i}": leaf
            for name, value in getattr(self.decoder, "__dict__", {}).items()
            for i, leaf in enumerate(tree_leaves(value))
            if isinstance(leaf, Tensor)
        }
        return fingerprint(owned_modules(self.decoder), held)

    def to(self, dtype: torch.dtype) -> TargetSubject:
        """Raises what the decoder raises, NotImplementedError if it holds nothing to convert."""
        other = copy.copy(self)
        other.dtype = dtype
        if dtype == torch.float64 and any(map(copy_crowds, outermost(self.decoder))):
            try:
                other.decoder = widened(self.decoder, Room())
                ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
                with torch.inference_mode():
                    other.call_full(ids), other.prefilled(ids)
                return other
            except Exception as error:  # code that holds its weights elsewhere too
                pass_on_shortage(error)
        other.decoder = converted(self.decoder, dtype)
        return other

    def moved(self, by: float, seed: int = 0, tables: bool = False) -> TargetSubject:
        """The same decoder with weights, or `tables`, that differ by about `by` of themselves.

        Raises NotImplementedError if it holds none.
        """
        other = copy.copy(self)
        other.decoder, other.passes = self.moves.of(self.decoder, by, seed, tables), None
        return other

    # What it is able to do

    def find_reach_for(self, scenarios: Sequence[str], thorough: bool = False) -> None:
        """Find the reach, if a scenario depends on it."""
        if GENERATED.intersection(scenarios):
            self.find_reach(thorough)

    def find_reach(self, thorough: bool = False) -> None:
        """Find out how long a history can be fed in the time that a check may take."""
        level = THOROUGH if thorough else type(self).level
        of_steps = (self.largest_step, self.single_steps_only, self.sizes)
        longest = min(self.context, self.largest_pass or self.context)
        found = cost.affordable(self, Bounds(longest, *of_steps, level))
        self.reach, self.level = found.reach, found.level
        self.fed_little = found.level < level

    def seconds(self) -> float:
        """The time that this thread has computed so far."""
        return time.thread_time()

    def find_special_ids(self, given: Any) -> tuple[int, ...]:
        """The ids to which the decoder gives a meaning."""
        return special_ids(given, self.vocab_size)

    def _probe(self, vocab_size: int) -> tuple[int, torch.dtype]:
        """Call everything once, to find the number of ids, and the format of the logits."""
        ids = torch.arange(4, device=self.device)[None] % (vocab_size or 4)
        try:
            logits = self.call_full(ids)
            if getattr(self.decoder, "breaks_down", False):  # then it is judged by its prompt
                return vocab_size or logits.shape[-1], logits.dtype
            found, _ = self._after(ids)
        except (Exception, SystemExit) as error:
            pass_on_shortage(error)
            text = f"{self.name}: {type(error).__name__}: {first_line(error)}"
            raise UsageError(
                text, "full(ids) and step(ids, state) are called as documented."
            ) from error
        if found.shape[-1] != logits.shape[-1]:
            raise UsageError(
                f"{self.name}: step answers {found.shape[-1]} logits and full {logits.shape[-1]}"
            )
        return vocab_size or logits.shape[-1], logits.dtype

    def _after(self, ids: Tensor) -> tuple[Tensor, Any]:
        """The logits and the state after ids that are fed in two steps, or as many as it takes."""
        state = self.prefilled(ids[:, :-1])
        return self.step(ids[:, -1:], state)

    def prefilled(self, ids: Tensor) -> Any:
        """The state behind ids (B,T), which are fed in steps as long as the decoder takes them."""
        start, limits = Start(ids.shape[0], max(self.room, ids.shape[1])), self.limits
        first = limits.largest_prompt or ids.shape[1]
        later = 1 if limits.single_steps_only else limits.largest_step or ids.shape[1]
        try:
            return self._fed(ids, start, first, later)
        except Exception as error:
            if not is_refusal(error):
                raise
            return self._fed(ids, start, 1, 1)

    def _fed(self, ids: Tensor, start: Start, first: int, later: int) -> Any:
        state, pieces = self.initial_state(start), [ids[:, :first]]
        pieces += ids[:, first:].split(later, dim=1) if ids.shape[1] > first else []
        for piece in pieces:
            _, state = self.step(piece, state)
        return state

    def _longest(self) -> int:
        """The longest sequence that a pass takes, up to the length that scenarios need."""
        low, high = 4, 16 * NEEDED
        while low < high:
            middle = (low + high + 1) // 2
            try:
                self.call_full(torch.zeros(1, middle, dtype=torch.long, device=self.device))
                low = middle
            except (Exception, SystemExit) as error:  # whatever it raises: it cannot take that many
                pass_on_shortage(error)
                high = middle - 1
        return low

    def _abilities(self) -> frozenset[str]:
        found = {
            op for op in ("crop", "select", "reset") if callable(getattr(self.decoder, op, None))
        }
        found -= set(getattr(self.decoder, "unable", ()))
        ids = torch.arange(8, device=self.device).reshape(2, 4) % self.vocab_size
        try:
            self._after(ids), self.call_full(ids)
            found.add("batch")
            if getattr(self.decoder, "takes_padding", False):
                found.add("padding")
        except (Exception, SystemExit) as error:  # whatever it raises: it takes no batch
            pass_on_shortage(error)
        try:
            _, state = self._after(ids[:1])
            # A copy of a state that holds no numbers, a row number say, would share what it names.
            if any(
                isinstance(leaf, Tensor) and leaf.numel() > 1
                for leaf in contents(copy.deepcopy(state))
            ):
                found.add("fork")
            if saving.can_save(self.decoder, state):
                found.add("save")
        except (Exception, SystemExit) as error:
            pass_on_shortage(error)
        if {"batch", "padding"} <= found and self._pads_on_the_right():
            found.add("right-padding")
        return frozenset(found)

    def _declares_loss(self, given: Any) -> bool:
        """Whether a decoder, one of its modules or its cache has `lossy = True`."""
        held = [given, self.decoder, *owned_modules(given).values()]
        try:
            _, state = self._after(torch.arange(4, device=self.device)[None] % self.vocab_size)
            held += [state, *contents(state)]
        except (Exception, SystemExit) as error:  # whatever it raises: the scenarios report it
            pass_on_shortage(error)
        return any(getattr(value, "lossy", False) is True for value in held)

    def _pads_on_the_right(self) -> bool:
        """Whether an uncached pass over a row that is padded behind its prompt answers as one over
        the row alone, so that a cache has to as well."""
        ids = torch.arange(2, 14, device=self.device).reshape(2, 6) % self.vocab_size
        padding = torch.tensor([[4, 4], [2, 4]], device=self.device)
        alone = torch.cat([ids[1:, :2], ids[1:, 4:]], dim=1)
        try:
            padded = self.call_full(ids, Start(2, self.room, padding))[1:, -1:]
            gap = distances([padded], [self.call_full(alone)[:, -1:]])[0]
        except (Exception, SystemExit) as error:  # whatever it raises: it takes no such padding
            pass_on_shortage(error)
            return False
        return gap <= AGREES

    def vacuous(self) -> str | None:
        """The reason why equal logits would prove nothing; None if they would."""
        if self._vacuous is None:
            self._vacuous = (vacuous.self_compared(self) or vacuous.unused(self),)
        return self._vacuous[0]


def is_decoder(given: Any) -> bool:
    """Whether an object has full and step."""
    return callable(getattr(given, "full", None)) and callable(getattr(given, "step", None))


def shaped(logits: Any, ids: Tensor, what: str) -> Tensor:
    """Logits as (B,n,V), or (B,1,V) if only the last token was answered.

    Raises ValueError for any other shape, and for what is not floating point.
    """
    found = logits if isinstance(logits, Tensor) else torch.as_tensor(logits)
    if not found.is_floating_point():
        raise ValueError(f"{what} answered with {found.dtype} (expected floating point logits)")
    batch, n = ids.shape
    if found.dim() == 2:
        found = found[:, None] if found.shape[0] == batch else found[None]
    if found.dim() == 3 and found.shape[0] == batch and found.shape[1] in (n, 1):
        return found
    shape = ", ".join(map(str, getattr(logits, "shape", ())))
    raise ValueError(f"{what} answered ids ({batch}, {n}) with ({shape}), not ({batch}, {n}, V)")
