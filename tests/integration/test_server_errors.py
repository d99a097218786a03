"""Servers that are unreachable, slow, locked or wrong: typed errors, and no slot lost.

A small HTTP server stands in where a real llama-server does not behave so.
"""

from __future__ import annotations

import json
import logging
import ssl
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.pretended import PROPS, SLOTS, Pretender, answer, pretend
from tests.integration.served import N_PREDICT, InLoop, client, port_of, prompt, serve
from tokcache.errors import (
    InvalidAnswer,
    InvalidConfig,
    InvalidFilename,
    KeyRejected,
    PromptTooLong,
    RequestRejected,
    ServerError,
    ServerFailed,
    ServerLoading,
    ServerRefused,
    ServerTimeout,
    ServerUnreachable,
    ServerUnsupported,
    TokcacheError,
)
from tokcache.llama.server import Completion, LlamaServer, Slot, SlotSettings, calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.integration.served import Connect


@pytest.fixture(params=[LlamaServer, InLoop], ids=["LlamaServer", "AsyncLlamaServer"])
def connect(request: pytest.FixtureRequest) -> Connect:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def pretender() -> Pretender:
    return Pretender()


@pytest.fixture
def url(pretender: Pretender) -> Iterator[str]:
    with pretend(pretender) as found:
        yield found


def test_every_error_is_a_tokcache_error() -> None:
    kinds = [ServerUnreachable, ServerTimeout, RequestRejected, ServerFailed, InvalidAnswer]
    assert all(issubclass(kind, ServerError) for kind in kinds)
    assert issubclass(InvalidFilename, TokcacheError)


def test_a_refused_connection_is_tried_again_then_named(connect: Connect) -> None:
    began = time.monotonic()
    with (
        connect("http://127.0.0.1:9", retries=2) as server,
        pytest.raises(ServerRefused, match="out of reach"),
    ):
        server.complete([1, 2, 3], n_predict=1)
    assert 0.3 <= time.monotonic() - began < 5


def test_a_host_that_does_not_exist_is_unreachable(connect: Connect) -> None:
    with (
        connect("http://no-such-host.invalid:1", retries=0) as server,
        pytest.raises(ServerUnreachable, match="out of reach"),
    ):
        server.props()


def test_only_repeatable_requests_are_repeated(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    answers = iter([None, None, {"status": "ok"}])
    pretender.say["/health"] = lambda _: next(answers)
    pretender.say["/completion"] = None
    with connect(url, retries=2) as server:
        assert server.health() == "ok"
        assert pretender.asked["/health"] == 3
        with pytest.raises(ServerUnreachable):
            server.completion([1, 2], n_predict=1)
        assert pretender.asked["/completion"] == 1


def test_a_request_that_timed_out_is_not_repeated(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    def late(_: Any) -> Any:
        time.sleep(0.6)
        return {"status": "ok"}

    pretender.say["/health"] = late
    with (
        connect(url, timeout_s=0.15) as server,
        pytest.raises(ServerTimeout, match="did not answer /health in time"),
    ):
        server.health()
    assert pretender.asked["/health"] == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RequestRejected),
        (401, KeyRejected),
        (403, KeyRejected),
        (404, RequestRejected),
        (422, RequestRejected),
        (500, ServerFailed),
        (501, ServerUnsupported),
        (502, ServerFailed),
        (503, ServerLoading),
    ],
)
@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "in its own words"}},
        {"error": "in its own words"},
        b"in its own words",
        ["in its own words"],
    ],
)
def test_each_status_has_its_error_and_the_servers_message(
    status: int,
    kind: type[ServerError],
    body: Any,
    url: str,
    pretender: Pretender,
) -> None:
    pretender.say["/health"] = (status, body)
    with LlamaServer(url) as server, pytest.raises(kind, match="in its own words") as raised:
        server.health()
    assert raised.value.status == status  # type: ignore[attr-defined]


GARBAGE: list[Any] = [
    b"<html>",
    b"",
    b"\xff\xfe\x00",
    [],
    {},
    None.__class__.__name__,
    7,
    {"status": 3},
]


