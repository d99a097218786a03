"""Why a llama-server decodes tokens: each reason with a real server; tenants see no others."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.pretended import Pretender, pretend
from tests.integration.served import (
    N_PREDICT,
    Wrapped,
    both_clients,
    client,
    complete,
    port_of,
    prompt,
    serve,
    serve_with_adapter,
)
from tokcache import samples
from tokcache.errors import ServerUnreachable
from tokcache.llama.server import LlamaServer, SlotSettings
from tokcache.llama.server.job import Job
from tokcache.llama.server.namespaces import namespace_of
from tokcache.llama.server.records import Records
from tokcache.llama.server.removals import N_ROWS, N_TABLES, SlotRemovals
from tokcache.llama.server.slot import Condition
from tokcache.llama.server.table import Start, Wish
from tokcache.llama.server.trust import KINDS
from tokcache.state.reasons import Miss, MissReason
from tokcache.text.token_ids import TokenIds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.served import Connect
    from tokcache.samples.server_process import ServerProcess

A, B = prompt(1, 200), prompt(2, 150)


@pytest.fixture
def server(server: LlamaServer) -> LlamaServer:
    server.clear()
    return server


def miss(server: LlamaServer, tokens: list[int], **settings: Any) -> Miss:
    found = complete(server, tokens, **settings)
    assert found.miss is not None
    assert found.miss.n_missed == len(tokens) - 1 - found.completion.n_cached
    assert found.miss.held_tokens == ()
    return found.miss


def test_prompts_that_are_held_whole_have_no_miss(server: LlamaServer) -> None:
    first = miss(server, A)
    assert (first.reason, first.at_token, first.n_missed) == (MissReason.NEVER_STORED, 0, 199)
    assert first.seconds is not None
    assert first.seconds > 0
    assert complete(server, A).miss is None
    complete(server, B)
    complete(server, prompt(3, 100))  # now A is in a file alone
    found = complete(server, A)
    assert found.n_restored == 199
    assert found.miss is None
    stats = server.stats()
    assert stats.misses == {"never_stored": 3}
    assert stats.missed_tokens == {"never_stored": 199 + 149 + 99}


@both_clients
def test_a_different_text_is_located_and_shown_on_request(
    process: ServerProcess, folder: Path, connect: Connect
) -> None:
    first = "The time is 10:15:00 now. " + "Please answer in one sentence. " * 8
    other = first.replace("10:15:00", "10:16:30")
    settings = SlotSettings(slot_folder=folder)
    with connect(process.url, timeout_s=60, slot_settings=settings) as server:
        server.complete(first, n_predict=N_PREDICT, scope="a")
        ids = [server.token_ids(each).tolist() for each in (first, other)]
        n_same = next(n for n, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
        *_, last = server.stream(other, n_predict=N_PREDICT, scope="a")
        assert last.reused is not None
        found = last.reused.miss
        assert found is not None
        assert (found.reason, found.at_token) == (MissReason.DIFFERENT_TEXT, n_same)
        shown = server.complete(
            first.replace("10:15:00", "11:47:10"), n_predict=1, scope="a", explain=True
        ).explanation
        assert shown is not None
        assert shown.difference is not None
        assert shown.difference.kind == "date_or_clock"
        assert "The time is 1" in shown.shared
        assert "The time" not in repr(shown)
        unknown = server.complete(other, n_predict=1, scope="b", explain=True).explanation
        assert unknown is not None
        assert (unknown.miss.reason, unknown.held) == (MissReason.NEVER_STORED, "")


def test_a_prompt_that_grows_was_never_stored_further(server: LlamaServer) -> None:
    answer = complete(server, A).completion.token_ids.tolist()
    found = miss(server, [*A, *answer[:-1], *B])
    assert (found.reason, found.at_token) == (MissReason.NEVER_STORED, 200 + N_PREDICT - 1)


def test_an_evicted_file_names_the_budget_and_the_time(
    process: ServerProcess, folder: Path
) -> None:
    with client(process, slot_folder=folder) as server:
        complete(server, A)
        n_bytes = server.stats().n_bytes
    with client(process, slot_folder=folder, max_bytes=n_bytes + 1000) as server:
        for tokens in (A, B, prompt(3, 200), prompt(4, 200)):
            complete(server, tokens)
        found = miss(server, A)
        assert (found.reason, found.detail) == (MissReason.EVICTED, "file: max_bytes")
        assert found.n_removed == 128  # the largest power of two up to 200
        assert found.removed_at is not None
        assert server.stats().misses["evicted"] == 1
        assert miss(server, [*A[:12], *prompt(5, 200)]).reason is not MissReason.EVICTED


@pytest.mark.parametrize(
    ("settings", "detail"),
    [({"min_save_tokens": 500}, "below_minimum"), ({"max_bytes": 1000}, "file_over_budget")],
    ids=["too short", "over the budget"],
)
def test_contents_that_were_not_saved_say_why(
    process: ServerProcess, folder: Path, settings: Any, detail: str
) -> None:
    with client(process, slot_folder=folder, **settings) as server:
        for tokens in (A, B, prompt(3, 200)):
            complete(server, tokens)
        found = miss(server, A)
        assert (found.reason, found.detail) == (MissReason.REFUSED, detail)


def test_a_file_that_is_gone_or_damaged_says_so(server: LlamaServer, folder: Path) -> None:
    for tokens in (A, B, prompt(3, 200)):
        complete(server, tokens)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    found = miss(server, A)
    assert (found.reason, found.detail) == (MissReason.REFUSED, "restore_failed")


def test_a_slot_that_others_changed_says_so(server: LlamaServer) -> None:
    complete(server, A)
    for slot in (0, 1):
        server.completion(prompt(9, 50), n_predict=1, id_slot=slot)
    found = miss(server, A)
    assert (found.reason, found.detail) == (MissReason.REFUSED, "slot_not_used_by_server")


def test_a_busy_slot_says_so(server: LlamaServer) -> None:
    pieces = server.stream(A, n_predict=200, ignore_eos=True)
    next(pieces)
    assert miss(server, A).reason is MissReason.NEVER_STORED  # its record has not begun
    pieces.close()
    server.flush(30)
    complete(server, A)
    pieces = server.stream([*A, 7, 8, 9], n_predict=200, ignore_eos=True)
    next(pieces)
    server._manager.records.shelf.clear()  # only the busy slot holds it
    found = miss(server, [*A, 5, 6, *B])
    assert (found.reason, found.detail) == (MissReason.REFUSED, "slot_busy")
    pieces.close()
    server.flush(30)


def test_an_answer_that_is_encoded_again_is_no_different_text(
    process: ServerProcess, folder: Path
) -> None:
    with LlamaServer(
        process.url,
        timeout_s=60,
        tokenizer=Wrapped(samples.tiny_tokenizer()),
        slot_settings=SlotSettings(slot_folder=folder),
    ) as server:
        for seed in range(20, 60):  # until the answer begins with an id of several characters
            first = prompt(seed, 100)
            answer = complete(server, first).completion.token_ids.tolist()
            text = server.detokenize(answer[:-1])
            again = [
                each
                for char in text
                for each in server.tokenize(char, add_special_tokens=False).tolist()
            ]
            is_other = again[:1] != answer[:1] and server.detokenize(again) == text
            if is_other and "\ufffd" not in text:
                break
        found = complete(server, [*first, *again]).miss
        assert found is not None
        assert (found.reason, found.at_token) == (MissReason.RE_ENCODING, 100)
        assert server.stats().misses["re_encoding"] == 1


def test_other_adapters_are_another_fingerprint(tmp_path: Path) -> None:
    with (
        serve_with_adapter(tmp_path) as url,
        LlamaServer(url, timeout_s=60, slot_settings=SlotSettings(slot_folder=tmp_path)) as server,
    ):
        adapters = [{"id": 0, "scale": 0.5}]
        assert miss(server, A, scope="a").reason is MissReason.NEVER_STORED
        assert miss(server, A, scope="b", lora=adapters).reason is MissReason.NEVER_STORED
        found = miss(server, A, scope="a", lora=adapters)
        assert (found.reason, found.detail) == (MissReason.OTHER_FINGERPRINT, "lora")


@pytest.mark.parametrize("is_other", [False, True], ids=["the same model", "another model"])
def test_a_restart_says_so(tmp_path: Path, is_other: bool) -> None:
    with serve(tmp_path) as process:
        port = port_of(process)
        server = client(process, slot_folder=tmp_path, min_save_tokens=150)
        complete(server, A)
        complete(server, B[:100])
    model = samples.tiny_model(seed=5) if is_other else None
    with serve(tmp_path, port=port, model=model), server:
        found = complete(server, B[:100]).miss
        assert found is not None
        if is_other:
            assert (found.reason, found.detail) == (MissReason.OTHER_FINGERPRINT, "model")
            assert miss(server, A).reason is MissReason.OTHER_FINGERPRINT
        else:
            assert (found.reason, found.detail) == (MissReason.REFUSED, "server_restarted")
            assert complete(server, A).miss is None  # from its file


def test_another_tenant_changes_nothing_that_a_tenant_sees(
    process: ServerProcess, folder: Path
) -> None:
    """Scope "a" makes the same calls with and without scope "b", which has the same prompts."""
    rng = random.Random(3)
    calls = [A, [*A[:90], *B], B, [*A, 7, 8], A, prompt(8, 180), A[:120]]
    seen = []
    for has_other in (False, True):
        with client(process, slot_folder=folder) as server:
            found: list[Any] = []
            for tokens in calls:
                if has_other:
                    for other in (A, [*A[:70], *B], tokens, [*tokens, *rng.sample(tokens, 3)]):
                        complete(server, other, scope="b")
                reused = complete(server, tokens, scope="a", explain=True)
                told = reused.miss and reused.miss._replace(seconds=None)
                shown = reused.explanation
                # Where the tokens were held, in a slot or a file, depends on who came last.
                found.append((reused.n_live + reused.n_restored, told))
                found.append(shown and (shown.shared, shown.held[:20], shown.new))
            server.clear()
        seen.append(found)
    assert seen[0] == seen[1]


def test_removals_are_bounded_and_of_one_namespace() -> None:
    removals = SlotRemovals()
    ids = TokenIds(range(100))
    removals.note(b"a" * 20, ids, "max_bytes")
    for n in range(N_ROWS):
        removals.note(b"b" * 20, TokenIds(range(1000 * n, 1000 * n + 16)), "max_bytes")
    assert removals.find(b"b" * 20, ids[:16]) is not None
    assert removals.find(b"c" * 20, ids) is None
    found = removals.find(b"a" * 20, ids)
    assert found is not None
    assert (found.cause, found.n_tokens) == ("max_bytes", 64)
    assert removals.find(b"a" * 20, ids[:50]) == found._replace(n_tokens=32)
    assert removals.find(b"a" * 20, TokenIds([*range(40), 7, *range(60)])) == found._replace(
        n_tokens=32
    )
    assert not removals.has_forgotten(b"b" * 20)
    removals.note(b"b" * 20, TokenIds(range(-20, 0)), "max_bytes")
    assert removals.has_forgotten(b"b" * 20)
    assert not removals.has_forgotten(b"a" * 20)
    removals.clear(lambda namespace: namespace[:1] == b"b")
    assert removals.find(b"b" * 20, ids[:16]) is None
    for n in range(N_TABLES):
        removals.note(n.to_bytes(20, "little"), ids, "max_bytes")
    assert removals.find(b"a" * 20, ids) is None
    assert removals.has_forgotten(b"a" * 20)


def parted(
    held: list[int],
    *,
    condition: Condition = Condition.FREE,
    n_prompt: int = 0,
    n_live: int = 0,
    lora: Any = None,
) -> Miss:
    """Return why a prompt A was decoded whole: it got a slot with `n_live` of its tokens.

    Another slot has the `held` tokens, of which the first `n_prompt` are a prompt's, in the same
    scope, and with the adapters `lora`.
    """
    records = Records("http://127.0.0.1:9", SlotSettings())
    records.misses.decode = lambda _: "the same text"
    records.table.resize([0, 1])
    own, other = records.table.slots.values()
    wish = Wish(namespace_of(None), TokenIds(A), None, KINDS)
    other.decoded(namespace_of(None, lora), TokenIds(held), None)
    other.n_prompt = n_prompt or len(held)
    # So that the scope is known to have prompts with these adapters.
    records.misses.parting(
        Wish(namespace_of(None, lora), TokenIds(B), None, KINDS), Start(own, 0, None)
    )
    other.condition = condition
    start = Start(own, n_live, None)
    job = Job(wish.prompt, {}, wish, start=start, parting=records.misses.parting(wish, start))
    found = records.misses.find(job, 0)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        (A[:100], (MissReason.REFUSED, "slot_busy")),
        (A[:99], (MissReason.NEVER_STORED, "")),
        ([*A[:99], *B], (MissReason.DIFFERENT_TEXT, "")),
    ],
    ids=["half", "less, and no more", "less, and another text"],
)
def test_a_busy_slot_is_blamed_only_for_the_most_of_a_miss(held: list[int], expected: Any) -> None:
    found = parted(held, condition=Condition.BUSY)
    assert (found.reason, found.detail) == expected


@pytest.mark.parametrize(
    ("n_prompt", "reason"),
    [(100, MissReason.RE_ENCODING), (101, MissReason.DIFFERENT_TEXT)],
    ids=["its answer", "its prompt"],
)
def test_only_the_ids_of_an_answer_can_be_those_of_a_text_encoded_again(
    n_prompt: int, reason: MissReason
) -> None:
    held = [*A[:100], *B]
    assert parted(held, condition=Condition.FREE, n_prompt=n_prompt).reason is reason


@pytest.mark.parametrize(
    ("n_same", "expected"),
    [
        (15, (MissReason.NEVER_STORED, "")),
        (16, (MissReason.OTHER_FINGERPRINT, "lora")),
    ],
)
def test_a_few_common_tokens_do_not_blame_other_adapters(n_same: int, expected: Any) -> None:
    found = parted([*A[:n_same], *B], lora=[{"id": 0, "scale": 0.5}])
    assert (found.reason, found.detail) == expected


@pytest.mark.parametrize(
    ("n_live", "expected"),
    [
        (99, (MissReason.DIFFERENT_TEXT, "slot_not_used_by_server")),
        (100, (MissReason.REFUSED, "slot_not_used_by_server")),
    ],
)
def test_a_slot_that_the_server_decoded_again_is_blamed_only_for_the_most_of_a_miss(
    n_live: int, expected: Any
) -> None:
    found = parted([*A[:100], *B], n_live=n_live)
    assert (found.reason, found.detail) == expected


@pytest.fixture
def pretender() -> Iterator[Pretender]:
    made = Pretender()
    with pretend(made) as made.url:
        yield made


def pretended(made: Pretender, **settings: Any) -> LlamaServer:
    return LlamaServer(made.url, timeout_s=60, slot_settings=SlotSettings(**settings))


FULL = (500, {"error": {"code": 500, "message": "no room on the disk", "type": "server_error"}})


@pytest.mark.parametrize(
    ("said", "detail"),
    [
        (FULL, "save_failed"),
        ({"n_saved": 150, "n_written": 15_000}, "slot_changed_by_others"),
        (None, "save_failed"),  # the connection ends
    ],
    ids=["an error", "other tokens", "no answer"],
)
def test_a_failed_save_is_the_reason_and_no_eviction(
    pretender: Pretender, said: Any, detail: str
) -> None:
    pretender.say["save"] = said
    with pretended(pretender) as server:
        for tokens in (A, B, prompt(3, 200)):
            complete(server, tokens)
        found = miss(server, A)
        assert (found.reason, found.detail) == (MissReason.REFUSED, detail)


def test_contents_for_which_pinned_files_leave_no_room_say_so(pretender: Pretender) -> None:
    with pretended(pretender, max_bytes=25_000) as server:
        complete(server, prompt(4, 200), conversation="kept")
        server.pin("kept")
        for tokens in (A, B, prompt(3, 200)):
            complete(server, tokens)
        found = miss(server, A)
        assert (found.reason, found.detail) == (MissReason.REFUSED, "file_over_budget")


def test_a_request_that_is_cut_off_in_a_slot_says_so(pretender: Pretender) -> None:
    with pretended(pretender, save_when="overwritten") as server:
        complete(server, A)
        pretender.say["/completion"] = None
        with pytest.raises(ServerUnreachable):
            server.complete([*A, 7], n_predict=1)
        server.flush(30)
        pretender.say["/completion"] = pretender.complete
        found = miss(server, A)
        assert (found.reason, found.detail) == (MissReason.REFUSED, "cut_off")
        server.clear()
        assert miss(server, A).reason is MissReason.NEVER_STORED


def test_a_shifted_context_says_so(pretender: Pretender) -> None:
    def shifted(body: Any) -> Any:
        return {**pretender.complete(body), "truncated": True, "tokens_cached": 100}

    with pretended(pretender) as server:
        pretender.say["/completion"] = shifted
        complete(server, A)
        pretender.say["/completion"] = pretender.complete
        found = miss(server, A)
        assert (found.reason, found.detail) == (MissReason.REFUSED, "context_shifted")


@both_clients
def test_an_explanation_that_fails_costs_no_answer(pretender: Pretender, connect: Connect) -> None:
    with connect(pretender.url, timeout_s=60) as server:
        pretender.say["/detokenize"] = FULL
        found = server.complete(A, n_predict=1, explain=True)
        assert found.completion.text == " it"
        assert found.miss is not None
        assert found.explanation is None
        assert server.stats().refusals["explanation_failed"] == 1


@pytest.mark.parametrize("scope", ["a", None, "b"], ids=["own", "all", "another"])
@pytest.mark.parametrize("is_understood", [True, False], ids=["a slot", "no slot"])
def test_nothing_is_explained_of_a_scope_that_was_cleared_meanwhile(
    pretender: Pretender, scope: str | None, is_understood: bool
) -> None:
    with pretended(pretender) as server:

        def cleared(_: Any) -> Any:
            pretender.say["/detokenize"] = {"content": "text"}
            server.clear(scope=scope)
            return {"content": "text"}

        if not is_understood:
            pretender.say["/props"] = {}
        complete(server, A, scope="a")
        pretender.say["/detokenize"] = cleared
        found = server.complete([*A[:90], *B], n_predict=1, scope="a", explain=True)
        assert found.miss is not None
        assert (found.explanation is not None) == (scope == "b")
