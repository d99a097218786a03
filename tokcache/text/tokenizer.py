"""CachedTokenizer: L0, then L1, then the engine; every kind of wrapper has one.

The way of a text: `get` looks it up in L0. If it is not there, `miss` asks L1, which returns the
ids if it has all segments, and otherwise has the missing ones encoded through `_encode_once`: the
first thread that asks for a text encodes it, the others wait for its ids.

Everything an answer depends on belongs to one `_Generation`: the engine, the entries made with it
and the texts that it is encoding now. A change of the tokenizer starts a new generation, so that an
encoding that began before the change can only end in a cache that is no longer read.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from tokcache._forks import call_in_child
from tokcache._validate import require_bool, require_scope
from tokcache.config import ADMIT_ONE_IN, LONG_CHARS, CacheConfig
from tokcache.errors import Abandoned, InvalidText
from tokcache.stats import CacheStats, L0Stats, L1Stats, add_counts
from tokcache.text import _implementation as implementation
from tokcache.text._native import is_native
from tokcache.text.chat.cache import RenderCache
from tokcache.text.cuts.planner import plan_cuts
from tokcache.text.engines.copying import HuggingFaceEngine
from tokcache.text.flights import Flights, Key, new_flight
from tokcache.text.segments.cache import L1, NOT_LOOKED_UP

if TYPE_CHECKING:
    from tokcache.text._implementation import L0Cache, TokenIds, Walk
    from tokcache.text.cache_file import CacheFileReport
    from tokcache.text.engines.copying import Engine

_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_L0 = L0Stats(0, 0, 0, 0, {}, 0, 0, 0)
_NO_L1 = L1Stats()

_EncodeSegments = Callable[[], "TokenIds | None"]


@dataclass(slots=True, eq=False)
class _Generation:
    """One configuration of the tokenizer, and everything that was made under it."""

    l0: L0Cache
    flights: Flights
    engine: Engine | None = None
    l1: L1 | None = None
    get: Callable[[str, bool, str | None], TokenIds | None] = field(init=False)
    put: Callable[[str, bool, TokenIds, str | None, int], bool] = field(init=False)

    def __post_init__(self) -> None:
        self.get = self.l0._get  # noqa: SLF001 (a hit without the cost of keywords)
        self.put = self.l0._put  # noqa: SLF001 (stores nothing if the scope was cleared meanwhile)


class CachedTokenizer:
    """Token ids of texts: looked up, or else encoded once, however many ask at the same time.

    `get(text, add_special_tokens, scope)` is the look-up in L0 alone. It is an attribute that is
    replaced when the cache behind it is, so that a hit checks no state.

    Errors:  InvalidText if a text is not a str or has a lone surrogate; the tokenizer's own errors
             pass through.
    Threads: safe, and after fork. Code that uses or changes the plain tokenizer holds `plain_lock`;
             inside it, code that hands out components or compares them holds `guard_lock`.
    """

    __slots__ = (
        "__weakref__",
        "_build_engine",
        "_bypasses",
        "_config",
        "_counts",
        "_encode_seconds",
        "_encoded_texts",
        "_encoded_tokens",
        "_generation",
        "_guard",
        "_lock",
        "_n_long",
        "_pool",
        "_retired",
        "_retired_l1",
        "get",
        "guard_lock",
        "plain_lock",
        "rendered",
    )

    get: Callable[[str, bool, str | None], TokenIds | None]
    _generation: _Generation
    _pool: ThreadPoolExecutor | None
    _retired: L0Stats
    _retired_l1: L1Stats

    def __init__(self, config: CacheConfig | None, build_engine: Callable[[], Engine]) -> None:
        self._config = config or CacheConfig()
        self._build_engine = build_engine
        self._guard: Callable[[], None] | None = None
        self.rendered = RenderCache(self._config.render_max_bytes, self._config.verify_rate)
        self._n_long = 0
        self._renew_locks()
        self._reset_counts()
        self._renew()
        self.engine(self._generation)
        call_in_child(self.after_fork)

    @property
    def config(self) -> CacheConfig:
        """The settings in force."""
        return self._config

    @property
    def l1(self) -> L1 | None:
        """The L1 in force, to be looked at; None if it is switched off or can't be used."""
        generation = self.fresh()
        self.engine(generation)
        return generation.l1

    # ---- one text

    def find(
        self, generation: _Generation, text: str, add_special_tokens: bool, scope: str | None
    ) -> TokenIds:
        """Return the ids of a text under one generation, from `fresh`."""
        ids = generation.get(text, add_special_tokens, scope)
        return self.miss(text, add_special_tokens, scope, generation) if ids is None else ids

    def miss(  # noqa: PLR0917 (keywords cost a tenth of a microsecond each)
        self,
        text: str,
        add_special_tokens: bool,
        scope: str | None,
        generation: _Generation | None = None,
        found: TokenIds | Walk | None = NOT_LOOKED_UP,
        since: int | None = None,
    ) -> TokenIds:
        """Return the ids of a text that L0 does not have: from cached segments, or encoded.

        `found` is the answer of `L1.look`, if it was asked; `since` is the number of clears before.
        L0 stores one in a few of the long texts whose segments were all cached: L1 puts such a
        text together in microseconds, and most never come again.
        """
        if generation is None:
            generation = self._generation
        if since is None:
            since = generation.l0._n_clears  # noqa: SLF001 (ours)
        if type(text) is not str or (scope is not None and type(scope) is not str):
            text, add_special_tokens, scope, since = _key(text, add_special_tokens, scope, since)
        if generation.engine is None:
            self.engine(generation)
        l1 = generation.l1
        if l1 is None:
            return self._encode_once(generation, (text, add_special_tokens, scope, since))
        once = self._encode_once
        ids, seconds = l1.encode(text, add_special_tokens, scope, since, once, generation, found)
        if ids is None:
            return once(generation, (text, add_special_tokens, scope, since), _nothing)
        is_long = len(text) > LONG_CHARS
        if seconds is None:
            if is_long:
                self._n_long += 1
                if self._n_long % ADMIT_ONE_IN:
                    return ids
        elif seconds >= 0:
            with self._lock:
                self._encoded_texts += 1
                self._encoded_tokens += len(ids)
                self._encode_seconds += seconds
            if is_long:
                return ids
        else:
            return ids  # `once` has counted and stored them
        generation.put(text, add_special_tokens, ids, scope, since)
        return ids

    async def afind(self, text: str, add_special_tokens: bool, scope: str | None) -> TokenIds:
        """Return the ids of a text without holding the event loop: a miss runs in a thread."""
        ids = self.get(text, add_special_tokens, scope)
        if ids is not None:
            return ids
        from asyncio import get_running_loop, wrap_future  # noqa: PLC0415 (30 ms to import)

        generation = self._generation
        key = _key(text, add_special_tokens, scope, _n_clears(generation))
        in_thread = partial(get_running_loop().run_in_executor, self._threads())
        if generation.engine is None:
            await in_thread(self.engine, generation)
        if self.engine(generation).reason is not None:
            return await in_thread(self._encode_once, generation, key)
        while True:
            flight = new_flight()
            found = generation.flights.claim(key, flight)
            if found is None:
                try:
                    self._threads().submit(self._encode_claimed, generation, [key])
                except BaseException as error:  # at interpreter exit: no new threads
                    generation.flights.fail([key], error)
                    raise
                found = flight
            if not isinstance(found, Future):
                return found
            try:
                return await wrap_future(found)
            except Abandoned:
                continue

    # ---- many texts

    def find_batch(
        self,
        generation: _Generation,
        texts: Sequence[str],
        add_special_tokens: bool,
        scope: str | None,
    ) -> list[TokenIds]:
        """Return the ids of every text; equal ones that miss are encoded once, all in one call."""
        require_bool("add_special_tokens", add_special_tokens)
        scope, texts = require_scope(scope), _listed(texts)
        since = _n_clears(generation)
        try:
            keys = [_key(text, add_special_tokens, scope, since) for text in texts]
            found = [generation.get(*key[:3]) for key in keys]
            missing = [key for key, ids in zip(keys, found, strict=True) if ids is None]
            made = self._encode_batch(generation, [*dict.fromkeys(missing)]) if missing else {}
        except InvalidText as error:
            for index, text in enumerate(texts):  # say which it was
                refused = _why_refused(text, f"texts[{index}]")
                if refused is not None:
                    raise refused from error
            raise
        pairs = zip(keys, found, strict=True)
        return [made[key] if ids is None else ids for key, ids in pairs]

    # ---- encoding

    def _encode_once(
        self, generation: _Generation, key: Key, encode: _EncodeSegments | None = None
    ) -> TokenIds:
        """Return the ids of a text, encoded unless another thread encodes it now.

        `encode` encodes its missing segments. Without it, or if it returns None, the engine
        encodes the whole text.
        """
        engine = self.engine(generation)
        if engine.reason is not None:  # the plain tokenizer, whose answers are not cached
            return implementation.TokenIds(_encode_whole(engine, [key[0]], key[1])[0])
        while True:
            found = generation.flights.claim(key)
            if found is None:
                return self._encode_claimed(generation, [key], encode)[0]
            if not isinstance(found, Future):
                return found
            try:
                return found.result()
            except Abandoned:
                continue

    def _encode_batch(self, generation: _Generation, keys: list[Key]) -> dict[Key, TokenIds]:
        """Return the ids of different texts, all that other threads don't encode in one call."""
        engine = self.engine(generation)
        if engine.reason is not None:
            encoded = _encode_whole(engine, [key[0] for key in keys], keys[0][1])
            return dict(zip(keys, map(implementation.TokenIds, encoded), strict=True))
        made: dict[Key, TokenIds] = {}
        while len(made) < len(keys):  # again if a batch that had some of them failed on others
            claims = {key: generation.flights.claim(key) for key in keys if key not in made}
            own = [key for key, claim in claims.items() if claim is None]
            # Before waiting for others: two batches may wait for each other's texts.
            if own:
                made.update(zip(own, self._encode_claimed(generation, own), strict=True))
            for key, claim in claims.items():
                try:
                    ids = claim.result() if isinstance(claim, Future) else claim
                except Abandoned:
                    continue
                if ids is not None:
                    made[key] = ids
        return made

    def _encode_claimed(
        self, generation: _Generation, keys: list[Key], encode: _EncodeSegments | None = None
    ) -> list[TokenIds]:
        """Encode claimed texts, store them, and give the ids to everyone who waits for them.

        L1 encodes the missing segments of each text (`encode` does for the only text of a call that
        has been looked up already); texts that it can't cut are encoded whole, in one call.
        """
        start = perf_counter()
        try:
            engine, l1 = self.engine(generation), generation.l1
            made: list[TokenIds | None] = [None] * len(keys)
            if encode is not None:
                made = [encode()]
            elif l1 is not None:
                made = [l1.encode(*key)[0] for key in keys]
            whole = [key[0] for key, ids in zip(keys, made, strict=True) if ids is None]
            encoded = iter(_encode_whole(engine, whole, keys[0][1]) if whole else ())
            done = [implementation.TokenIds(next(encoded)) if ids is None else ids for ids in made]
            for (text, add_special_tokens, scope, since), ids in zip(keys, done, strict=True):
                generation.put(text, add_special_tokens, ids, scope, since)
        except BaseException as error:
            generation.flights.fail(keys, error)
            raise
        with self._lock:
            self._encoded_texts += len(done)
            self._encoded_tokens += sum(map(len, done))
            self._encode_seconds += perf_counter() - start
        generation.flights.land(keys, done)
        return done

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(os.cpu_count(), "tokcache")
            return self._pool

    # ---- the generation in force

    def fresh(self) -> _Generation:
        """Return the generation in force, after a look at the components that were handed out."""
        if self._guard is not None:
            self._guard()
        return self._generation

    def engine(self, generation: _Generation) -> Engine:
        """Return the engine of a generation, built at the first call."""
        if generation.engine is None:
            with self.plain_lock:
                if generation.engine is None:
                    engine = self._build_engine()
                    l1: L1 | None = None
                    if self._config.l1 and isinstance(engine, HuggingFaceEngine):
                        plan = plan_cuts(engine.tokenizer)
                        l1 = L1(engine.tokenizer, plan, self._config, engine.encode, self._distrust)
                    # A clear of a scope at this moment either sees L1, or is counted in n_clears.
                    with self._lock:
                        if l1 is not None:
                            l1.clear(None, _n_clears(generation))
                        generation.l1 = l1
                    generation.engine = engine
        return generation.engine

    def invalidate(self) -> None:
        """Start a new generation, because the tokenizer encodes differently now."""
        with self._lock:
            self._retired = _sum(self._retired, self._generation.l0.stats())
            self._retired_l1 = _sum_l1(self._retired_l1, self._generation.l1)
            self._counts["invalidations"] += 1
            self._renew()

    def watch(self, guard: Callable[[], None] | None) -> None:
        """Call `guard` before every answer from now on; None: stop doing so."""
        with self._lock:
            self._guard = guard
            self._set_get()

    def clear(self, scope: str | None = None) -> None:
        """Remove every entry, the engine and the counters, or the entries of one scope alone.

        L0 is cleared last: texts put together from segments that L1 had before are not stored in it
        afterwards.
        """
        scope = require_scope(scope)
        if scope is None:
            self.rendered.clear()
        else:
            self.rendered.clear_scope(scope)
        with self._lock:
            if scope is None:
                self._reset_counts()
                self._renew()
                return
            generation = self._generation
            if generation.l1 is not None:
                generation.l1.clear(scope, _n_clears(generation) + 1)
            generation.l0.clear(scope=scope)

    def after_fork(self) -> None:
        """In a forked child: no text is being encoded here, whatever the parent's threads did."""
        self._renew_locks()
        self._generation.flights = Flights(
            self._generation.l0._get_again,  # noqa: SLF001 (ours)
            self._counts,
            self._lock,
        )
        if self._generation.l1 is not None:
            self._generation.l1.after_fork()

    def wait_for_engine(self, timeout_s: float | None) -> bool:
        """Wait until the engine is chosen; False if `timeout_s` was too short."""
        due = None if timeout_s is None else monotonic() + timeout_s
        while True:
            l1 = self.l1
            left = None if due is None else max(0.0, due - monotonic())
            if l1 is None or (l1.wait_for_engine(left) and l1 is self._generation.l1):
                return True
            if due is not None and monotonic() >= due:
                return False

    def _distrust(self, l1: L1) -> None:
        """Remove all whole texts: some may have been put together from wrong ids of this L1."""
        with self._lock:
            generation = self._generation
            if generation.l1 is l1:
                self._retired = _sum(self._retired, generation.l0.stats())
                generation.l0.clear()

    def _renew(self) -> None:
        before: _Generation | None = getattr(self, "_generation", None)
        if before is not None and before.l1 is not None:
            before.l1.retire()
        l0 = implementation.L0Cache(
            max_entries=self._config.l0_max_entries,
            max_bytes=self._config.l0_max_bytes,
            sample_size=self._config.l0_sample_size,
        )
        flights = Flights(l0._get_again, self._counts, self._lock)  # noqa: SLF001 (ours)
        self._generation = _Generation(l0, flights)
        self._set_get()

    def _set_get(self) -> None:
        def guarded(text: str, add_special_tokens: bool, scope: str | None) -> TokenIds | None:
            return self.fresh().get(text, add_special_tokens, scope)

        self.get = self._generation.get if self._guard is None else guarded

    def _renew_locks(self) -> None:
        self._lock = threading.Lock()
        self.plain_lock = threading.RLock()
        self.guard_lock = threading.RLock()
        self._pool = None

    # ---- counters

    def count_bypass(self, reason: str, n_texts: int = 1) -> None:
        """Count answers that the plain tokenizer gave."""
        with self._lock:
            self._bypasses[reason] += n_texts

    def stats(self) -> CacheStats:
        """Return a snapshot of the counters."""
        with self._lock:
            engine, reason = self._engine_in_force()
            return CacheStats(
                l0=_sum(self._retired, self._generation.l0.stats()),
                l1=_sum_l1(self._retired_l1, self._generation.l1),
                render=self.rendered.stats(),
                encoded_texts=self._encoded_texts,
                encoded_tokens=self._encoded_tokens,
                encode_seconds=self._encode_seconds,
                shared=self._counts["shared"],
                invalidations=self._counts["invalidations"],
                bypasses=dict(self._bypasses),
                engine=engine,
                engine_reason=reason,
            )

    def _engine_in_force(self) -> tuple[str, str]:
        generation = self._generation
        if generation.l1 is not None:
            return generation.l1.engine, generation.l1.engine_reason
        if generation.engine is None:
            return "tokenizers", "pending"
        return "tokenizers", "no_l1" if generation.engine.reason is None else "not_cached"

    def _reset_counts(self) -> None:
        self._counts: Counter[str] = Counter()
        self._bypasses: Counter[str] = Counter()
        self._encoded_texts = self._encoded_tokens = 0
        self._encode_seconds = 0.0
        self._retired = _NO_L0
        self._retired_l1 = _NO_L1


