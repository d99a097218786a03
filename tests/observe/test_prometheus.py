"""The collector exports every counter of the caches under a documented name."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import tokcache
from tests.text.tokenizers_made import MADE, fast
from tokcache.errors import InvalidConfig
from tokcache.observe import prometheus
from tokcache.observe.prometheus import STATES, TEXT, Collector
from tokcache.stats import CacheStats, L0Stats, L1Stats, RenderStats, StateStats, TierStats
from tokcache.text.wrappers.patch import patch_transformers, unpatch_transformers

HERE = Path(prometheus.__file__).parent
CONFIG = tokcache.CacheConfig(engine="tokenizers", l0_max_entries=77)
FINGERPRINT = b"model"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def collector(registry: CollectorRegistry) -> Collector:
    return Collector(registry)


def made(kind: str = "byte_level_bpe") -> Any:
    return tokcache.wrap(MADE[kind](), CONFIG)


def value(registry: CollectorRegistry, name: str, model: str = "m", **labels: str) -> float | None:
    return registry.get_sample_value(f"tokcache_{name}", {"model": model, **labels})


def models(registry: CollectorRegistry) -> set[str]:
    samples = (one for family in registry.collect() for one in family.samples)
    return {one.labels["model"] for one in samples if "model" in one.labels}


def stored_states() -> tokcache.PrefixStateCache:
    """Return a cache that saved 300 positions and restored 257 of them."""
    states = tokcache.PrefixStateCache(ram_bytes=1 << 20)
    tokens = list(range(300))

    def measure(_start: int, _stop: int) -> int:
        return 8

    def copy(_start: int, _stop: int, _buffer: memoryview) -> None: ...

    states.namespace(FINGERPRINT).save(tokens, copy, measure)
    with states.namespace(FINGERPRINT).plan(tokens[:257]) as plan:
        plan.restore(copy)
    return states


# ---- values


def test_every_counter_of_a_tokenizer_is_shown(
    registry: CollectorRegistry, collector: Collector
) -> None:
    tok = made()
    collector.add("m", tok)
    for text in ("hello world", "hello world", "quick brown fox " * 100):
        tok.token_ids(text)
    tok.encode("hello")
    tok.add_tokens(["hello"])
    stats = tok.cache_stats()
    assert stats.l0.hits == stats.bypasses["encoding_objects"] == stats.invalidations == 1
    shown = {
        "l0_hits_total": stats.l0.hits,
        "l0_hit_tokens_total": stats.l0.hit_tokens,
        "l0_max_entries": 77,
        "l0_max_bytes": CONFIG.l0_max_bytes,
        "l1_tokens_total": stats.l1.tokens,
        "l1_lookup_characters_total": stats.l1.lookup_chars,
        "encode_texts_total": stats.encoded_texts,
        "encode_seconds_total": stats.encode_seconds,
        "invalidations_total": 1,
    }
    assert {name: value(registry, name) for name in shown} == shown
    assert value(registry, "bypasses_total", reason="encoding_objects") == 1
    for reason in ("new", "evicted", "not_known"):
        got = value(registry, "l0_misses_total", reason=reason)
        assert got == stats.l0.misses_by_reason[reason]
        got = value(registry, "l1_chunk_misses_total", reason=reason)
        assert got == stats.l1.chunk_misses_by_reason[reason]
        got = value(registry, "l1_segment_misses_total", reason=reason)
        assert got == stats.l1.segment_misses_by_reason[reason]
    assert value(registry, "l0_misses_total", reason="new") == stats.l0.misses > 0
    engine, reason = tok.cache_stats().engine, tok.cache_stats().engine_reason
    assert value(registry, "engine", engine=engine) == 1
    assert value(registry, "engine_reason", reason=reason) == 1
    tok.cache_clear()
    assert value(registry, "l0_hits_total") == 0


def test_every_counter_of_a_state_cache_is_shown(
    registry: CollectorRegistry, collector: Collector
) -> None:
    states = stored_states()
    states.refuse("no_room")
    collector.add("m", states)
    stats = states.stats()
    shown = {
        "state_lookups_total": 1,
        "state_hits_total": 1,
        "state_prompt_tokens_total": 257,
        "state_context_tokens_total": 0,
        "state_restored_tokens_total": 257,
        "state_saved_tokens_total": 300,
        "state_saved_blocks_total": stats.saved_blocks,
        "state_saved_bytes_total": stats.saved_bytes,
        "state_restore_seconds_total": stats.restore_seconds,
        "state_entries": stats.n_entries,
        "state_max_entries": 32,
    }
    assert {name: value(registry, name) for name in shown} == shown
    assert value(registry, "state_bytes", tier="ram") == stats.n_bytes > 0
    assert value(registry, "state_blocks", tier="ram") == stats.n_blocks
    assert value(registry, "state_max_bytes", tier="ram") == 1 << 20
    assert value(registry, "state_refusals_total", reason="no_room") == 1


NESTED = {
    "L0Stats": L0Stats,
    "L1Stats": L1Stats,
    "RenderStats": RenderStats,
    "TierStats": TierStats,
}


def leaves(kind: Any, prefix: str) -> Iterator[str]:
    for one in dataclasses.fields(kind):
        nested = NESTED.get(str(one.type))
        path = f"{prefix}.{one.name}"
        yield from leaves(nested, path) if nested else [path]


def test_no_counter_is_left_out() -> None:
    by_tier = {"stats.n_blocks", "stats.n_bytes"}
    by_tier |= {"stats.redis.n_bytes", "stats.redis.evictions"}  # Redis itself reports them
    sums = {f"stats.{name}" for name in ("l0.misses", "l1.chunk_misses", "l1.segment_misses")}
    paths = {one.path for one in TEXT}
    assert {f"{path}_by_reason" for path in sums} <= paths
    assert set(leaves(CacheStats, "stats")) - sums <= paths
    assert set(leaves(StateStats, "stats")) - by_tier <= {one.path for one in STATES}


def test_a_model_may_have_a_tokenizer_and_states(
    registry: CollectorRegistry, collector: Collector
) -> None:
    tok, states, other = made(), stored_states(), made("unigram")
    for model, cache in (("a", tok), ("a", states), ("b", other)):
        collector.add(model, cache)
    tok.token_ids("hello")
    assert value(registry, "l0_misses_total", "a", reason="new") == 1
    assert value(registry, "l0_misses_total", "b", reason="new") == 0
    assert value(registry, "state_hits_total", "a") == 1
    assert value(registry, "state_hits_total", "b") is None


# ---- labels and lifetimes


def test_a_label_belongs_to_one_living_tokenizer(
    registry: CollectorRegistry, collector: Collector
) -> None:
    first, second = made(), made()
    collector.add("m", first)
    collector.add("m", first)
    collector.add("m", first.scoped("tenant"))
    with pytest.raises(InvalidConfig, match=r"another tokenizer already has .*'m'.*remove\('m'\)"):
        collector.add("m", second)
    collector.add("n", first)
    assert models(registry) == {"n"}
    collector.add("m", second)
    assert models(registry) == {"m", "n"}
    collector.remove("m")
    collector.remove("m")
    assert models(registry) == {"n"}


@pytest.mark.parametrize("kind", ["tokenizers", "transformers", "states"])
def test_a_cache_that_was_garbage_collected_is_no_longer_shown(
    registry: CollectorRegistry, collector: Collector, kind: str
) -> None:
    cache: Any = {
        "tokenizers": made,
        "transformers": lambda: tokcache.wrap(fast(MADE["unigram"]()), CONFIG),
        "states": stored_states,
    }[kind]()
    collector.add("m", cache)
    generate_latest(registry)
    assert models(registry) == {"m"}
    del cache
    gc.collect()
    assert models(registry) == set()
    again = made()
    collector.add("m", again)
    assert models(registry) == {"m"}


@pytest.mark.parametrize(
    "bad",
    [None, "tok", MADE["unigram"](), tokcache.L0Cache()],
    ids=["none", "name", "tokenizer", "unnamed L0"],
)
def test_an_object_without_metrics_is_refused(collector: Collector, bad: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"has no metrics; pass a result of tokcache\.wrap"):
        collector.add("m", bad)


@pytest.mark.parametrize("bad", ["", None, 3])
def test_a_label_is_a_str(collector: Collector, bad: Any) -> None:
    with pytest.raises(InvalidConfig, match="model must be a str"):
        collector.add(bad, made())


def test_a_registry_has_one_collector(registry: CollectorRegistry, collector: Collector) -> None:
    with pytest.raises(InvalidConfig, match="one Collector per registry"):
        Collector(registry)
    registry.unregister(collector)
    Collector(registry)
    Collector(None)
    assert list(registry.collect())


def test_loaded_tokenizers_are_labelled_by_name(
    registry: CollectorRegistry, collector: Collector, tmp_path: Path
) -> None:
    import transformers  # noqa: PLC0415 (seconds to import)

    fast(MADE["unigram"]()).save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    auto: Any = transformers.AutoTokenizer
    name, load = str(tmp_path), auto.from_pretrained
    patch_transformers(CONFIG)
    try:
        first = load(tmp_path)
        assert models(registry) == set()
        collector.add_loaded()
        second = load(tmp_path)
        assert {name, f"{name}#2"} <= models(registry)
        collector.add("mine", second)
        assert {name, "mine"} <= models(registry)
        assert f"{name}#2" not in models(registry)
        third = load(tmp_path)
        assert f"{name}#2" in models(registry)
        first("hello")
        third("hello")
        third("hello")
        assert value(registry, "l0_hits_total", name) == 0
        assert value(registry, "l0_hits_total", f"{name}#2") == 1
        load(tmp_path / "slow")
    finally:
        unpatch_transformers()
    count = registry.get_sample_value
    assert (count("tokcache_patch_wrapped_total") or 0) >= 3
    assert (count("tokcache_patch_unwrapped_total", {"class": "ByT5Tokenizer"}) or 0) >= 1


# ---- names


def test_names_follow_the_conventions_of_prometheus(
    registry: CollectorRegistry, collector: Collector
) -> None:
    tok, states = made(), stored_states()
    collector.add("m", tok)
    collector.add("m", states)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert len({one.name for one in families}) == len(families)
    for one in families:
        assert re.fullmatch(r"tokcache_[a-z][a-z0-9_]*[a-z0-9]", one.name)
        assert one.documentation.endswith(".")
        assert not re.search(r"milli|micro|minute|hour|kilo|mega|_ms|_mb|_count$|_sum$", one.name)
        is_counter = one.type == "counter"
        assert all(sample.name.endswith("_total") == is_counter for sample in one.samples)
        assert len({tuple(sample.labels.items()) for sample in one.samples}) == len(one.samples)


def test_describe_and_collect_yield_the_same_metrics(collector: Collector) -> None:
    described = [(one.name, one.type, one.documentation) for one in collector.describe()]
    collected = [(one.name, one.type, one.documentation) for one in collector.collect()]
    assert described == collected


def exposed() -> dict[str, tuple[str, str]]:
    """Return the type and meaning of every metric, by the name that Prometheus sees."""
    suffix = {"counter": "_total", "info": "_info"}
    return {
        one.name + suffix.get(one.type, ""): (one.type.replace("info", "gauge"), one.documentation)
        for one in Collector(None).describe()
    }


def test_the_readme_names_every_metric() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| [\w, ]* \| (.*) \|$",
        (HERE / "README.md").read_text(),
        re.MULTILINE,
    )
    assert {name: (kind, meaning) for name, kind, meaning in rows} == exposed()
    assert len(rows) == len(exposed())


# ---- the dashboard


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((HERE / "grafana_dashboard.json").read_text(encoding="utf-8"))


def panels(dashboard: Any) -> list[Any]:
    return [one for one in dashboard["panels"] if one["type"] != "row"]


def expressions(dashboard: Any) -> list[str]:
    return [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]


def test_the_dashboard_can_be_imported(dashboard: Any) -> None:
    assert dashboard["id"] is None
    assert dashboard["schemaVersion"] >= 36  # since 36 an object names the data source
    assert dashboard["title"] == dashboard["uid"] == "tokcache"
    ids = [one["id"] for one in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_data_source_and_model_are_variables(dashboard: Any) -> None:
    source, model = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    assert (model["name"], model["type"], model["multi"], model["includeAll"]) == (
        "model",
        "query",
        True,
        True,
    )
    wanted = {"type": "prometheus", "uid": "${datasource}"}
    assert model["datasource"] == wanted
    for panel in panels(dashboard):
        assert panel["datasource"] == wanted
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        assert all(target["datasource"] == wanted for target in panel["targets"])


def test_the_dashboard_queries_metrics_that_exist(dashboard: Any) -> None:
    asked = set(re.findall(r"tokcache_\w+", " ".join(expressions(dashboard))))
    assert asked <= set(exposed())
    of_all_models = asked - {one for one in asked if re.match(r"tokcache_(patch|build)_", one)}
    for name in of_all_models:
        uses = [one for one in expressions(dashboard) if name in one]
        assert all(f'{name}{{model=~"$model"}}' in one for one in uses)
    definition = dashboard["templating"]["list"][1]["definition"]
    matched = re.search(r'__name__=~"(.+)"', definition)
    assert matched
    names = {one for one in exposed() if re.fullmatch(matched[1], one)}
    assert names == {"tokcache_l0_hits_total", "tokcache_state_hits_total"}


def test_the_dashboard_groups_by_labels_that_exist(dashboard: Any) -> None:
    labels = {f"tokcache_{one.name}": {"model", one.label} for one in (*TEXT, *STATES)}
    labels["tokcache_patch_unwrapped_total"] = {"class"}
    labels["tokcache_build_info"] = {"version"}
    for expression in expressions(dashboard):
        for grouped, name in re.findall(
            r"by \(([\w, ]+)\) \((?:rate\()?(tokcache_\w+)", expression
        ):
            assert set(grouped.split(", ")) <= labels[name]


def test_every_expression_is_promql(dashboard: Any) -> None:
    promql = pytest.importorskip("promql_parser", reason="promql-parser parses the expressions")
    for expression in expressions(dashboard):
        promql.parse(expression.replace("$__rate_interval", "5m"))
    with pytest.raises(ValueError, match="unclosed"):
        promql.parse("sum by (model) (rate(tokcache_l0_hits_total[5m])")


# ---- scrapes


def test_a_blocked_scrape_delays_no_request(
    registry: CollectorRegistry, collector: Collector
) -> None:
    """A request goes on while a scrape waits for the lock of another cache."""
    tok, stuck = made(), stored_states()
    collector.add("a", tok)
    collector.add("b", stuck)
    tok.token_ids("hello")
    with ThreadPoolExecutor(1) as pool:
        with stuck._store.lock:
            scrape = pool.submit(generate_latest, registry)
            time.sleep(0.05)
            assert tok.token_ids("hello") == tok.token_ids("hello")
            assert len(tok.token_ids("never seen before")) > 0
            collector.add("c", tok)
            assert not scrape.done()
        assert b"tokcache_state_hits_total" in scrape.result(20)


def test_scrapes_and_requests_run_concurrently(
    registry: CollectorRegistry, collector: Collector
) -> None:
    tok = made()
    collector.add("m", tok)
    stop = threading.Event()

    def scrape() -> int:
        seen = [0.0]
        while not stop.is_set():
            seen.append(value(registry, "l0_hits_total") or 0.0)
        assert seen == sorted(seen)
        return len(seen)

    def add_and_drop() -> None:
        while not stop.is_set():
            collector.add("other", made("unigram"))
            gc.collect()

    with ThreadPoolExecutor(4) as pool:
        scraping = [pool.submit(scrape) for _ in range(2)] + [pool.submit(add_and_drop)]
        try:
            for n in range(3000):
                tok.token_ids(str(n % 50))
        finally:
            stop.set()
        assert all(one.result(20) != 0 for one in scraping)
    assert value(registry, "l0_hits_total") == 2950


def test_the_error_without_prometheus_client_says_how_to_install_it() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import tokcache.observe\n"
        "try:\n import tokcache.observe.prometheus\n"
        "except ImportError as error:\n print(type(error).__name__, error)"
    )
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("MissingExtra")
    assert "pip install 'tokcache[metrics]'" in done.stdout
