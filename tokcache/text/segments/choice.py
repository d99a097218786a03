"""The choice of an engine: encoders are proven in the background, tokenizers encodes meanwhile.

1. An L1 makes a `Choice` for its tokenizer and begins it: the choice waits in the queue of the
   process's only thread for proofs.
2. The thread takes it after `DELAY_S`, or at once if somebody waits for it. A process that ends
   earlier has paid nothing.
3. The installed encoders are tried, the fastest first. A remembered refusal ends the attempt.
   Otherwise the encoder is built and proven; between two probes the thread sleeps as long as the
   probe took, so that other threads get the interpreter lock at once. The outcome is remembered.
4. The encoders are handed to the L1, which switches to them in one step and keeps its entries.

A choice is discarded if its L1 is not used any more (the tokenizer was changed, the cache cleared,
the wrapper deleted), and if the process ends. A forked child has no such thread, so its L1 begins
a choice of its own when it first encodes.

Building an encoder can't be interrupted: gigatoken holds the interpreter lock for all of it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING
from weakref import WeakMethod

from tokcache._forks import call_in_child
from tokcache.errors import ChoiceDiscarded, FastEncoderUnavailable
from tokcache.text.cuts.regex.lookup import name_of
from tokcache.text.engines.components import stages_of
from tokcache.text.engines.copying import component_state, has_normalized_tokens, is_of_library
from tokcache.text.engines.fast import FastEncoder, build, probe_texts, prove
from tokcache.text.engines.remembered import REMEMBERED, Outcome, identity_of

if TYPE_CHECKING:
    from types import MethodType

    from tokcache.text.engines.copying import SegmentEncoder

__all__ = ["Choice", "Chosen", "waits_for_engine"]

_log = logging.getLogger("tokcache")

SWITCH = "TOKCACHE_WAIT_FOR_ENGINE"
DELAY_S = 0.1
_END_S = 10.0  # the thread gets so long to end its step when the process ends
_SAMPLE_STEP = 16  # of the probes, every sixteenth is encoded if the proof is remembered


@dataclass(frozen=True, slots=True)
class Chosen:
    """The encoder of each variant, none if tokenizers encodes, and why.

    `reason` is a key of `reasons.ENGINE_REASONS`; `notes` say why faster encoders were refused;
    `identities` are those of the remembered proofs.
    """

    encoders: Mapping[int, FastEncoder]
    reason: str
    notes: Sequence[str] = ()
    identities: Sequence[bytes] = ()


class Choice:
    """Proves encoders for the variants of one tokenizer, and hands the first equal ones over.

    `deliver` is called once, in the thread that made the choice, unless the choice is discarded or
    the object of the method no longer exists.

    Threads: safe.
    """

    def __init__(
        self,
        names: Sequence[str],
        variants: Mapping[int, SegmentEncoder],
        deliver: Callable[[Chosen], None],
    ) -> None:
        self._names = names
        self._variants = variants
        self._deliver: WeakMethod[MethodType] = WeakMethod(deliver)  # type: ignore[arg-type]
        self._due = monotonic() + DELAY_S
        self._done = threading.Event()
        self._resumed = 0.0
        self.is_urgent = False
        self._is_discarded = False

    def begin(self) -> None:
        """Make the choice in the background, or now if `TOKCACHE_WAIT_FOR_ENGINE` is set."""
        if waits_for_engine():
            self.is_urgent = True
            self.make()
        else:
            _THREAD.add(self)

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until the choice is made or discarded; False if `timeout_s` was too short."""
        if not self._done.is_set():
            self.is_urgent = True
            _THREAD.wake()
        return self._done.wait(timeout_s)

    @property
    def is_done(self) -> bool:
        """Whether the choice was made or discarded."""
        return self._done.is_set()

    @property
    def is_discarded(self) -> bool:
        """Whether nobody needs the choice any more."""
        return self._is_discarded or self._deliver() is None

    def discard(self) -> None:
        """End the choice without a result."""
        self._is_discarded = True
        self._done.set()

    @property
    def seconds_left(self) -> float:
        """The time until the choice is due."""
        is_due = self.is_urgent or self.is_discarded
        return 0.0 if is_due else self._due - monotonic()

    def make(self) -> None:
        """Make the choice and deliver it."""
        self._resumed = perf_counter()

        def hand_over(chosen: Chosen) -> None:
            deliver = self._deliver()
            if deliver is not None and not self._is_discarded:
                deliver(chosen)

        try:
            hand_over(self._chosen())
        except ChoiceDiscarded:
            self._is_discarded = True
        except BaseException as error:
            _log.exception("the proof of an engine failed, and tokenizers encodes")
            hand_over(Chosen({}, "failed", [f"the proof failed ({type(error).__name__})"]))
            if not is_of_library(error):
                raise
        finally:
            self._done.set()

    def _chosen(self) -> Chosen:
        notes: list[str] = []
        texts: dict[int, str] = {}
        for name in self._names:
            try:
                proven = [self._proven(name, number, texts) for number in self._variants]
            except FastEncoderUnavailable as error:
                notes.append(str(error))
                continue
            is_remembered = all(each[1] for each in proven)
            encoders = {
                number: each[0] for number, each in zip(self._variants, proven, strict=True)
            }
            identities = [each[2] for each in proven if each[2] is not None]
            reason = "remembered" if is_remembered else "proven"
            return Chosen(encoders, reason, notes, identities)
        return Chosen({}, "refused", notes)

    def _proven(
        self, name: str, number: int, texts: dict[int, str]
    ) -> tuple[FastEncoder, bool, bytes | None]:
        """Return an encoder that is equal to a variant's, and how that is known.

        Errors: FastEncoderUnavailable; ChoiceDiscarded.
        """
        variant = self._variants[number]
        own = variant.tokenizer
        why = _why_never(variant)
        if why is not None:
            raise FastEncoderUnavailable(name, why)
        self._pause()
        if number not in texts:
            texts[number] = own.to_str()
            self._pause()
        # The separator's name is another one in each process.
        identity = identity_of(name, texts[number].replace(variant.secret, ""))
        outcome = None if identity is None else REMEMBERED.find(identity)
        if outcome is not None and outcome.reason is not None:
            raise FastEncoderUnavailable(name, outcome.reason)

        self._pause()
        try:
            encoder = build(name, texts[number])
        except FastEncoderUnavailable as error:
            if identity is not None and not isinstance(error.__cause__, ImportError | OSError):
                REMEMBERED.keep(identity, Outcome(error.reason))
            raise
        probes = probe_texts(own)
        is_known = outcome is not None
        reason = prove(encoder, own, probes[::_SAMPLE_STEP] if is_known else probes, self._pause)
        if not is_known and own.to_str() != texts[number]:
            # By a reference from before `wrap`: else the wrapper would have discarded this choice.
            raise FastEncoderUnavailable(name, "the tokenizer was changed during the proof")
        if identity is not None and (reason is not None or not is_known):
            REMEMBERED.keep(identity, Outcome(reason))
        if reason is not None:
            raise FastEncoderUnavailable(name, reason)
        return encoder, is_known, identity

    def _pause(self) -> None:
        """Let other threads run as long as the last step took.

        Errors: ChoiceDiscarded if the choice need not go on.
        """
        if self.is_discarded or _THREAD.is_ending:
            raise ChoiceDiscarded
        if not self.is_urgent:
            sleep(min(perf_counter() - self._resumed, 0.01))
        self._resumed = perf_counter()