class WrappedTokenizer:
    """The methods that every wrapped tokenizer has besides those of its kind.

    `token_ids` and its batch and async forms return the ids of whole texts: truncation and padding
    switched on in a `tokenizers.Tokenizer` don't apply to them.

    Errors:  InvalidText if a text is not a str or has a lone surrogate; InvalidScope; InvalidConfig
             if `add_special_tokens` is not a bool; the tokenizer's own errors pass through.
    Threads: safe, from any thread or event loop, and after fork.
    """

    __slots__ = ()

    _tokcache: CachedTokenizer
    _tokcache_scope: str | None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102

    def token_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        """Return the token ids of `text`, from the cache if it holds them.

        Shapes: int32[n_tokens], read-only, shared with the cache.
        Cost:   a hit is one look-up; a text that many threads ask for at once is encoded once.
        """
        if scope is None:
            scope = self._tokcache_scope
        core = self._tokcache  # once: a wrapper's attributes are looked up in Python
        ids = core.get(text, add_special_tokens, scope)
        return core.miss(text, add_special_tokens, scope) if ids is None else ids

    def token_ids_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, scope: str | None = None
    ) -> list[TokenIds]:
        """Return the token ids of every text, in order.

        Cost: equal texts are looked up once, and all misses are encoded in one call.
        """
        core = self._tokcache
        scope = self._tokcache_scope if scope is None else scope
        return core.find_batch(core.fresh(), texts, add_special_tokens, scope)

    async def atoken_ids(
        self, text: str, *, add_special_tokens: bool = True, scope: str | None = None
    ) -> TokenIds:
        """Return the token ids of `text` without holding the event loop.

        A hit is answered at once, a miss is encoded in a thread. Cancelling this call does not
        affect others that wait for the same text.
        """
        scope = self._tokcache_scope if scope is None else scope
        return await self._tokcache.afind(text, add_special_tokens, scope)

    def _cached_repr(self, plain: str) -> str:
        stats, scope = self._tokcache.stats(), self._tokcache_scope
        n_segments = stats.l1.n_chunks + stats.l1.n_segments
        return (
            f"<tokcache.wrap of {plain}: {stats.l0.n_entries:,} texts and "
            f"{n_segments:,} segments held, "
            f"{stats.l0.n_bytes + stats.l1.n_bytes:,} bytes"
            f"{'' if scope is None else f', scope {scope!r}'}>"
        )

    def cache_stats(self) -> CacheStats:
        """Return a snapshot of the counters."""
        return self._tokcache.stats()

    def wait_for_engine(self, timeout_s: float | None = None) -> bool:
        """Wait until the engine is chosen; False if `timeout_s` seconds were too short.

        Until then tokenizers encodes uncached text. `cache_stats().engine` names the engine. A
        change of the tokenizer and `cache_clear()` begin a new choice.
        """
        return self._tokcache.wait_for_engine(timeout_s)

    def cache_clear(self, *, scope: str | None = None) -> None:
        """Remove the entries of `scope`, or every entry and all counters.

        A scoped tokenizer removes those of its own scope. A text of the scope that is being encoded
        at that moment is not stored. Without a scope the tokenizer's components are copied again,
        too.

        Errors: InvalidScope.
        Cost:   with a scope, a pass over all entries.
        """
        self._tokcache.clear(self._tokcache_scope if scope is None else scope)

    def cache_dump(
        self,
        path: str | os.PathLike[str],
        *,
        scopes: Collection[str | None] | None = None,
        key: bytes | None = None,
    ) -> CacheFileReport:
        """Write the cache's entries to a file for `cache_load` of an equal tokenizer.

        The file contains texts: only its owner may read it. `scopes` names the scopes to write
        (None is the shared one); by default a scoped tokenizer writes its own, others all. A file
        written with a `key` can be loaded only with that key, so that nobody else can forge one.

        Errors: NothingCached if this tokenizer's answers are never cached; MissingFile if there is
                no folder for the file; OSError. A file at `path` is then unchanged.
        Cost:   holds the interpreter lock for a copy of the segments; a server calls it in a
                thread.
        """
        from tokcache.text import cache_file as warm  # noqa: PLC0415 (few need it)

        return warm.dump(self._tokcache, path, _scopes(scopes, self._tokcache_scope), key)

    def cache_load(
        self,
        path: str | os.PathLike[str],
        *,
        scopes: Collection[str | None] | None = None,
        key: bytes | None = None,
    ) -> CacheFileReport:
        """Load the entries that `cache_dump` wrote, as far as there is room for them.

        They count as older than all present entries. `scopes` and `key` are those of `cache_dump`.
        Without a key, load only files that nobody else can write: only a checksum and a few samples
        are verified.

        Errors: InvalidCacheFile if the file is damaged, of another tokenizer or wrong, MissingFile,
                NothingCached, TokenizerChanged, OSError; the cache is then unchanged.
        Cost:   a pass over the file and the encoding of a few of its texts.
        """
        from tokcache.text import cache_file as warm  # noqa: PLC0415 (few need it)

        return warm.load(self._tokcache, path, _scopes(scopes, self._tokcache_scope), key)


