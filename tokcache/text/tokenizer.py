"""CachedTokenizer: L0, then L1, then the engine; shared by the wrappers of every kind of tokenizer.

Everything an answer depends on hangs together in one `_Generation`: the engine, the entries it
made and the texts it is encoding now. A change of the tokenizer starts a new generation, so an
encoding that began before the change can only land in a cache that nobody reads any more.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tokcache._forks import call_in_child
from tokcache._validate import require_bool, require_scope
from tokcache.config import CacheConfig
from tokcache.errors import Abandoned, InvalidText
from tokcache.stats import CacheStats, L0Stats, L1Stats
from tokcache.text import _implementation as implementation
from tokcache.text._native import is_native
from tokcache.text.cuts.planner import plan_cuts
from tokcache.text.engines.copying import HuggingFaceEngine
from tokcache.text.segments.cache import CHARS_AT_ONCE, L1

if TYPE_CHECKING:
    from tokcache.text._implementation import L0Cache, TokenIds, Walk
    from tokcache.text.cache_file import CacheFileReport
    from tokcache.text.engines.copying import Engine

_LONG_CHARS = 2048  # L0 takes a longer text that L1 puts together
_ADMIT_ONE_IN = 8  # one time in so many: most never come again
_SURROGATE = re.compile("[\ud800-\udfff]")

# text, add_special_tokens, scope, and how often a scope had been cleared when the text came: what
# was asked for before a scope was cleared is not shared with who asks after it, nor stored.
_Key = tuple[str, bool, str | None, int]
_NO_L0 = L0Stats(0, 0, 0, 0, {}, 0, 0, 0)
_NO_L1 = L1Stats()


@dataclass(slots=True)
class _Generation:
    """One configuration of the tokenizer and all that was made under it.

    `flights` holds the texts being encoded now; the Future is made when a second asker comes.
    """

    l0: L0Cache
    engine: Engine | None = None
    l1: L1 | None = None
    flights: dict[_Key, Future[TokenIds] | None] = field(default_factory=dict)
    get: Callable[[str, bool, str | None], TokenIds | None] = field(init=False)
    put: Callable[[str, bool, TokenIds, str | None, int], bool] = field(init=False)

    def __post_init__(self) -> None:
        self.get = self.l0._get  # noqa: SLF001 (ours: a hit without the cost of keywords)
        self.put = self.l0._put  # noqa: SLF001 (ours: not what was cleared meanwhile)


class CachedTokenizer:
    """Token ids of texts: looked up, else encoded once, however many ask at the same time.

    `get(text, add_special_tokens, scope)` is the look-up alone; it is replaced when what it
    looks in is, so that a hit costs no question about the state of things.

    Errors:  InvalidText if a text is not a str or has a lone surrogate; the tokenizer's own errors
             pass through.
    Threads: safe, and after fork. `plain_lock` is held by those who use or change the plain
             tokenizer, `guard_lock` inside it by those who hand out or look at components.
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
        self._n_long = 0
        self._reset_after_fork()
        self._forget_counts()
        self._renew()
        self.engine(self._generation)
        call_in_child(self.after_fork)

    @property
    def config(self) -> CacheConfig:
        """The settings in force."""
        return self._config

    @property
    def l1(self) -> L1 | None:
        """The cache of parts in force, to be looked at; None if it is switched off or can't be."""
        generation = self.fresh()
        self.engine(generation)
        return generation.l1

    def miss(self, text: str, add_special_tokens: bool, scope: str | None) -> TokenIds:
        """Return the ids of a text that `get` did not have."""
        return self._miss(self._generation, text, add_special_tokens, scope)

    def find(
        self, generation: _Generation, text: str, add_special_tokens: bool, scope: str | None
    ) -> TokenIds:
        """Return the ids of a text under one generation, from `fresh`."""
        ids = generation.get(text, add_special_tokens, scope)
        if ids is None:
            ids = self._miss(generation, text, add_special_tokens, scope)
        return ids

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
        try:
            return self._find_all(generation, texts, add_special_tokens, scope)
        except InvalidText as error:
            for index, text in enumerate(texts):  # say which it was
                refused = _why_refused(text, f"texts[{index}]")
                if refused is not None:
                    raise refused from error
            raise

    def _find_all(
        self,
        generation: _Generation,
        texts: list[str],
        add_special_tokens: bool,
        scope: str | None,
    ) -> list[TokenIds]:
        since = _n_clears(generation)
        keys = [_key(text, add_special_tokens, scope, since) for text in texts]
        found = [generation.get(*key[:3]) for key in keys]
        missing = dict.fromkeys(key for key, ids in zip(keys, found, strict=True) if ids is None)
        if missing:
            made = self._encode_all(generation, list(missing))
            found = [
                made[key] if ids is None else ids for key, ids in zip(keys, found, strict=True)
            ]
        return found  # type: ignore[return-value]  # every None was made

    async def afind(self, text: str, add_special_tokens: bool, scope: str | None) -> TokenIds:
        """Return the ids of a text: a hit at once, a miss from a thread; the loop is never held."""
        ids = self.get(text, add_special_tokens, scope)
        if ids is not None:
            return ids
        from asyncio import get_running_loop, wrap_future  # noqa: PLC0415 (30 ms to import)

        generation = self._generation
        key = _key(text, add_special_tokens, scope, _n_clears(generation))
        if generation.engine is None:
            await get_running_loop().run_in_executor(self._threads(), self.engine, generation)
        while True:
            try:
                return await wrap_future(self._depart(generation, key))
            except Abandoned:
                continue

    def fresh(self) -> _Generation:
        """Return the generation that holds now, after a look at the components handed out."""
        if self._guard is not None:
            self._guard()
        return self._generation

    def engine(self, generation: _Generation) -> Engine:
        """Return the engine of a generation, built when first asked for."""
        if generation.engine is None:
            with self.plain_lock:
                if generation.engine is None:
                    engine = self._build_engine()
                    l1 = self._build_l1(engine)
                    with self._lock:  # who clears a scope either sees L1 or was counted before
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
        """Call `guard` before every answer from now on, or stop doing so."""
        with self._lock:
            self._guard = guard
            self._set_get()

    def count_bypass(self, reason: str, n_texts: int = 1) -> None:
        """Count answers that the plain tokenizer gave."""
        with self._lock:
            self._bypasses[reason] += n_texts

    def clear(self, scope: str | None = None) -> None:
        """Drop every entry, the engine and the counters, or the entries of one scope alone.

        L0 comes last: what was made of parts that L1 held before is not stored in it afterwards.
        """
        scope = require_scope(scope)
        with self._lock:
            if scope is None:
                self._forget_counts()
                self._renew()
                return
            generation = self._generation
            if generation.l1 is not None:
                generation.l1.clear(scope, _n_clears(generation) + 1)
            generation.l0.clear(scope=scope)

    def stats(self) -> CacheStats:
        """Return a snapshot of the counters."""
        with self._lock:
            return CacheStats(
                l0=_sum(self._retired, self._generation.l0.stats(), self._counts["rechecks"]),
                l1=_sum_l1(self._retired_l1, self._generation.l1),
                encoded_texts=self._encoded_texts,
                encoded_tokens=self._encoded_tokens,
                encode_seconds=self._encode_seconds,
                shared=self._counts["shared"],
                invalidations=self._counts["invalidations"],
                bypasses=dict(self._bypasses),
            )

    # ---- one text is encoded once

    def _miss(
        self, generation: _Generation, text: str, add_special_tokens: bool, scope: str | None
    ) -> TokenIds:
        """Return the ids of a text that L0 does not hold: from known parts, else encoded.

        L0 keeps no long text that was new, and of those that L1 had in parts one in a few: it is
        put together again in microseconds, and most never come again.
        """
        since = _n_clears(generation)
        if type(text) is not str or (scope is not None and type(scope) is not str):
            text, add_special_tokens, scope, since = _key(text, add_special_tokens, scope, since)
        if generation.engine is None:
            self.engine(generation)
        l1 = generation.l1
        found = None if l1 is None else l1.look(text, add_special_tokens, scope, since)
        if isinstance(found, implementation.TokenIds):
            if len(text) > _LONG_CHARS:
                self._n_long += 1
                if self._n_long % _ADMIT_ONE_IN:
                    return found
            generation.put(text, add_special_tokens, found, scope, since)
            return found
        if l1 is not None and found is not None and l1.holds_lock and len(text) <= CHARS_AT_ONCE:
            # Nobody else can ask for it meanwhile.
            ids = self._encode_parts(l1, text, add_special_tokens, found)
            if ids is not None:
                if len(text) <= _LONG_CHARS:
                    generation.put(text, add_special_tokens, ids, scope, since)
                return ids
            found = None
        return self._encode_one(generation, (text, add_special_tokens, scope, since), found)

    def _encode_parts(
        self, l1: L1, text: str, add_special_tokens: bool, walk: Walk
    ) -> TokenIds | None:
        """Encode the missing parts of a text, and count."""
        start = perf_counter()
        ids = l1.complete(walk, text, add_special_tokens)
        if ids is not None:
            seconds = perf_counter() - start
            with self._lock:
                self._encoded_texts += 1
                self._encoded_tokens += len(ids)
                self._encode_seconds += seconds
        return ids

    def _encode_one(self, generation: _Generation, key: _Key, walk: Walk | None = None) -> TokenIds:
        if self.engine(generation).reason is not None:
            return self._encode_uncached(generation, [key])[0]
        while True:
            found = self._claim(generation, key)
            if found is None:
                return self._encode(generation, [key], [walk])[0]
            if isinstance(found, implementation.TokenIds):
                return found
            try:
                return found.result()
            except Abandoned:
                continue

    def _encode_all(self, generation: _Generation, keys: list[_Key]) -> dict[_Key, TokenIds]:
        made = self._encode_batch(generation, keys)
        while len(made) < len(keys):  # another batch had some of them, and failed over others
            made.update(self._encode_batch(generation, [key for key in keys if key not in made]))
        return made

    def _encode_batch(self, generation: _Generation, keys: list[_Key]) -> dict[_Key, TokenIds]:
        if self.engine(generation).reason is not None:
            return dict(zip(keys, self._encode_uncached(generation, keys), strict=True))
        claims = {key: self._claim(generation, key) for key in keys}
        own = [key for key, claim in claims.items() if claim is None]
        # Before waiting for others: two batches may wait for each other's texts.
        done = dict(zip(own, self._encode(generation, own), strict=True)) if own else {}
        for key, claim in claims.items():
            ids = _result_or_none(claim) if isinstance(claim, Future) else claim
            if ids is not None:
                done[key] = ids
        return done

    def _claim(
        self, generation: _Generation, key: _Key, flight: Future[TokenIds] | None = None
    ) -> TokenIds | Future[TokenIds] | None:
        """Return the ids, or the Future of who encodes them now, or None: the caller encodes.

        A caller that will encode may leave the `flight` that others shall wait for.
        """
        flights = generation.flights
        with self._lock:
            if key in flights:
                self._counts["shared"] += 1
                flights[key] = flights[key] or _running()
                return flights[key]
            self._counts["rechecks"] += 1  # a flight may have landed since the caller's look-up
            ids = generation.get(*key[:3])
            if ids is None:
                flights[key] = flight
            return ids

    def _depart(self, generation: _Generation, key: _Key) -> Future[TokenIds]:
        """Have a text encoded in a thread, unless it is being encoded already."""
        if self.engine(generation).reason is not None:
            return self._threads().submit(self._encode_one, generation, key)
        flight = _running()
        found = self._claim(generation, key, flight)
        if found is None:
            self._submit(generation, key)
        elif isinstance(found, Future):
            return found
        else:
            flight.set_result(found)
        return flight

    def _submit(self, generation: _Generation, key: _Key) -> None:
        try:
            self._threads().submit(self._encode, generation, [key])
        except BaseException as error:  # at interpreter exit: no new threads
            self._land_failed(generation, [key], error)
            raise

    def _encode(
        self, generation: _Generation, keys: list[_Key], walks: list[Walk | None] | None = None
    ) -> list[TokenIds]:
        """Encode claimed texts in one call, store them, and tell who waits for them.

        `walks` are what L1 knows of each already, as far as it was asked.
        """
        start = perf_counter()
        try:
            self.engine(generation)
            done = self._encode_new(generation, keys, walks)
            for (text, add_special_tokens, scope, since), ids in zip(keys, done, strict=True):
                generation.put(text, add_special_tokens, ids, scope, since)
        except BaseException as error:
            self._land_failed(generation, keys, error)
            raise
        self._land(generation, keys, done, perf_counter() - start)
        return done

    def _encode_new(
        self, generation: _Generation, keys: list[_Key], walks: list[Walk | None] | None
    ) -> list[TokenIds]:
        """Encode texts: what L1 can put together by parts, all others whole in one call."""
        l1 = generation.l1
        done = [None] * len(keys) if l1 is None else _by_parts(l1, keys, walks)
        whole = [key[0] for key, ids in zip(keys, done, strict=True) if ids is None]
        encoded = iter(self._encode_whole(generation, whole, keys[0][1]) if whole else ())
        return [implementation.TokenIds(next(encoded)) if ids is None else ids for ids in done]

    def _encode_uncached(self, generation: _Generation, keys: list[_Key]) -> list[TokenIds]:
        """Ask the plain tokenizer, which counts itself what it answers."""
        encoded = self._encode_whole(generation, [key[0] for key in keys], keys[0][1])
        return [implementation.TokenIds(ids) for ids in encoded]

    def _encode_whole(
        self, generation: _Generation, texts: list[str], add_special_tokens: bool
    ) -> Sequence[Any]:
        """Have the engine encode texts; InvalidText in place of its error if one is no text.

        They are looked through only once it has failed.
        """
        try:
            return self.engine(generation).encode(texts, add_special_tokens)
        except Exception as error:
            for text in texts:
                refused = _why_refused(text)
                if refused is not None:
                    raise refused from error
            raise

    def _land(
        self, generation: _Generation, keys: list[_Key], done: list[TokenIds], seconds: float
    ) -> None:
        with self._lock:
            waiting = [generation.flights.pop(key, None) for key in keys]
            self._encoded_texts += len(keys)
            self._encoded_tokens += sum(map(len, done))
            self._encode_seconds += seconds
        for future, ids in zip(waiting, done, strict=True):
            if future is not None:
                future.set_result(ids)

    def _land_failed(self, generation: _Generation, keys: list[_Key], error: BaseException) -> None:
        """Fail who waits: with the error if it is this text's own, else they ask again."""
        is_own = len(keys) == 1 and isinstance(error, Exception)
        with self._lock:
            waiting = [generation.flights.pop(key, None) for key in keys]
        for future in waiting:
            if future is not None:
                future.set_exception(error if is_own else Abandoned())

    # ---- state

    def _renew(self) -> None:
        config = self._config
        self._generation = _Generation(
            implementation.L0Cache(
                max_entries=config.l0_max_entries,
                max_bytes=config.l0_max_bytes,
                sample_size=config.l0_sample_size,
            )
        )
        self._set_get()

    def _build_l1(self, engine: Engine) -> L1 | None:
        if not self._config.l1 or not isinstance(engine, HuggingFaceEngine):
            return None
        plan = plan_cuts(engine.tokenizer)
        return L1(engine.tokenizer, plan, self._config, engine.encode)

    def _set_get(self) -> None:
        self.get = self._generation.get if self._guard is None else self._guarded_get

    def _guarded_get(
        self, text: str, add_special_tokens: bool, scope: str | None
    ) -> TokenIds | None:
        return self.fresh().get(text, add_special_tokens, scope)

    def _forget_counts(self) -> None:
        self._counts: Counter[str] = Counter()
        self._bypasses: Counter[str] = Counter()
        self._encoded_texts = self._encoded_tokens = 0
        self._encode_seconds = 0.0
        self._retired = _NO_L0
        self._retired_l1 = _NO_L1

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(os.cpu_count(), "tokcache")
            return self._pool

    def _reset_after_fork(self) -> None:
        """Make anew what belongs to the threads of one process."""
        self._lock = threading.Lock()
        self.plain_lock = threading.RLock()
        self.guard_lock = threading.RLock()
        self._pool = None

    def after_fork(self) -> None:
        """In a forked child: nobody is encoding here yet, whatever the parent's threads did."""
        self._reset_after_fork()
        self._generation.flights = {}
        if self._generation.l1 is not None:
            self._generation.l1.after_fork()


