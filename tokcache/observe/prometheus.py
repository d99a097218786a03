"""Collector: exports the counters of every layer as Prometheus metrics, labelled by model.

README.md in this folder lists the names. A scrape reads each cache's own counters once, so nothing
is counted twice and the request path does no work for metrics.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from tokcache._version import __version__
from tokcache.errors import InvalidConfig, MissingExtra
from tokcache.state.cache import PrefixStateCache
from tokcache.text.tokenizer import CachedTokenizer, WrappedTokenizer
from tokcache.text.wrappers import patch

if TYPE_CHECKING:
    from tokcache.config import CacheConfig
    from tokcache.stats import CacheStats, StateStats

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.metrics_core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        InfoMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector as _Base
except ImportError as error:
    raise MissingExtra(
        f"tokcache.observe.prometheus needs prometheus_client ({error}): "
        "pip install 'tokcache[metrics]'"
    ) from error

_Observed = CachedTokenizer | PrefixStateCache


@dataclass(frozen=True, slots=True)
class _Text:
    """The values of one wrapped tokenizer at a scrape."""

    stats: CacheStats
    config: CacheConfig


@dataclass(frozen=True, slots=True)
class _States:
    """The values of one prefix-state cache at a scrape."""

    stats: StateStats
    max_entries: int
    blocks: Mapping[str, int]
    bytes: Mapping[str, int]
    max_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Family:
    """One metric: its name, the path of its value in _Text or _States, and its meaning.

    `label` is the second label of a metric whose value is a mapping, or a str: that is the label,
    and the metric is 1.
    """

    name: str
    path: str
    meaning: str
    label: str | None = None

    def describe(self) -> Metric:
        """Return the metric without samples."""
        labels = ["model", self.label] if self.label else ["model"]
        name = f"tokcache_{self.name}"
        if name.endswith("_total"):
            return CounterMetricFamily(name, self.meaning, labels=labels)
        return GaugeMetricFamily(name, self.meaning, labels=labels)

    def collect(self, seen: Iterable[tuple[str, Any]]) -> Metric:
        """Return the metric with one sample per model, or per model and value of `label`."""
        family: Any = self.describe()
        for model, view in seen:
            value = attrgetter(self.path)(view)
            if self.label is None:
                family.add_metric([model], value)
            else:
                for key, one in ({value: 1} if isinstance(value, str) else value).items():
                    family.add_metric([model, key], one)
        return family  # type: ignore[no-any-return]  # add_metric is not in Metric


TEXT = (
    _Family("l0_hits_total", "stats.l0.hits", "Look-ups of whole texts that hit."),
    _Family(
        "l0_misses_total",
        "stats.l0.misses_by_reason",
        "Look-ups of whole texts that missed.",
        "reason",
    ),
    _Family("l0_hit_tokens_total", "stats.l0.hit_tokens", "Token ids served from L0 hits."),
    _Family("l0_insertions_total", "stats.l0.insertions", "Texts put into L0."),
    _Family("l0_evictions_total", "stats.l0.evictions", "Texts evicted from L0."),
    _Family("l0_refusals_total", "stats.l0.refusals", "Texts not put into L0.", "reason"),
    _Family("l0_entries", "stats.l0.n_entries", "Texts in L0."),
    _Family("l0_max_entries", "config.l0_max_entries", "Texts that L0 may hold."),
    _Family("l0_bytes", "stats.l0.n_bytes", "Bytes L0 holds: keys, ids and overhead."),
    _Family("l0_max_bytes", "config.l0_max_bytes", "Bytes that L0 may hold."),
    _Family("engine", "stats.engine", "1 for the encoder of uncached text.", "engine"),
    _Family("engine_reason", "stats.engine_reason", "1 for why it is that encoder.", "reason"),
    _Family("l1_hits_total", "stats.l1.hits", "Texts with all chunks in L1."),
    _Family("l1_misses_total", "stats.l1.misses", "Texts with some chunk not in L1."),
    _Family("l1_chunk_hits_total", "stats.l1.chunk_hits", "Look-ups of chunks that hit."),
    _Family(
        "l1_chunk_misses_total",
        "stats.l1.chunk_misses_by_reason",
        "Look-ups of chunks that missed.",
        "reason",
    ),
    _Family("l1_segment_hits_total", "stats.l1.segment_hits", "Look-ups of segments that hit."),
    _Family(
        "l1_segment_misses_total",
        "stats.l1.segment_misses_by_reason",
        "Look-ups of segments that missed.",
        "reason",
    ),
    _Family("l1_lookup_characters_total", "stats.l1.lookup_chars", "Characters looked up in L1."),
    _Family(
        "l1_chunk_miss_characters_total",
        "stats.l1.chunk_miss_chars",
        "Characters of chunks not in L1.",
    ),
    _Family(
        "l1_engine_characters_total",
        "stats.l1.engine_chars",
        "Characters of segments that the engine encoded.",
    ),
    _Family("l1_tokens_total", "stats.l1.tokens", "Token ids of texts answered by L1."),
    _Family(
        "l1_engine_tokens_total",
        "stats.l1.engine_tokens",
        "Token ids of texts answered by L1 that the engine made.",
    ),
    _Family("l1_insertions_total", "stats.l1.insertions", "Chunks and segments put into L1."),
    _Family("l1_evictions_total", "stats.l1.evictions", "Chunks and segments evicted from L1."),
    _Family(
        "l1_refusals_total", "stats.l1.refusals", "Texts not cut, segments not kept.", "reason"
    ),
    _Family("l1_chunks", "stats.l1.n_chunks", "Chunks in L1."),
    _Family("l1_segments", "stats.l1.n_segments", "Segments in L1."),
    _Family("l1_bytes", "stats.l1.n_bytes", "Bytes L1 holds."),
    _Family("l1_max_bytes", "config.l1_max_bytes", "Bytes that L1 may hold."),
    _Family("render_hits_total", "stats.render.hits", "Chats of which a part was not rendered."),
    _Family("render_misses_total", "stats.render.misses", "Chats that were rendered whole."),
    _Family("render_messages_total", "stats.render.messages", "Messages of both."),
    _Family(
        "render_hit_messages_total", "stats.render.hit_messages", "Messages not rendered again."
    ),
    _Family("render_insertions_total", "stats.render.insertions", "Rendered messages kept."),
    _Family("render_evictions_total", "stats.render.evictions", "Rendered messages evicted."),
    _Family(
        "render_refusals_total",
        "stats.render.refusals",
        "Chats rendered by transformers, messages not kept.",
        "reason",
    ),
    _Family("render_entries", "stats.render.n_entries", "Rendered messages held."),
    _Family("render_bytes", "stats.render.n_bytes", "Bytes that rendered messages take."),
    _Family("render_max_bytes", "config.render_max_bytes", "Bytes that they may take."),
    _Family("encode_texts_total", "stats.encoded_texts", "Texts encoded, in full or in part."),
    _Family("encode_tokens_total", "stats.encoded_tokens", "Token ids of the encoded texts."),
    _Family("encode_seconds_total", "stats.encode_seconds", "Seconds spent encoding texts."),
    _Family("encode_shared_total", "stats.shared", "Calls that waited for another's encoding."),
    _Family(
        "invalidations_total", "stats.invalidations", "Tokenizer changes that emptied the cache."
    ),
    _Family("bypasses_total", "stats.bypasses", "Calls answered by the plain tokenizer.", "reason"),
)


def _of_tier(name: str, there: str, it: str) -> tuple[_Family, ...]:
    """Return the metrics that disk and Redis share."""
    meanings = {
        "hits": f"States found {there}.",
        "misses": f"States not found {there}.",
        "writes": f"States written to {it}.",
        "read_bytes": f"Bytes read from {it}.",
        "written_bytes": f"Bytes written to {it}.",
    }
    refused = f"States not stored in or not used from {it}.", "reason"
    return (
        *(
            _Family(f"state_{name}_{n}_total", f"stats.{name}.{n}", text)
            for n, text in meanings.items()
        ),
        _Family(f"state_{name}_refusals_total", f"stats.{name}.refusals", *refused),
    )


STATES = (
    _Family("state_lookups_total", "stats.lookups", "Look-ups of prefixes."),
    _Family("state_hits_total", "stats.hits", "Look-ups that found a usable prefix."),
    _Family("state_prompt_tokens_total", "stats.prompt_tokens", "Tokens of all prompts."),
    _Family(
        "state_context_tokens_total",
        "stats.context_tokens",
        "Prompt tokens still in the engine's context.",
    ),
    _Family(
        "state_restored_tokens_total",
        "stats.restored_tokens",
        "Prompt tokens restored from the cache.",
    ),
    _Family("state_saved_tokens_total", "stats.saved_tokens", "Positions stored."),
    _Family("state_saved_blocks_total", "stats.saved_blocks", "Blocks stored."),
    _Family("state_saved_bytes_total", "stats.saved_bytes", "Bytes of states stored."),
    _Family("state_restore_seconds_total", "stats.restore_seconds", "Seconds spent restoring."),
    _Family("state_save_seconds_total", "stats.save_seconds", "Seconds spent saving."),
    _Family("state_evictions_total", "stats.evictions", "Blocks evicted."),
    _Family("state_refusals_total", "stats.refusals", "States not stored or not used.", "reason"),
    _Family("state_misses_total", "stats.misses", "Prompts not reused to their end.", "reason"),
    _Family(
        "state_missed_tokens_total",
        "stats.missed_tokens",
        "Prompt tokens not reused, after the reused ones.",
        "reason",
    ),
    _Family("state_entries", "stats.n_entries", "Stored prefixes."),
    _Family("state_max_entries", "max_entries", "Prefixes that may be stored."),
    _Family("state_blocks", "blocks", "Blocks stored, by tier.", "tier"),
    _Family("state_bytes", "bytes", "Bytes held, by tier.", "tier"),
    _Family("state_max_bytes", "max_bytes", "Bytes that may be held, by tier.", "tier"),
    _Family("state_snapshots", "stats.n_states", "Snapshots in memory."),
    _Family(
        "state_promoted_tokens_total",
        "stats.promoted_tokens",
        "Positions that came from a lower tier.",
    ),
    _Family("state_expirations_total", "stats.expirations", "States that expired."),
    *_of_tier("disk", "on disk", "disk"),
    _Family("state_disk_evictions_total", "stats.disk.evictions", "States pruned from disk."),
    _Family("state_disk_bytes", "stats.disk.n_bytes", "Bytes of files on disk."),
    *_of_tier("redis", "in Redis", "Redis"),
)


class Collector(_Base):
    """Exports the metrics of the tokenizers and state caches that are added, each under a label.

    They are held by weak references: once nothing else uses a cache, the next scrape no longer
    contains it. The collector registers in `registry`, by default prometheus_client's own; with
    None it does not register.

    Errors:  InvalidConfig if the registry already has a Collector.
    Cost:    a scrape reads each cache's counters once, under that cache's own short lock.
    Threads: safe.
    """

    def __init__(self, registry: CollectorRegistry | None = REGISTRY) -> None:
        self._lock = threading.Lock()
        self._observed: dict[tuple[type[_Observed], str], weakref.ref[_Observed]] = {}
        self._shows_loaded = False
        if registry is None:
            return
        try:
            registry.register(self)
        except ValueError as error:
            raise InvalidConfig(
                f"this registry already has tokcache's metrics ({error}); keep one Collector per "
                "registry and add() to it"
            ) from error

    def add(self, model: str, cache: WrappedTokenizer | PrefixStateCache) -> None:
        """Show a wrapped tokenizer or a state cache under the label `model`.

        A tokenizer and a state cache may share a label. Adding a cache again changes its label;
        all views of one tokenizer (`scoped`) count as the same cache.

        Errors: InvalidConfig if the label is empty or another cache of the same kind has it, or if
                `cache` is neither a wrapped tokenizer nor a PrefixStateCache.
        """
        if not isinstance(model, str) or not model:
            raise InvalidConfig(f"model must be a str that is not empty, not {model!r}")
        observed = _observed(cache)
        with self._lock:
            holder = self._living().get((type(observed), model))
            if holder is not None and holder is not observed:
                raise InvalidConfig(
                    f"another {_kind(observed)} already has the label {model!r}; call "
                    f"remove({model!r}) first, or give this one another label"
                )
            self._show(model, observed)

    def add_loaded(self) -> None:
        """Also show every tokenizer that `patch_transformers` wraps, now and later.

        The label is the name or path that the tokenizer was loaded from, followed by `#2` and so
        on if several were loaded from the same one; `add` changes the label.
        """
        self._shows_loaded = True

    def remove(self, model: str) -> None:
        """Stop showing the caches with the label `model`; do nothing if there are none."""
        with self._lock:
            self._observed = {key: ref for key, ref in self._observed.items() if key[1] != model}

    def describe(self) -> Iterator[Metric]:
        """Yield every metric without samples, from which a registry learns the names."""
        yield _build()
        yield from _loads(patch.LoadStats(0, {}))
        for family in (*TEXT, *STATES):
            yield family.describe()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with a sample for each living cache."""
        if self._shows_loaded:
            with self._lock:
                shown = {id(one) for one in self._living().values()}
                for name, core in patch.loaded():
                    if id(core) in shown:
                        continue
                    # Several tokenizers may have been loaded from one name.
                    taken = {label for kind, label in self._living() if kind is CachedTokenizer}
                    numbered = (f"{name or 'unnamed'}#{n}" for n in count(2))
                    labels = chain([name or "unnamed"], numbered)
                    self._show(next(label for label in labels if label not in taken), core)
        living = list(self._living().items())
        yield _build()
        yield from _loads(patch.load_stats())
        # Read all caches before the first metric, so that the values of a scrape belong together.
        text = [
            (key[1], _Text(one.stats(), one.config))
            for key, one in living
            if isinstance(one, CachedTokenizer)
        ]
        states = [
            (key[1], _states(one)) for key, one in living if isinstance(one, PrefixStateCache)
        ]
        for families, seen in ((TEXT, text), (STATES, states)):
            for family in families:
                yield family.collect(seen)

    def _living(self) -> dict[tuple[type[_Observed], str], _Observed]:
        found = ((key, ref()) for key, ref in self._observed.items())
        return {key: one for key, one in found if one is not None}

    def _show(self, model: str, observed: _Observed) -> None:
        living = {key: one for key, one in self._living().items() if one is not observed}
        living[type(observed), model] = observed
        # A new dict, because a scrape may be reading the old one without the lock.
        self._observed = {key: weakref.ref(one) for key, one in living.items()}