if not TYPE_CHECKING and is_native():
    from tokcache.text._l0 import token_ids

    WrappedTokenizer.token_ids = token_ids  # in C: a hit takes 0.23 us instead of 0.39


def _n_clears(generation: _Generation) -> int:
    return generation.l0._n_clears  # noqa: SLF001 (ours)


def _key(text: str, add_special_tokens: bool, scope: str | None, since: int) -> Key:
    if not isinstance(text, str):
        raise _not_a_str(text, "text")
    return str.__str__(text), add_special_tokens, require_scope(scope), since


def _scopes(
    scopes: Collection[str | None] | None, own: str | None
) -> Collection[str | None] | None:
    return [own] if scopes is None and own is not None else scopes


def _listed(texts: Iterable[str]) -> list[str]:
    if not isinstance(texts, Iterable) or isinstance(texts, str | bytes):
        raise InvalidText(f"texts must be a list of str, not one {type(texts).__name__}")
    return list(texts)


def _why_refused(text: object, name: str = "text") -> InvalidText | None:
    """Return why no tokenizer can encode `text`, or None if no reason is found."""
    if not isinstance(text, str):
        return _not_a_str(text, name)
    found = _SURROGATE.search(text)
    if found is None:
        return None
    return InvalidText(
        f"{name} has a lone surrogate, U+{ord(found[0]):04X}, at character {found.start():,} of "
        f"{len(text):,}, which has no UTF-8; replace it where the text is made (JSON may contain "
        'one): text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
    )


