"""Tenants share no slot, no file and no figure, and a key is needed where keys are configured."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, strategies

from tests.gateway.gateways import Gateway, cached, gateway, httpx, system, upstream, user
from tokcache.errors import ApiError, InvalidConfig
from tokcache.gateway.config import TenantConfig
from tokcache.gateway.tenants import Tenant, Tenants, digest_of, new_key

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = {
    "one": "key-of-one",
    "two": "key-of-two",
    "boss": "key-of-boss",
    "metered": "key-of-metered",
}
TENANTS: list[dict[str, Any]] = [
    {"name": "one", "key_sha256": digest_of(KEYS["one"])},
    {"name": "two", "key_sha256": digest_of(KEYS["two"]), "max_in_flight": 1},
    {"name": "boss", "key_sha256": digest_of(KEYS["boss"]), "is_admin": True,
     "tokens_per_minute": 300},
    {"name": "metered", "key_sha256": digest_of(KEYS["metered"]), "tokens_per_minute": 300},
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with (
        upstream(tmp_path_factory.mktemp("slots")) as process,
        gateway(tmp_path_factory.mktemp("gateway"), process, tenants=TENANTS) as made,
    ):
        yield made


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": KEYS["one"]}, {"x-api-key": ""},
     {"authorization": f"Basic {KEYS['one']}"}, {"x-api-key": digest_of(KEYS["one"])}],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize", "/metrics",
                                  "/status.json", "/v1/models", "/v1/embeddings"])  # fmt: skip
def test_without_a_known_key_nothing_is_served(
    served: Gateway, path: str, headers: dict[str, str]
) -> None:
    method = "GET" if path in ("/metrics", "/status.json", "/v1/models") else "POST"
    answer = served.http.request(method, path, headers=headers, content=b"{}" * (method == "POST"))
    assert answer.status_code == 401
    told = answer.json()["error"]
    assert told["type"] == "authentication_error"
    assert not any(each in answer.text for each in KEYS.values())


def test_a_prefix_of_one_tenant_is_never_reused_for_another(served: Gateway) -> None:
    messages = [system("A secret plan. " * 60), user("go")]
    assert cached(served.chat(messages, headers=key("one"))) == 0
    mine = served.chat(messages, headers=key("one"))
    assert cached(mine) > 150
    for _ in range(3):
        # Both slots and the file of the first tenant are passed by.
        other = served.chat([*messages, user(str(_))], headers=key("two"))
        if not _:
            assert cached(other) == 0
            assert other["tokcache"]["reason"] == "never_stored"
    assert cached(served.chat(messages, headers=key("one"))) > 150
    assert served.service.router.counts["erase"] >= 2


def test_a_reason_is_in_the_header_the_answer_and_the_figures(served: Gateway) -> None:
    before = served.service.router.misses["never_stored"]
    body = {"messages": [system("Of one tenant. " * 60), user("go")], "max_tokens": 2}
    first = served.http.post("/v1/chat/completions", json=body, headers=key("one"))
    told = first.json()["tokcache"]
    assert first.headers["x-tokcache-reason"] == told["reason"] == "never_stored"
    again = served.http.post("/v1/chat/completions", json=body, headers=key("one"))
    assert "x-tokcache-reason" not in again.headers
    assert again.json()["tokcache"]["reason"] == ""
    other = served.http.post("/v1/chat/completions", json=body, headers=key("two"))
    # A slot of its own may hold the beginning of the template.
    assert {**other.json()["tokcache"], "cached_tokens": 0} == {**told, "cached_tokens": 0}
    assert other.json()["tokcache"]["cached_tokens"] < 10
    assert served.service.router.misses["never_stored"] == before + 2
    metrics = served.http.get("/metrics", headers=key("boss")).text
    assert f'tokcache_gateway_misses_total{{reason="never_stored"}} {before + 2}' in metrics
    assert 'tokcache_gateway_missed_tokens_total{reason="never_stored"}' in metrics
    status = served.http.get("/status.json", headers=key("boss")).json()
    assert status["misses"]["never_stored"] == before + 2
    assert status["recent"][0]["reason"] == "never_stored"


def test_only_an_admin_sees_the_figures_of_all(served: Gateway) -> None:
    for path in ("/metrics", "/status.json"):
        assert served.http.get(path, headers=key("one")).status_code == 403
        assert served.http.get(path, headers=key("boss")).status_code == 200


def test_embeddings_are_refused_because_they_can_not_be_pinned(served: Gateway) -> None:
    answer = served.http.post("/v1/embeddings", json={"input": "x"}, headers=key("one"))
    assert answer.status_code == 501


def test_limits_answer_429_and_say_when_to_come_back(served: Gateway) -> None:
    body: Any = {"messages": [user("count")], "max_tokens": 400, "ignore_eos": True}
    found: list[httpx.Response] = []

    def ask() -> None:
        found.append(served.http.post("/v1/chat/completions", json=body, headers=key("two")))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in found) == [200, 429, 429]
    served.chat([user("count")], max_tokens=400, ignore_eos=True, headers=key("boss"))
    late = served.http.post("/v1/chat/completions", json=body, headers=key("boss"))
    assert late.status_code == 429
    assert late.json()["error"]["code"] == "tokens_per_minute"
    assert int(late.headers["retry-after"]) >= 10


def test_a_client_that_leaves_while_its_request_waits_has_none_in_flight(served: Gateway) -> None:
    long = {"messages": [user("count")], "max_tokens": 1900, "stream": True, "ignore_eos": True}
    asked = {"messages": [user("hi")], "max_tokens": 2}
    path = "/v1/chat/completions"
    with contextlib.ExitStack() as streams:
        for n in range(2):  # as many as there are slots
            body = {**long, "messages": [user(f"count from {n}")]}
            answer = streams.enter_context(
                served.http.stream("POST", path, json=body, headers=key("one"))
            )
            assert answer.status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            served.http.post(path, json=asked, headers=key("two"), timeout=0.7)
    served.wait_until_idle()
    assert served.http.post(path, json=asked, headers=key("two")).status_code == 200


def test_every_configured_digest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(known: str, digest: str) -> bool:
        compared.append(known)
        return known == digest

    monkeypatch.setattr("tokcache.gateway.tenants.hmac.compare_digest", compare)
    configs = tuple(TenantConfig(**each) for each in TENANTS)
    tenants = Tenants(configs)
    for presented in (KEYS["one"], KEYS["boss"]):
        compared.clear()
        assert tenants.find({"x-api-key": presented}).scope is not None
        assert compared == [each.key_sha256 for each in configs]


def test_new_keys_fit_the_configuration() -> None:
    made, digest = new_key()
    tenants = Tenants((TenantConfig(name="x", key_sha256=digest),))
    assert tenants.find({"x-api-key": made}).scope == "x"
    with pytest.raises(InvalidConfig):
        TenantConfig(name="x", key_sha256=made)


@given(strategies.lists(strategies.tuples(strategies.floats(0, 30), strategies.integers(0, 500))))
def test_tokens_a_minute_hold_over_any_run(uses: list[tuple[float, int]]) -> None:
    config = TenantConfig(name="x", key_sha256="0" * 64, tokens_per_minute=600)
    tenant = Tenant(config)
    now, n_used, most = 0.0, 0, 0
    for pause, n_tokens in uses:
        now += pause
        try:
            tenant.start(now)
        except ApiError:
            continue
        tenant.charge(n_tokens)
        tenant.end()
        n_used, most = n_used + n_tokens, max(most, n_tokens)
    assert n_used <= 600 + now * 10 + most
    assert tenant.n_in_flight == 0


def test_the_tokens_of_a_stream_that_its_client_closes_are_charged(served: Gateway) -> None:
    headers = key("metered")  # 300 tokens a minute
    body = {"messages": [system(), user("count")], "max_tokens": 1500, "ignore_eos": True,
            "stream": True}  # fmt: skip
    path = "/v1/chat/completions"
    with served.http.stream("POST", path, json=body, headers=headers) as answer:
        lines = (line for line in answer.iter_lines() if line)
        n_read = sum(1 for _, line in zip(range(100), lines, strict=False) if line)
    served.wait_until_idle()
    assert n_read == 100
    # The system prompt has over 400 tokens, so over a minute's tokens are owed.
    for path, asked in (
        ("/v1/chat/completions", {**body, "stream": False}),
        ("/v1/messages/count_tokens", {"messages": [user("x")]}),
        ("/tokenize", {"content": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        answer = served.http.post(path, json=asked, headers=headers)
        assert answer.status_code == 429, path
        assert int(answer.headers["retry-after"]) > 20


def test_a_plan_does_not_depend_on_the_texts_of_others(served: Gateway) -> None:
    router = served.service.router
    before = router.estimate("one", 1000)
    for number in range(3):
        served.chat([user(f"{number}" + "\u0f04\u1234☃" * 100)], max_tokens=1, headers=key("two"))
    assert router.estimate("one", 1000) == before
    assert router.estimate("two", 1000) > before


def test_the_tokens_of_a_prompt_that_was_cut_off_are_the_servers_own(served: Gateway) -> None:
    first = [user("☃" * 300)]
    body = {"messages": first, "max_tokens": 500, "ignore_eos": True, "stream": True}
    path = "/v1/chat/completions"
    with served.http.stream("POST", path, json=body, headers=key("one")) as answer:
        lines = (line for line in answer.iter_lines() if line)
        for _ in range(10):
            next(lines)
    served.wait_until_idle()
    more = [*first, {"role": "assistant", "content": "k"}, user("more")]
    answer = served.chat(more, headers=key("one"), max_tokens=1)
    told = answer["tokcache"]
    assert abs(told["planned_tokens"] - told["cached_tokens"]) < 40, told


def test_no_key_is_in_a_log_an_error_a_metric_or_a_page(
    served: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "key-of-nobody"
    with caplog.at_level(logging.DEBUG):
        told = [served.chat([user("hello")], headers=key("one"))]
        for name in ("authorization", "x-api-key"):
            answer = served.http.post("/v1/chat/completions", json={}, headers={name: wrong})
            told += [answer.text, answer.headers]
        for path in ("/metrics", "/status.json", "/"):
            answer = served.http.get(path, headers=key("boss"))
            assert answer.status_code == 200
            told += [answer.text, answer.headers]
    ours = [each for each in caplog.records if each.name.startswith("tokcache")]
    told += [repr(served.service), *(each.getMessage() for each in ours)]
    secrets = [*KEYS.values(), wrong, served.service.folder.key.hex()]
    assert not [each for each in told if any(secret in str(each) for secret in secrets)]
