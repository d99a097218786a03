"""The choice of an engine: proven in the background, switched to in one step, remembered."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tokcache
from tests.text.tokenizers_made import MADE
from tests.text.tokenizers_synthetic import SYNTHETIC
from tokcache.config import CacheConfig
from tokcache.reasons import ENGINE_REASONS, RECORD_REFUSALS
from tokcache.text.engines import remembered
from tokcache.text.segments import choice as choices

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tokcache.text.segments.choice import Choice

pytest.importorskip("gigatoken", reason="the extra `engines` is not installed")

TEXT = "A line of a prompt that is known, it's the first.\n" * 60
OTHER = "Another line 123 of a new prompt, don't you think?\n" * 60
GIGATOKEN = CacheConfig(engine="gigatoken")


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `wrap` return before the proof, as it does outside the tests."""
    monkeypatch.delenv("TOKCACHE_WAIT_FOR_ENGINE")
    monkeypatch.setattr(choices, "DELAY_S", 0.0)


class Gate:
    """Holds every building of an encoder until `open` is set."""

    def __init__(self, build: Callable[[str, str], Any]) -> None:
        self._build = build
        self.entered = threading.Event()
        self.open = threading.Event()
        self.threads: list[threading.Thread] = []

    def build(self, name: str, tokenizer_json: str) -> Any:
        self.threads.append(threading.current_thread())
        self.entered.set()
        assert self.open.wait(60)
        return self._build(name, tokenizer_json)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Gate]:
    """Hold the proofs, which are made in the background, until the test opens the gate."""
    request.getfixturevalue("in_background")
    made = Gate(choices.build)
    monkeypatch.setattr(choices, "build", made.build)
    yield made
    made.open.set()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Remember proofs in this folder."""
    monkeypatch.setenv("TOKCACHE_REMEMBER_ENGINES", "1")
    monkeypatch.setenv("TOKCACHE_CACHE_DIR", str(tmp_path / "cache"))
    remembered.REMEMBERED.records.refusals.clear()
    return tmp_path / "cache" / remembered.FOLDER


def right(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text).ids)


def engine_of(wrapped: Any) -> tuple[str, str]:
    stats = wrapped.cache_stats()
    assert stats.engine_reason in ENGINE_REASONS
    return stats.engine, stats.engine_reason


class Spoilt:
    """A real encoder whose ids `spoil` changes."""

    name = "gigatoken"
    holds_lock = True
    is_fork_safe = True

    def __init__(self, encoder: Any, spoil: Callable[[list[int]], list[int]]) -> None:
        self._encoder = encoder
        self.spoil = spoil

    def encode(self, texts: Sequence[str]) -> list[Any]:
        found = self._encoder.encode(texts)
        return [memoryview(array("I", self.spoil(ids.tolist()))) for ids in found]

    def vocabulary(self) -> dict[int, bytes]:
        return {}


# ---- in the background


def test_tokenizers_encodes_until_the_engine_is_proven_and_the_switch_keeps_all(gate: Gate) -> None:
    plain = SYNTHETIC["gpt2"]()
    wrapped = tokcache.wrap(plain, CacheConfig())
    assert engine_of(wrapped) == ("tokenizers", "pending")
    assert wrapped.token_ids(TEXT).tolist() == right(plain, TEXT)
    assert gate.entered.wait(20)
    assert gate.threads == [thread for thread in gate.threads if thread.daemon]
    assert not wrapped.wait_for_engine(0.01)
    before = wrapped.cache_stats()
    gate.open.set()
    assert wrapped.wait_for_engine(20)
    assert engine_of(wrapped) == ("gigatoken", "proven")

    after = wrapped.cache_stats()
    assert (after.l0.n_entries, after.l1.n_chunks) == (before.l0.n_entries, before.l1.n_chunks)
    assert wrapped.token_ids(TEXT).tolist() == right(plain, TEXT)
    assert wrapped.token_ids(TEXT + "!").tolist() == right(plain, TEXT + "!")
    done = wrapped.cache_stats()
    assert done.l0.hits == after.l0.hits + 1
    assert done.l1.chunk_hits > after.l1.chunk_hits
    assert wrapped.token_ids(OTHER).tolist() == right(plain, OTHER)
    assert "engine_dropped" not in done.l1.refusals


def test_threads_get_correct_ids_while_the_engine_is_switched(gate: Gate) -> None:
    plain = SYNTHETIC["gpt2"]()
    wrapped = tokcache.wrap(plain, GIGATOKEN)
    texts = [f"{OTHER}{n} {TEXT}" for n in range(120)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(wrapped.token_ids, texts)
        gate.open.set()
        assert [ids.tolist() for ids in found] == [right(plain, text) for text in texts]
    assert wrapped.wait_for_engine(20)
    assert engine_of(wrapped) == ("gigatoken", "proven")


def test_a_change_during_the_proof_discards_it(gate: Gate) -> None:
    plain = SYNTHETIC["gpt2"]()
    wrapped: Any = tokcache.wrap(plain, GIGATOKEN)
    before = wrapped._tokcache.l1
    assert gate.entered.wait(20)
    wrapped.add_tokens(["known, it"])
    plain = SYNTHETIC["gpt2"]()
    plain.add_tokens(["known, it"])
    text = TEXT + OTHER
    assert wrapped.token_ids(text).tolist() == right(plain, text)
    gate.open.set()
    assert wrapped.wait_for_engine(20)
    assert engine_of(wrapped) == ("gigatoken", "proven")
    assert (before.engine, before.engine_reason) == ("tokenizers", "pending")
    assert before is not wrapped._tokcache.l1
    assert wrapped.token_ids("so " + text).tolist() == right(plain, "so " + text)


def test_a_change_by_an_old_reference_during_the_proof_is_noticed_and_not_remembered(
    gate: Gate, folder: Path
) -> None:
    plain = SYNTHETIC["gpt2"]()
    model: Any = plain.model
    wrapped: Any = tokcache.wrap(plain, GIGATOKEN)
    assert gate.entered.wait(20)
    model.fuse_unk = not model.fuse_unk
    gate.open.set()
    assert wrapped.wait_for_engine(20)
    assert engine_of(wrapped) == ("tokenizers", "refused")
    assert "changed during the proof" in wrapped._tokcache.l1.notes[-1]
    assert not folder.exists()


def test_a_cleared_cache_and_a_deleted_wrapper_need_no_proof(gate: Gate) -> None:
    plain = SYNTHETIC["gpt2"]()
    wrapped: Any = tokcache.wrap(plain, GIGATOKEN)
    first: Choice = wrapped._tokcache.l1._choice
    assert gate.entered.wait(20)
    wrapped.cache_clear()
    assert first.is_discarded
    second: Choice = wrapped._tokcache.l1._choice
    l1 = weakref.ref(wrapped._tokcache.l1)
    del wrapped
    gc.collect()
    assert l1() is None
    gate.open.set()
    assert second.wait(20)
    assert second.is_discarded
    assert len(gate.threads) == 1


@pytest.mark.usefixtures("in_background")
def test_the_name_of_a_refused_engine_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tokcache"):
        wrapped = tokcache.wrap(MADE["word_level"](), GIGATOKEN)
        assert wrapped.wait_for_engine(20)
    assert engine_of(wrapped) == ("tokenizers", "refused")
    assert "gigatoken can't encode with this tokenizer" in caplog.text


@pytest.mark.usefixtures("in_background")
def test_an_error_in_the_proof_leaves_tokenizers_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_tokenizer: Tokenizer) -> list[str]:
        raise ZeroDivisionError

    monkeypatch.setattr(choices, "probe_texts", fail)
    plain = SYNTHETIC["gpt2"]()
    with caplog.at_level(logging.ERROR, logger="tokcache"):
        wrapped: Any = tokcache.wrap(plain, GIGATOKEN)
        assert wrapped.wait_for_engine(20)
    assert engine_of(wrapped) == ("tokenizers", "failed")
    assert "the proof of an engine failed" in caplog.text
    assert wrapped.token_ids(TEXT).tolist() == right(plain, TEXT)
    monkeypatch.undo()
    assert engine_of(tokcache.wrap(plain, GIGATOKEN)) == ("gigatoken", "proven")


def test_a_wrapper_can_be_pickled_during_the_proof(gate: Gate) -> None:
    plain = SYNTHETIC["gpt2"]()
    wrapped = tokcache.wrap(plain, GIGATOKEN)
    assert gate.entered.wait(20)
    copy = tokcache.wrap(pickle.loads(pickle.dumps(wrapped)), GIGATOKEN)  # noqa: S301 (ours)
    gate.open.set()
    for one in (wrapped, copy):
        assert one.wait_for_engine(20)
        assert engine_of(one) == ("gigatoken", "proven")
        assert one.token_ids(TEXT).tolist() == right(plain, TEXT)


@pytest.mark.usefixtures("in_background")
def test_settings_without_a_choice_need_no_waiting() -> None:
    plain = SYNTHETIC["gpt2"]()
    for config, reason in (
        (CacheConfig(engine="tokenizers"), "configured"),
        (CacheConfig(l1=False), "no_l1"),
    ):
        wrapped = tokcache.wrap(plain, config)
        assert wrapped.wait_for_engine(0)
        assert engine_of(wrapped) == ("tokenizers", reason)


# ---- fork and exit


def in_child(check: Callable[[], bool]) -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(40)
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_that_was_forked_during_the_proof_makes_its_own(gate: Gate) -> None:
    plain = SYNTHETIC["gpt2"]()
    wrapped = tokcache.wrap(plain, GIGATOKEN)
    assert gate.entered.wait(20)

    def check() -> bool:
        pending = engine_of(wrapped) == ("tokenizers", "pending")
        gate.open.set()
        is_right = wrapped.token_ids(TEXT).tolist() == right(plain, TEXT)
        is_chosen = wrapped.wait_for_engine(20) and engine_of(wrapped) == ("gigatoken", "proven")
        return pending and is_right and is_chosen

    in_child(check)
    assert engine_of(wrapped) == ("tokenizers", "pending")
    gate.open.set()
    assert wrapped.wait_for_engine(20)
    assert engine_of(wrapped) == ("gigatoken", "proven")


def test_fastokens_is_not_built_in_a_child_that_was_forked_during_its_proof(gate: Gate) -> None:
    pytest.importorskip("fastokens", reason="the extra `engines` is not installed")
    plain = SYNTHETIC["gpt2"]()
    wrapped = tokcache.wrap(plain, CacheConfig(engine="fastokens"))
    assert gate.entered.wait(20)

    def check() -> bool:
        is_right = wrapped.token_ids(TEXT).tolist() == right(plain, TEXT)
        return is_right and wrapped.wait_for_engine(0) and engine_of(wrapped)[1] == "forked"

    in_child(check)


@pytest.mark.parametrize("engine", ["gigatoken", "fastokens"])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_process_may_end_during_the_proof(engine: str, seconds: float, shared_data: Path) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    code = (
        "import sys, time, tokcache\n"
        "from tokenizers import Tokenizer\n"
        "from tokcache.text.segments import choice\n"
        "choice.DELAY_S = 0.0\n"
        "plain = Tokenizer.from_file(sys.argv[1])\n"
        "wrapped = tokcache.wrap(plain, tokcache.CacheConfig(engine=sys.argv[2]))\n"
        "time.sleep(float(sys.argv[3]))\n"
    )
    file = shared_data / "tokenizers" / "gpt2" / "tokenizer.json"
    environment = {**os.environ, "TOKCACHE_WAIT_FOR_ENGINE": "0"}
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code, str(file), engine, str(seconds)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- remembered


def proven_now(plain: Tokenizer) -> Any:
    wrapped = tokcache.wrap(plain, GIGATOKEN)
    assert engine_of(wrapped) == ("gigatoken", "proven")
    assert wrapped.token_ids(TEXT).tolist() == right(plain, TEXT)
    return wrapped


def records(folder: Path) -> list[Path]:
    return [each for each in folder.iterdir() if each.name != "key"]


def test_a_proof_is_remembered_for_later_processes(folder: Path) -> None:
    plain = SYNTHETIC["gpt2"]()
    proven_now(plain)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()] == [0o600, 0o600]
    code = (
        "import tokcache\n"
        "from tests.text.tokenizers_synthetic import SYNTHETIC\n"
        "wrapped = tokcache.wrap(SYNTHETIC['gpt2'](), tokcache.CacheConfig(engine='gigatoken'))\n"
        "assert wrapped.wait_for_engine(30)\n"
        "print(wrapped.cache_stats().engine, wrapped.cache_stats().engine_reason)\n"
    )
    for waits in ("0", "1"):
        environment = {**os.environ, "TOKCACHE_WAIT_FOR_ENGINE": waits}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, check=True)  # noqa: S603
        assert done.stdout.split() == [b"gigatoken", b"remembered"]
    assert not remembered.REMEMBERED.records.refusals


@pytest.mark.usefixtures("folder")
def test_a_remembered_refusal_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MADE["word_level"]()
    first: Any = tokcache.wrap(plain, GIGATOKEN)
    assert engine_of(first) == ("tokenizers", "refused")
    built: list[str] = []
    monkeypatch.setattr(choices, "build", lambda name, _: built.append(name))
    second: Any = tokcache.wrap(plain, GIGATOKEN)
    assert engine_of(second) == ("tokenizers", "refused")
    assert second._tokcache.l1.notes == first._tokcache.l1.notes
    assert built == []


def test_nothing_is_remembered_if_it_is_turned_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKCACHE_REMEMBER_ENGINES", "0")
    for _ in range(2):
        proven_now(SYNTHETIC["gpt2"]())
    assert not folder.exists()


def test_another_tokenizer_version_or_proof_has_other_outcomes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = SYNTHETIC["gpt2"]()
    proven_now(plain)
    plain.add_tokens(["known, it"])
    proven_now(plain)
    for name in ("_build_of", "_proof"):
        build = getattr(remembered, name)
        with monkeypatch.context() as patched:
            patched.setattr(remembered, name, lambda *_, build=build: f"another {build(*_)}")
            proven_now(plain)
    with monkeypatch.context() as patched:
        patched.setattr(remembered, "__version__", "another")
        proven_now(plain)
    assert len(records(folder)) == 5
    assert engine_of(tokcache.wrap(plain, GIGATOKEN)) == ("gigatoken", "remembered")
    with monkeypatch.context() as patched:  # an encoder that was installed in place
        patched.setattr(remembered, "_build_of", lambda _: None)
        proven_now(plain)
    assert len(records(folder)) == 5


def use_record_of_another(folder: Path) -> None:
    (record,) = records(folder)
    plain = SYNTHETIC["gpt2"]()
    plain.add_tokens(["another one"])
    tokcache.wrap(plain, GIGATOKEN)
    (other,) = set(records(folder)) - {record}
    record.write_bytes(other.read_bytes())


def link_record(folder: Path) -> None:
    (record,) = records(folder)
    record.rename(folder.parent / "moved")
    record.symlink_to(folder.parent / "moved")


def link_folder(folder: Path) -> None:
    folder.rename(folder.parent / "moved")
    folder.symlink_to(folder.parent / "moved")


def change_record(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (record,) = records(folder)
        record.write_bytes(change(record.read_bytes()))

    return damage


DAMAGES: dict[str, tuple[str | None, Callable[[Path], object]]] = {
    "empty": ("damaged", change_record(lambda _: b"")),
    "truncated": ("damaged", change_record(lambda data: data[:-5])),
    "changed": ("damaged", change_record(lambda data: data.replace(b"null", b"1234"))),
    "huge": ("damaged", change_record(lambda data: data + bytes(1 << 20))),
    "of another tokenizer": ("damaged", use_record_of_another),
    "readable by others": ("unreadable", lambda folder: records(folder)[0].chmod(0o644)),
    "of another user": ("unreadable", lambda folder: os.chown(records(folder)[0], 12345, 12345)),
    "a link": ("unreadable", link_record),
    "another key": (None, lambda folder: (folder / "key").write_bytes(bytes(32))),
    "a damaged key": ("damaged_key", lambda folder: (folder / "key").write_bytes(b"x")),
    "a folder others write to": ("no_folder", lambda folder: folder.chmod(0o777)),
    "a folder of another user": ("no_folder", lambda folder: os.chown(folder, 12345, 12345)),
    "a linked folder": ("no_folder", link_folder),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_unsafe_record_is_not_used(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    reason, change = DAMAGES[damage]
    if "another user" in damage and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    plain = SYNTHETIC["gpt2"]()
    proven_now(plain)
    change(folder)
    with caplog.at_level(logging.WARNING, logger="tokcache"):
        proven_now(plain)
    counted = remembered.REMEMBERED.records.refusals
    assert counted.keys() <= RECORD_REFUSALS.keys()
    if reason is None:  # no record has the name that this key gives
        assert not counted
    else:
        assert reason in counted
        assert "tokcache's cache folder" in caplog.text


@pytest.mark.usefixtures("folder")
def test_a_remembered_equality_that_is_wrong_is_found_by_a_sample_of_the_probes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = SYNTHETIC["gpt2"]()
    proven_now(plain)
    build = choices.build
    monkeypatch.setattr(
        choices, "build", lambda *of: Spoilt(build(*of), lambda ids: [i ^ (i > 9) for i in ids])
    )
    for _ in range(2):  # then the refusal is remembered
        wrapped = tokcache.wrap(plain, GIGATOKEN)
        assert engine_of(wrapped) == ("tokenizers", "refused")
        assert wrapped.token_ids(TEXT).tolist() == right(plain, TEXT)
        monkeypatch.setattr(choices, "build", build)


# ---- engines that fail or differ later


def with_spoilt(
    plain: Tokenizer, monkeypatch: pytest.MonkeyPatch, verify_rate: float = 0.0
) -> tuple[Any, list[Spoilt]]:
    """Wrap with an encoder that proves equal and may be spoilt afterwards."""
    made: list[Spoilt] = []
    build = choices.build

    def build_spoilt(name: str, tokenizer_json: str) -> Any:
        made.append(Spoilt(build(name, tokenizer_json), list))
        return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr(choices, "build", build_spoilt)
        config = CacheConfig(engine="gigatoken", verify_rate=verify_rate)
        wrapped = tokcache.wrap(plain, config)
    assert wrapped.cache_stats().engine == "gigatoken"
    return wrapped, made


@pytest.mark.usefixtures("folder")
def test_no_cache_keeps_ids_of_an_engine_that_was_found_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = SYNTHETIC["gpt2"]()
    wrapped, made = with_spoilt(plain, monkeypatch, verify_rate=0.5)
    l1 = wrapped._tokcache.l1
    draws = [1.0, 1.0, 0.0]
    monkeypatch.setattr(l1._rng, "random", lambda: draws.pop(0) if draws else 1.0)
    short = "a short text"
    for one in made:
        one.spoil = lambda ids: ids[::-1]
    assert wrapped.token_ids(short).tolist() != right(plain, short)
    assert wrapped.token_ids("an other").tolist() != right(plain, "an other")
    assert wrapped.token_ids("the verified one").tolist() == right(plain, "the verified one")
    assert engine_of(wrapped) == ("tokenizers", "dropped")
    for text in (short, "an other", short + "!", TEXT):
        assert wrapped.token_ids(text).tolist() == right(plain, text)
    refusals = wrapped.cache_stats().l1.refusals
    assert (refusals["engine_dropped"], refusals["differences"]) == (1, 1)

    again = tokcache.wrap(plain, GIGATOKEN)  # in a later process, too
    assert engine_of(again) == ("tokenizers", "refused")


@pytest.mark.usefixtures("folder")
def test_an_engine_that_fails_is_dropped_and_proven_again_in_a_later_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: list[int]) -> list[int]:
        raise OverflowError("too many words")

    plain = SYNTHETIC["gpt2"]()
    wrapped, made = with_spoilt(plain, monkeypatch)
    assert wrapped.token_ids(TEXT).tolist() == right(plain, TEXT)
    held = wrapped.cache_stats()
    for one in made:
        one.spoil = fail
    assert wrapped.token_ids(OTHER).tolist() == right(plain, OTHER)
    assert engine_of(wrapped) == ("tokenizers", "dropped")
    assert "engine gigatoken is dropped" in caplog.text
    after = wrapped.cache_stats()
    assert after.l1.refusals["engine_dropped"] == 1
    assert after.l1.n_chunks > held.l1.n_chunks > 0  # its ids were right, so they are kept
    assert wrapped.token_ids(TEXT).tolist() == right(plain, TEXT)
    assert engine_of(tokcache.wrap(plain, GIGATOKEN)) == ("gigatoken", "proven")