class WrappedTokenizer:
    """What every wrapped tokenizer has beside the methods of its kind.

    `token_ids` and its batch and async forms give the ids of whole texts: truncation and padding
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
        Cost:   a hit is one look-up; a text that many ask for at once is encoded once.
        """
        if scope is None:
            scope = self._tokcache_scope
        core = self._tokcache  # each attribute of a wrapper is asked for in Python
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

        A hit is answered at once, a miss is encoded in a thread. Cancelling this call harms no
        other that waits for the same text.
        """
        scope = self._tokcache_scope if scope is None else scope
        return await self._tokcache.afind(text, add_special_tokens, scope)

    def _cached_repr(self, plain: str) -> str:
        stats, scope = self._tokcache.stats(), self._tokcache_scope
        n_parts = stats.l1.n_chunks + stats.l1.n_shorts
        return (
            f"<tokcache.wrap of {plain}: {stats.l0.n_entries:,} texts and {n_parts:,} parts held, "
            f"{stats.l0.n_bytes + stats.l1.n_bytes:,} bytes"
            f"{'' if scope is None else f', scope {scope!r}'}>"
        )

    def cache_stats(self) -> CacheStats:
        """Return a snapshot of the counters."""
        return self._tokcache.stats()

    def cache_clear(self, *, scope: str | None = None) -> None:
        """Drop the entries of `scope`, or every entry and all counters.

        A scoped tokenizer drops those of its own scope. What is being encoded for a scope as it
        is cleared is not kept. Without a scope the tokenizer's components are copied again, too.

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
        """Write what the cache holds to a file that `cache_load` of an equal tokenizer takes.

        The file holds texts: only its owner may read it. `scopes` names those to write (None in
        it is the shared one); a scoped tokenizer writes its own by default, others all. A file
        written with a `key` is loaded with the same key alone, so that nobody else can write one.

        Errors: NothingCached if this tokenizer's answers are never kept; MissingFile if there is no
                folder for the file; OSError. Then what was at `path` before still is.
        Cost:   holds the interpreter lock for a copy of the parts; a server calls it in a thread.
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
        """Load what `cache_dump` wrote, behind what the cache holds, as far as there is room.

        `scopes` and `key` are those of `cache_dump`. Without a key, load only files that nobody
        else can write: ids are believed as far as a checksum and a few samples show.

        Errors: InvalidCacheFile if the file is damaged, of another tokenizer or wrong, MissingFile,
                NothingCached, TokenizerChanged, OSError; nothing has changed then.
        Cost:   a pass over the file and the encoding of a few of its texts.
        """
        from tokcache.text import cache_file as warm  # noqa: PLC0415 (few need it)

        return warm.load(self._tokcache, path, _scopes(scopes, self._tokcache_scope), key)


if not TYPE_CHECKING and is_native():
    from tokcache.text._l0 import token_ids

    WrappedTokenizer.token_ids = token_ids  # in C: 0.23 us a hit instead of 0.39


def _n_clears(generation: _Generation) -> int:
    return generation.l0._n_clears  # noqa: SLF001 (ours)


def _key(text: str, add_special_tokens: bool, scope: str | None, since: int) -> _Key:
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
    """Return why no tokenizer can encode `text`, None if nothing of it says so."""
    if not isinstance(text, str):
        return _not_a_str(text, name)
    found = _SURROGATE.search(text)
    if found is None:
        return None
    return InvalidText(
        f"{name} has a lone surrogate, U+{ord(found[0]):04X}, at character {found.start():,} of "
        f"{len(text):,}, which has no UTF-8; replace it where the text is made (JSON may carry "
        'one): text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
    )


def _not_a_str(text: object, name: str) -> InvalidText:
    return InvalidText(f"{name} must be a str, not {type(text).__name__}; decode bytes first")


def _running() -> Future[TokenIds]:
    future: Future[TokenIds] = Future()
    future.set_running_or_notify_cancel()  # one asker's cancel can't cancel it for the others
    return future


def _result_or_none(future: Future[TokenIds]) -> TokenIds | None:
    try:
        return future.result()
    except Abandoned:
        return None


def _by_parts(l1: L1, keys: list[_Key], walks: list[Walk | None] | None) -> list[TokenIds | None]:
    """Return the ids of every text that L1 can put together, None for the others."""
    if walks is None:
        return [_by_parts_one(l1, key, None) for key in keys]
    return [_by_parts_one(l1, key, walk) for key, walk in zip(keys, walks, strict=True)]


def _by_parts_one(l1: L1, key: _Key, walk: Walk | None) -> TokenIds | None:
    found: TokenIds | Walk | None = l1.look(*key) if walk is None else walk
    return l1.complete(found, key[0], key[1]) if isinstance(found, implementation.Walk) else found


def _sum_l1(old: L1Stats, l1: L1 | None) -> L1Stats:
    return old if l1 is None else old + l1.stats()


def _sum(old: L0Stats, now: L0Stats, n_rechecks: int = 0) -> L0Stats:
    """Add up two generations; a second look-up of one text is not a second miss."""
    return L0Stats(
        hits=old.hits + now.hits,
        misses=max(0, old.misses + now.misses - n_rechecks),
        insertions=old.insertions + now.insertions,
        evictions=old.evictions + now.evictions,
        refusals=dict(Counter(old.refusals) + Counter(now.refusals)),
        hit_tokens=old.hit_tokens + now.hit_tokens,
        n_entries=now.n_entries,
        n_bytes=now.n_bytes,
    )