class _Thread:
    """The process's thread for proofs: it runs while choices wait, one after the other."""

    def __init__(self) -> None:
        self.is_ending = False
        self._reset()
        call_in_child(self._reset)
        atexit.register(self._end)

    def _reset(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[Choice] = deque()
        self._thread: threading.Thread | None = None

    def add(self, choice: Choice) -> None:
        """Put a choice into the queue."""
        with self._changed:
            if self.is_ending:
                choice.discard()
                return
            self._waiting.append(choice)
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._run, name="tokcache-engine", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the interpreter ends: no new threads
            with self._changed:
                self._thread = None
                self._waiting.clear()
            choice.discard()

    def wake(self) -> None:
        """Look at the queue again, because a choice became urgent."""
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting or self.is_ending:
                    self._thread = None
                    return
                choice = min(self._waiting, key=lambda one: one.seconds_left)
                if choice.seconds_left > 0:
                    self._changed.wait(choice.seconds_left)
                    continue
                self._waiting.remove(choice)
            with suppress(BaseException):  # it was logged; the others still wait
                choice.make()
            del choice  # it keeps the copies of a tokenizer

    def _end(self) -> None:
        """Discard what waits, and wait for the step under way, as the process ends.

        A thread that came back from a library after the interpreter's end would crash.
        """
        with self._changed:
            self.is_ending = True
            for choice in self._waiting:
                choice.discard()
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(_END_S)


_THREAD = _Thread()


def waits_for_engine() -> bool:
    """Return whether `wrap` waits until the engine is chosen."""
    return os.environ.get(SWITCH, "") not in ("", "0")


def _why_never(variant: SegmentEncoder) -> str | None:
    """Return why no fast encoder may encode for this variant, None if one may."""
    own = variant.tokenizer
    # Fast encoders search the raw text: they find `K` even where NFC composes it with the mark
    # after it.
    if has_normalized_tokens(own):
        return "it does not search for added tokens in the normalised text"
    # Their regular expressions are of another dialect, so a pattern that was never compared may
    # give other pieces for texts that the probes miss: fastokens reads `\s{2}?` as two characters,
    # Oniguruma as two or none.
    for component in (own.normalizer, own.pre_tokenizer):
        for stage in stages_of(json.loads(component_state(component))):
            pattern = (stage.get("pattern") or {}).get("Regex")
            if pattern is not None and name_of(pattern) is None:
                return f"the pattern {pattern[:80]!r} is not a known one"
    return None