@pytest.mark.parametrize("said", GARBAGE)
@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/health", lambda server: server.health()),
        ("/props", lambda server: server.props()),
        ("/completion", lambda server: server.completion([1, 2], n_predict=1)),
        ("/tokenize", lambda server: server.tokenize("a")),
        ("/detokenize", lambda server: server.detokenize([1])),
        ("save", lambda server: server.save_slot(0, "a.bin")),
        ("restore", lambda server: server.restore_slot(0, "a.bin")),
    ],
)
def test_garbage_is_an_error_that_quotes_it(
    path: str,
    ask: Callable[[LlamaServer], Any],
    said: Any,
    url: str,
    pretender: Pretender,
) -> None:
    pretender.say[path] = said
    with LlamaServer(url) as server, pytest.raises(InvalidAnswer, match=r"127\.0\.0\.1"):
        ask(server)


@pytest.mark.parametrize(
    "said",
    [
        [{"id": 0, "n_ctx": 8, "is_processing": False}] * 2,
        [{"id": -1, "n_ctx": 8, "is_processing": False}],
        [{"id": "0", "n_ctx": 8, "is_processing": False}],
        [{"n_ctx": 8, "is_processing": False}],
        [7],
        {"slots": []},
    ],
)
def test_slots_that_make_no_sense_are_refused(
    connect: Connect, said: Any, url: str, pretender: Pretender
) -> None:
    pretender.say["/slots"] = said
    with connect(url) as server, pytest.raises(InvalidAnswer, match="/slots"):
        server.slots()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["id", "n_ctx", "state", "timings", "tokens", "content", "data", "meta", "cache_n"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
VALID: list[tuple[Any, Any]] = [
    (calls.props(), PROPS),
    (calls.slots(), [{**SLOTS[0], "n_past": 3}]),
    (calls.model_meta(), {"data": [{"meta": {"n_vocab": 7}}]}),
    (calls.completion([1], {}), answer(10)),
    (
        calls.completion([1], {}),
        answer(9, completion_probabilities=[{"top_logprobs": [{"id": 1, "logprob": -0.5}]}]),
    ),
    (calls.save_slot(0, "a"), {"n_saved": 1, "n_written": 2}),
    (calls.tokenize("a", add_special=True), {"tokens": [1]}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every value inside a JSON value."""
    inner = list(value.items()) if isinstance(value, dict) else []
    inner += list(enumerate(value)) if isinstance(value, list) else []
    return [path, *(each for key, part in inner for each in places(part, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of a JSON value with `new` at `path`."""
    if not path:
        return new
    copied = json.loads(json.dumps(value))
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = new
    return copied


@settings(deadline=None)
@given(st.data())
def test_any_json_is_read_or_refused(data: st.DataObject) -> None:
    call, valid = data.draw(st.sampled_from(VALID))
    call.read(valid)
    said = replaced(valid, data.draw(st.sampled_from(places(valid))), data.draw(JSON))
    try:
        found = call.read(said)
    except InvalidAnswer:
        return
    if isinstance(found, Completion):
        assert 0 <= found.n_cached <= found.n_prompt
        assert calls.predicted_seconds(said) >= 0


def test_slots_of_old_and_new_servers_are_read(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    pretender.say["/slots"] = [
        {"id": 0, "n_ctx": 8, "state": 1, "n_past": 7},
        {"id": 1, "n_ctx": 8, "state": 0, "n_past": 0},
        {"id": 2, "n_ctx": 8, "is_processing": True, "id_task": 4, "n_prompt_tokens": 6},
        {"id": 3, "n_ctx": 8, "is_processing": False},
    ]
    with connect(url) as server:
        assert server.slots() == (
            Slot(0, 8, True, 7),
            Slot(1, 8, False, 0),
            Slot(2, 8, True, 6),
            Slot(3, 8, False, None),
        )


def test_answers_of_old_servers_are_read(connect: Connect, url: str, pretender: Pretender) -> None:
    pretender.say["/completion"] = answer(10, timings={"prompt_n": 4, "predicted_ms": 0.1})
    with connect(url) as server:
        assert server.completion([1] * 10, n_predict=1).n_cached == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"timings": {"cache_n": 99, "prompt_n": 1, "predicted_ms": 1.0}},
        {"timings": {"cache_n": -1, "prompt_n": 1, "predicted_ms": 1.0}},
        {"timings": "fast"},
        {"tokens_evaluated": -5},
        {"tokens": ["a"]},
        {"tokens": [2**40]},
        {"content": None},
        {"tokens_cached": True},
        {"completion_probabilities": [{"id": 1}]},
    ],
)
def test_answers_that_make_no_sense_are_refused(
    connect: Connect, changes: dict[str, Any], url: str, pretender: Pretender
) -> None:
    pretender.say["/completion"] = answer(10, **changes)
    with connect(url) as server:
        with pytest.raises(InvalidAnswer, match="/completion"):
            server.complete([1] * 10, n_predict=1)
        pretender.say["/completion"] = pretender.complete
        # No slot was lost: as many requests at once as there are slots.
        server.flush(10)
        for _ in range(4):
            assert server.complete([1] * 10, n_predict=1).completion.text == " it"


STREAMS = {
    "nothing": b"",
    "no last piece": b'data: {"content": "a", "tokens": [5]}\n\n',
    "no json": b"data: {\n\n",
    "no data": b"hello\n\n",
    "no content": b'data: {"tokens": [5]}\n\n',
    "an error": b'data: {"error": {"code": 500, "message": "own words"}}\n\n',
    "an old error": b'error: {"code": 500, "message": "own words"}\n\n',
    "an early end": b'data: {"content": "", "stop": true}\n\n',
}


@pytest.mark.parametrize("said", STREAMS)
def test_broken_streams_are_errors_and_lose_no_slot(
    connect: Connect, said: str, url: str, pretender: Pretender
) -> None:
    pretender.say["/completion"] = STREAMS[said]
    with connect(url) as server:
        for _ in range(3):
            with pytest.raises((InvalidAnswer, ServerUnreachable, ServerFailed)) as raised:
                list(server.stream([1, 2, 3], n_predict=3))
            assert "own words" in str(raised.value) or "error" not in said
        server.flush(10)


def test_a_server_that_reports_nonsense_is_served_without_reuse(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    pretender.say["/props"] = {"total_slots": "two"}
    with connect(url) as server:
        assert server.complete([1] * 100, n_predict=1).completion.text == " it"
        assert server.stats().refusals == {"server_not_understood": 1}
        assert "id_slot" not in pretender.bodies[-1]
        pretender.say["/props"] = PROPS
        assert server.complete([1] * 100, n_predict=1).id_slot >= 0
    strict = SlotSettings(on_error="raise")
    pretender.say["/props"] = {"total_slots": 0}
    with (
        connect(url, slot_settings=strict) as server,
        pytest.raises(InvalidAnswer, match="total_slots"),
    ):
        server.complete([1] * 100, n_predict=1)


def test_nothing_is_restored_if_the_servers_properties_cannot_be_read(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    with connect(url) as server:
        for seed in (1, 2, 3):
            server.complete(prompt(seed, 100), n_predict=1)
            server.flush(10)
        pretender.say["/props"] = b"<html>"
        n_restores = pretender.asked["restore"]
        for seed in (1, 2, 3):
            found = server.complete(prompt(seed, 100), n_predict=1)
            assert (found.n_live, found.n_restored, found.completion.n_cached) == (0, 0, 0)
            server.flush(10)
        assert pretender.asked["restore"] == n_restores
        assert server.stats().refusals == {"server_not_understood": 3}
        pretender.say["/props"] = PROPS
        assert server.complete(prompt(1, 100), n_predict=1).completion.n_cached == 99


def test_a_server_that_does_not_use_its_restores_is_noticed(
    connect: Connect, url: str, pretender: Pretender, caplog: pytest.LogCaptureFixture
) -> None:
    pretender.say["/completion"] = lambda body: answer(len(body["prompt"]), 0)
    with connect(url) as server, caplog.at_level(logging.WARNING):
        for seed in (1, 2, 3, 1, 2, 3, 1):
            server.complete(prompt(seed, 100), n_predict=1)
            server.flush(10)
        stats = server.stats()
    assert stats.refusals["slot_changed_by_others"] or stats.refusals["restore_not_used_by_server"]
    assert stats.restored_tokens == 0


def test_a_server_that_restores_another_state_is_noticed(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    def restored(body: dict[str, Any], slot: str) -> Any:
        return {**pretender.restore(body, slot), "n_restored": 3}

    with connect(url) as server:
        for seed in (1, 2, 3):
            server.complete(prompt(seed, 100), n_predict=1)
            server.flush(10)
        pretender.say["restore"] = restored
        found = server.complete(prompt(1, 100), n_predict=1)
        assert (found.n_restored, found.completion.n_cached) == (0, 0)
        assert server.stats().refusals == {"restore_failed": 1}


@pytest.mark.parametrize("action", ["save", "restore", "erase"])
@pytest.mark.parametrize("said", [(500, {"error": {"message": "no"}}), b"<html>", (404, b"")])
def test_failures_other_than_the_completions_cost_only_reuse(
    connect: Connect, action: str, said: Any, url: str, pretender: Pretender
) -> None:
    with connect(url) as server:
        for seed in (1, 2, 3):
            server.complete(prompt(seed, 100), n_predict=1)
            server.flush(10)
        pretender.say[action] = said
        for seed in (4, 1, 2, 3, 4):
            found = server.complete(prompt(seed, 100), n_predict=1, scope=f"{seed}")
            found = server.complete(prompt(seed, 100), n_predict=1)
            assert found.completion.text == " it"
            server.flush(10)
        refusals = server.stats().refusals
        assert refusals[f"{action}_failed"] > 0
        assert all(slot.condition.name == "FREE" for slot in server._manager.table.slots.values())


def test_errors_are_raised_with_on_error_raise(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    with connect(url, slot_settings=SlotSettings(on_error="raise")) as server:
        for seed in (1, 2, 3):
            server.complete(prompt(seed, 100), n_predict=1)
            server.flush(10)
        pretender.say["restore"] = (500, {"error": {"message": "own words"}})
        with pytest.raises(ServerFailed, match="own words"):
            server.complete(prompt(1, 100), n_predict=1)
        server.flush(10)
        assert server.complete(prompt(1, 100), n_predict=1).completion.text == " it"


def test_a_server_without_a_boot_mark_is_checked_by_its_slots_lengths(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    pretender.say["/props"] = {**PROPS, "media_marker": None}
    held = [{**slot, "n_prompt_tokens": 100} for slot in SLOTS]
    pretender.say["/slots"] = held
    with connect(url) as server:
        server.complete(prompt(1, 100), n_predict=1)
        server.flush(10)
        assert server.complete(prompt(1, 100), n_predict=1).n_live == 99
        server.flush(10)
        pretender.say["/slots"] = SLOTS  # without the number of tokens
        assert server.complete(prompt(1, 100), n_predict=1).n_live == 99
        server.flush(10)
        pretender.say["/slots"] = [{**slot, "n_prompt_tokens": 0} for slot in SLOTS]
        found = server.complete(prompt(1, 100), n_predict=1)
        assert (found.n_live, found.n_restored) == (0, 99)
        assert server.stats().refusals == {"slot_changed_by_others": 1}


NAMES = ["", ".", "..", "../a", "a/b", "a\\b", "a\0b", "/etc/passwd", "a..b", ".a", "a" * 200, "ü"]


@pytest.mark.parametrize("name", [*NAMES, None, 7])
def test_filenames_from_outside_are_never_sent(
    connect: Connect, name: Any, url: str, pretender: Pretender
) -> None:
    with connect(url) as server:
        for ask in (server.save_slot, server.restore_slot):
            with pytest.raises(InvalidFilename, match="can't name a slot file"):
                ask(0, name)
    assert not pretender.asked


def test_file_names_reveal_nothing_and_clients_share_none(
    connect: Connect, url: str, pretender: Pretender
) -> None:
    for _ in range(3):
        with connect(url) as server:
            server.complete(prompt(1, 100), n_predict=1, scope="tenant", conversation="../../x")
            server.flush(10)
    names = {body["filename"] for body in pretender.bodies if body and "filename" in body}
    assert len(names) == 3
    assert all("tenant" not in name and "x" not in name for name in names)


def test_a_key_is_sent_and_a_wrong_one_is_an_error(connect: Connect, tmp_path: Path) -> None:
    with serve(tmp_path, api_keys=["right"], endpoint_metrics=True) as running:
        for key in (None, "wrong"):
            with (
                connect(running.url, api_key=key) as server,
                pytest.raises(KeyRejected, match="401") as raised,
            ):
                server.complete([1, 2, 3], n_predict=1)
            assert "right" not in str(raised.value)
        with connect(running.url, api_key="right") as server:
            assert server.complete([1, 2, 3], n_predict=1).completion.n_prompt == 3
            # Including the 64 of the check after each start of a server.
            assert server.metrics()["llamacpp:prompt_tokens_total"] == 64 + 3


def test_metrics_must_be_switched_on(tmp_path: Path) -> None:
    with (
        serve(tmp_path) as running,
        client(running) as server,
        pytest.raises(ServerUnsupported, match="--metrics"),
    ):
        server.metrics()


def test_a_certificate_is_verified(connect: Connect, tmp_path: Path, pretender: Pretender) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
        f" -addext subjectAltName=IP:127.0.0.1 -out {certificate} -keyout {key}"
    )
    try:
        subprocess.run(made.split(), check=True, capture_output=True)  # noqa: S603 (fixed words)
    except FileNotFoundError:
        pytest.skip("needs the openssl command")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    pretender.say["/health"] = {"status": "ok"}
    with pretend(pretender, context) as url:
        with connect(url, verify=str(certificate)) as server:
            assert server.health() == "ok"
        with (
            connect(url, retries=0) as server,
            pytest.raises(ServerUnreachable, match="certificate"),
        ):
            server.health()
        with connect(url, verify=False) as server:
            assert server.health() == "ok"


def test_a_server_killed_during_an_answer_is_an_error(tmp_path: Path) -> None:
    with serve(tmp_path) as running:
        server = client(running, slot_folder=tmp_path)
        pieces = server.stream(prompt(1, 100), n_predict=900)
        next(pieces)
        running.kill()
        with pytest.raises(ServerUnreachable):
            list(pieces)
        with pytest.raises(ServerRefused):
            server.complete(prompt(1, 100), n_predict=1)
        server.flush(30)
    with serve(tmp_path, port=port_of(running)):
        found = server.complete(prompt(1, 100), n_predict=N_PREDICT)
        assert found.completion.n_cached == 0
    server.close()


def test_waiting_too_long_for_a_slot_is_an_error(connect: Connect, tmp_path: Path) -> None:
    with serve(tmp_path, n_slots=1) as running:
        server = connect(running.url, timeout_s=0.5)
        hold = server.stream(prompt(1, 100), n_predict=900)
        next(hold)
        with pytest.raises(ServerTimeout, match="no slot"):
            server.complete(prompt(2, 100), n_predict=1)
        hold.close()
        server.flush(30)
        assert server.complete(prompt(2, 100), n_predict=1).completion.n_prompt == 100
        server.close()


def test_the_servers_own_limit_is_an_error_if_ours_is_unknown(tmp_path: Path) -> None:
    with serve(tmp_path) as running, client(running) as server:
        with pytest.raises(PromptTooLong):
            server.completion(prompt(1, 3000), n_predict=1)
        with pytest.raises(RequestRejected, match="invalid tokens"):
            server.completion([99_999], n_predict=1)
        assert server.complete([5, 6], n_predict=1).completion.n_prompt == 2


@pytest.mark.parametrize(
    "settings", [{"timeout_s": 0}, {"connect_timeout_s": -1}, {"retries": -1}, {"retries": 99}]
)
def test_settings_of_a_connection_are_checked(connect: Connect, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        connect("http://127.0.0.1:9", **settings)