def _not_a_str(text: object, name: str) -> InvalidText:
    return InvalidText(f"{name} must be a str, not {type(text).__name__}; decode bytes first")


def _nothing() -> None:
    """Encode no segments of a text that L1 can't cut."""


def _encode_whole(engine: Engine, texts: list[str], add_special_tokens: bool) -> Sequence[Any]:
    """Have the engine encode texts; InvalidText instead of its error if a text is the cause.

    The texts are searched only after the engine has failed.
    """
    try:
        return engine.encode(texts, add_special_tokens)
    except Exception as error:
        for text in texts:
            refused = _why_refused(text)
            if refused is not None:
                raise refused from error
        raise


def _sum_l1(old: L1Stats, l1: L1 | None) -> L1Stats:
    return old if l1 is None else old + l1.stats()


def _sum(old: L0Stats, now: L0Stats) -> L0Stats:
    """Add up two generations."""
    return L0Stats(
        hits=old.hits + now.hits,
        misses=old.misses + now.misses,
        insertions=old.insertions + now.insertions,
        evictions=old.evictions + now.evictions,
        refusals=add_counts(old.refusals, now.refusals),
        hit_tokens=old.hit_tokens + now.hit_tokens,
        n_entries=now.n_entries,
        n_bytes=now.n_bytes,
        misses_by_reason=add_counts(old.misses_by_reason, now.misses_by_reason),
    )