def _observed(cache: object) -> _Observed:
    if isinstance(cache, WrappedTokenizer):
        return cache._tokcache  # noqa: SLF001 (ours)
    if isinstance(cache, PrefixStateCache):
        return cache
    raise InvalidConfig(
        f"a {type(cache).__qualname__} has no metrics; pass a result of tokcache.wrap or a "
        "PrefixStateCache"
    )


def _kind(observed: _Observed) -> str:
    return "tokenizer" if isinstance(observed, CachedTokenizer) else "state cache"


def _states(cache: PrefixStateCache) -> _States:
    stats = cache.stats()
    return _States(
        stats,
        cache.max_entries,
        blocks={"ram": stats.n_blocks},
        bytes={"ram": stats.n_bytes},
        max_bytes={"ram": cache.ram_bytes},
    )


def _build() -> Metric:
    return InfoMetricFamily("tokcache_build", "The version.", value={"version": __version__})


def _loads(stats: patch.LoadStats) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "tokcache_patch_wrapped_total", "Tokenizers wrapped when loaded.", stats.n_wrapped
    )
    unwrapped = CounterMetricFamily(
        "tokcache_patch_unwrapped_total",
        "Loaded tokenizers that could not be wrapped, by class.",
        labels=["class"],
    )
    for name, n in stats.unwrapped.items():
        unwrapped.add_metric([name], n)
    yield unwrapped
