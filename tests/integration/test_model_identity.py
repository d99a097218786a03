"""Which model file a state belongs to: files overwritten in place, hashed late, remembered."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.models import BLOCK, GREEDY, llama, llama_cpp, plain, store, text
from tokcache import DiskTier, PrefixStateCache, samples
from tokcache.errors import FileChanged
from tokcache.llama import file_digests, remembered_digests, state_fingerprint
from tokcache.llama.file_digests import DIGESTS, FileDigests, file_identity
from tokcache.llama.remembered_digests import FileDigest, FileIdentity, RememberedDigests
from tokcache.llama.server.model import model_identity
from tokcache.llama.server.results import ModelMeta

PROMPT = random.Random(3).choices(range(3, 1000), k=5 * BLOCK + 7)
SHARED = samples.cache_folder()  # of all tests: models are made there once
LARGE_BYTES = file_digests.SMALL_BYTES + (4 << 20)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of remembered digests, in a cache folder of this test alone."""
    path = tmp_path / "cache"
    monkeypatch.setenv("TOKCACHE_CACHE_DIR", str(path))
    return path / remembered_digests.FOLDER


@pytest.fixture(scope="module")
def models() -> list[Path]:
    """Return two models of one size and shape, with other weights."""
    found = [samples.tiny_model(seed=seed, folder=SHARED) for seed in (1, 2)]
    assert found[0].stat().st_size == found[1].stat().st_size
    return found


def large(source: Path, path: Path, n_bytes: int = LARGE_BYTES) -> Path:
    """Copy a model and pad it: llama.cpp reads only the tensors that the header names."""
    shutil.copy(source, path)
    os.truncate(path, n_bytes)
    return path


def settle(path: Path) -> Path:
    """Wait until a change of the file could not leave its ctime as it is."""
    while time.time_ns() - path.stat().st_ctime_ns <= file_digests._RACY_NS:
        time.sleep(0.05)
    return path


def overwrite(path: Path, source: Path, n_bytes: int | None = None) -> None:
    """Overwrite a file with another's bytes; size, inode and mtime stay, as with `cp -p`."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(source.read_bytes())
        file.truncate(n_bytes or before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    same = ("st_size", "st_ino", "st_dev", "st_mtime_ns")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]


def answer(llm: Any, prompt: list[int] | None = None) -> str:
    return text(llm.create_completion(prompt or PROMPT, **GREEDY))


def uncached(model: Path) -> str:
    return answer(plain(model=model))


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == file_digests._THREAD]


def wait_for_no_thread() -> None:
    until = time.monotonic() + 20
    while threads():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_folder_of_states_has_the_names_of_its_model_files(
    models: list[Path], tmp_path: Path
) -> None:
    states = PrefixStateCache(ram_bytes="64M", max_entries=100, disk=tmp_path / "states")
    for model in models:
        llm = llama(states, model=model)
        llm.create_completion(PROMPT, scope="tenant-a", **GREEDY)
        llm.close()
    states.close()
    tier = DiskTier(tmp_path / "states")
    found = {tier.model_name(file.scope, file.root) for file in tier.files()}
    assert found == {model.name for model in models}


# Overwritten in place


@pytest.mark.parametrize("n_bytes", [None, LARGE_BYTES], ids=["small", "large"])
@pytest.mark.parametrize("is_settled", [True, False])
def test_a_model_overwritten_in_place_never_gets_the_other_ones_states(
    models: list[Path], tmp_path: Path, folder: Path, n_bytes: int | None, is_settled: bool
) -> None:
    expected = [uncached(model) for model in models]
    assert expected[0] != expected[1]  # the control: the weights decide
    path = tmp_path / "model.gguf"
    large(models[0], path, n_bytes or models[0].stat().st_size)
    if is_settled:
        settle(path)
    cache = store()
    for model in models:
        if model is not models[0]:
            overwrite(path, model, n_bytes)
        for n_restored in (0, len(PROMPT) - 1):
            llm = llama(cache, model=path)
            assert llm.wait_for_fingerprint()
            assert answer(llm) == expected[models.index(model)]
            assert llm.last_reuse.n_restored == n_restored
            llm.close()
    assert cache.stats().refusals == {}
    assert len(list(folder.glob("[!k]*"))) == (1 if n_bytes and is_settled else 0)


def test_a_model_overwritten_before_its_first_prompt_is_not_cached(
    models: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(models[0], path)
    cache = store()
    llm = llama(cache, model=path, use_mmap=False)
    overwrite(path, models[1])
    assert answer(llm) == uncached(models[0])
    assert cache.stats().refusals == {"model_file_changed": 1}
    assert cache.stats().n_entries == 0


def test_a_wrong_stat_is_noticed_by_the_blocks(
    models: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [settle(large(model, tmp_path / model.name)) for model in models]
    identity = file_identity(str(paths[0]))
    digests = FileDigests(RememberedDigests())
    first = digests.begin(str(paths[0]), identity).result()
    assert digests.begin(str(paths[0]), identity).result() == first
    # Images of file systems give two files one identity: here the second gets the first's record.
    other = file_identity(str(paths[1]))
    found = digests._known[identity]
    forged = FileDigest(other, found.digest, found.blocks)
    digests._remembered.keep(forged)
    with caplog.at_level(logging.WARNING, logger="tokcache"):
        second = digests.begin(str(paths[1]), other).result()
    assert second == hashlib.sha256(paths[1].read_bytes()).digest() != first
    assert digests._remembered.refusals == {"blocks_differ": 1}
    assert "another file than before" in caplog.text
    again = FileDigests(RememberedDigests())
    assert again.begin(str(paths[1]), other).result() == second
    assert again._remembered.refusals == {}


@pytest.mark.parametrize(
    ("age_ns", "fraction_ns", "is_settled"),
    [
        (3 * 10**9, 5, True),
        (10**9, 5, False),
        (-(10**10), 5, False),  # the clock was set back
        (10**11, 0, False),  # whole seconds: an image, FAT
    ],
)
def test_only_file_times_that_a_change_would_move_are_trusted(
    age_ns: int, fraction_ns: int, is_settled: bool
) -> None:
    changed_ns = (time.time_ns() - age_ns) // 10**9 * 10**9 + fraction_ns
    for mtime_ns in (1, changed_ns):
        identity = FileIdentity(1, 2, 3, mtime_ns, changed_ns)
        assert file_digests._is_settled(identity) == is_settled
    old = time.time_ns() // 10**9 * 10**9 - 10**11 + 1
    assert file_digests._is_settled(FileIdentity(1, 2, 3, old + 10**11 + 10**9, old)) is False


def test_a_file_that_changes_while_it_is_hashed_is_noticed(tmp_path: Path, folder: Path) -> None:
    path = large(samples.tiny_model(folder=SHARED), tmp_path / "model.gguf")
    cache = store()
    with DIGESTS.paused():
        llm = llama(cache, model=path)
        os.utime(path, ns=(1, 1))
    llm.wait_for_fingerprint()
    for _ in range(2):
        answer(llm)
    assert cache.stats().refusals == {"model_file_changed": 2}
    assert cache.stats().n_entries == 0
    assert not folder.exists()


def test_a_served_model_overwritten_in_place_is_another(models: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(models[0], path)
    before = model_identity(str(path), ModelMeta())
    assert model_identity(str(path), ModelMeta()) == before
    time.sleep(0.02)  # the clock of the file system moves in steps of up to 10 ms
    overwrite(path, models[1])
    assert model_identity(str(path), ModelMeta()) != before
    assert model_identity(str(tmp_path / "none"), ModelMeta()) != before


# A prompt that comes before the digest


def test_a_prompt_before_the_digest_is_decoded_and_stored_by_the_next_request(
    tmp_path: Path,
) -> None:
    path = large(samples.tiny_model(folder=SHARED), tmp_path / "model.gguf")
    cache, expected = store(), uncached(path)
    with DIGESTS.paused():
        llm = llama(cache, model=path)
        assert not llm.wait_for_fingerprint(0.01)
        assert answer(llm) == expected
        assert cache.stats().refusals == {"fingerprint_pending": 1}
        assert cache.stats().n_entries == 0
    assert llm.wait_for_fingerprint()
    answer(llm, [5, 6, 7])
    assert cache.stats().saved_tokens >= len(PROMPT)
    other = llama(cache, model=path)
    other.wait_for_fingerprint()
    assert answer(other) == expected
    assert other.last_reuse.n_restored == len(PROMPT) - 1
    assert cache.stats().refusals == {"fingerprint_pending": 1}


def test_a_digest_that_comes_within_a_generation_is_used_at_its_end(tmp_path: Path) -> None:
    path = large(samples.tiny_model(folder=SHARED), tmp_path / "model.gguf")
    cache = store()
    with DIGESTS.paused():
        llm = llama(cache, model=path)
        stream = llm.create_completion(PROMPT, stream=True, **GREEDY)
        next(stream)
    llm.wait_for_fingerprint()
    for _ in stream:
        pass
    assert cache.stats().saved_tokens >= len(PROMPT)


def test_closing_stores_the_states_that_came_before_the_digest(tmp_path: Path) -> None:
    path = large(samples.tiny_model(folder=SHARED), tmp_path / "model.gguf")
    cache = store()
    with DIGESTS.paused():
        llm = llama(cache, model=path)
        answer(llm)
    llm.wait_for_fingerprint()
    llm.close()
    assert cache.stats().saved_tokens >= len(PROMPT)


MEMORIES = [
    "llama",
    "gemma3",
    "gemma3 full",
    "mamba",
    "mamba2",
    "lfm2",
    "falcon-h1",
    "lfm2-windowed",
]


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize("memory", MEMORIES)
def test_states_of_every_memory_are_right_after_a_late_digest(
    tmp_path: Path, memory: str, reproducible: bool
) -> None:
    architecture, _, full = memory.partition(" ")
    source = samples.tiny_model(architecture=architecture, folder=SHARED)
    path = large(source, tmp_path / "model.gguf")
    settings: dict[str, Any] = {
        "model": path, "swa_full": bool(full), "reproducible": reproducible, "n_ubatch": 64,
    }  # fmt: skip
    prompts = [random.Random(seed).choices(range(3, 1000), k=300) for seed in range(3)]
    longer = prompts[1] + prompts[2]
    control, expected = llama(**settings), []
    for prompt in (*prompts, longer):
        control.reset()
        expected.append(answer(control, prompt))
    cache = store()
    with DIGESTS.paused():
        late = llama(cache, **settings)
        assert answer(late, prompts[0]) == expected[0]
        stream = late.create_completion(prompts[1], stream=True, **GREEDY)
        said = text(next(stream))
    late.wait_for_fingerprint()
    assert said + "".join(text(part) for part in stream) == expected[1]
    assert answer(late, longer) == expected[3]
    late.close()
    fresh = llama(cache, **settings)
    fresh.wait_for_fingerprint()
    for prompt, right in [*zip((*prompts, longer), expected, strict=True)] * 2:
        fresh.reset()
        assert answer(fresh, prompt) == right
    assert fresh.last_reuse.n_restored > 0
    if memory in {"llama", "gemma3 full"} and not reproducible:
        assert cache.stats().refusals == {"fingerprint_pending": 2}


def test_a_public_fingerprint_waits_for_the_digest(tmp_path: Path) -> None:
    path = settle(large(samples.tiny_model(folder=SHARED), tmp_path / "model.gguf"))
    params = llama_cpp.llama_context_default_params(), llama_cpp.llama_model_default_params()
    with ThreadPoolExecutor(3) as pool:
        with DIGESTS.paused():
            waiting = [pool.submit(state_fingerprint, path, *params) for _ in range(3)]
            until = time.monotonic() + 20
            while not threads():
                assert time.monotonic() < until
            time.sleep(0.1)
            assert len(threads()) == 1  # one for each file
            assert not any(each.done() for each in waiting)
        made = {each.result(timeout=60) for each in waiting}
    assert made == {state_fingerprint(path, *params)}
    wait_for_no_thread()


def test_every_part_of_a_split_model_and_the_lora_are_hashed(tmp_path: Path) -> None:
    parts = [tmp_path / f"model-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    lora = tmp_path / "lora.gguf"
    for each in (*parts, lora):
        large(samples.tiny_model(folder=SHARED), each)
    settle(lora)
    params = llama_cpp.llama_context_default_params(), llama_cpp.llama_model_default_params()
    made = {state_fingerprint(parts[0], *params, lora_path=lora)}
    for each in (*parts, lora):
        with each.open("r+b") as file:
            file.seek(LARGE_BYTES - 1)
            file.write(b"x")
        made.add(state_fingerprint(parts[0], *params, lora_path=lora))
    assert len(made) == 5


# Ends while a file is hashed


@pytest.mark.parametrize("end", ["close", "del"])
def test_a_llama_that_is_dropped_while_its_file_is_hashed_is_freed_at_once(
    tmp_path: Path, folder: Path, end: str
) -> None:
    path = large(samples.tiny_model(folder=SHARED), tmp_path / "model.gguf")
    gc.collect()
    wait_for_no_thread()
    gc.disable()
    try:
        with DIGESTS.paused():
            llm = llama(store(), model=path)
            assert len(threads()) == 1
            reference = weakref.ref(llm)
            if end == "close":
                llm.close()
            else:
                del llm
                assert reference() is None
            wait_for_no_thread()
    finally:
        gc.enable()
    assert not folder.exists()


def test_llamas_of_one_file_share_a_thread(tmp_path: Path) -> None:
    path = settle(large(samples.tiny_model(folder=SHARED), tmp_path / "model.gguf"))
    cache = store()
    with DIGESTS.paused():
        llms = [llama(cache, model=path) for _ in range(3)]
        assert len(threads()) == 1
        llms.pop().close()
    for llm in llms:
        assert llm.wait_for_fingerprint(60)
    wait_for_no_thread()
    answer(llms[0])
    answer(llms[1])
    assert llms[1].last_reuse.n_restored > 0


SCRIPT = """
import os, sys
from tokcache.llama.file_digests import DIGESTS, file_identity
path = sys.argv[1]
identity = file_identity(path)
pause = DIGESTS.paused()
pause.__enter__()
hashing = DIGESTS.begin(path, identity)
assert not hashing.wait(0.05)
if sys.argv[2] == "fork":
    if (pid := os.fork()) == 0:
        assert hashing.is_lost
        print(DIGESTS.begin(path, identity).result().hex(), flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.parametrize("end", ["exit", "fork"])
def test_a_process_that_ends_or_forks_while_a_file_is_hashed(tmp_path: Path, end: str) -> None:
    path = large(samples.tiny_model(folder=SHARED), tmp_path / "model.gguf")
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", SCRIPT, str(path), end],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    if end == "fork":
        assert done.stdout.strip() == hashlib.sha256(path.read_bytes()).hexdigest()


# Remembered for later processes


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.gguf"
    return settle(large(samples.tiny_model(folder=SHARED), path))


def digest(path: Path, remembered: RememberedDigests | None = None) -> bytes:
    """Return the digest that another process would find; pauses tell whether it was known."""
    digests = FileDigests(remembered or RememberedDigests())
    return digests.begin(str(path), file_identity(str(path))).result()


def is_remembered(path: Path) -> bool:
    digests = FileDigests(RememberedDigests())
    with digests.paused():
        return digests.begin(str(path), file_identity(str(path))).is_done


def records(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.name != "key")


def test_a_digest_is_remembered_for_the_next_process(tmp_path: Path, folder: Path) -> None:
    file = settle(large(samples.tiny_model(folder=SHARED), tmp_path / "model.gguf"))
    assert not is_remembered(file)
    expected = hashlib.sha256(file.read_bytes()).digest()
    assert digest(file) == expected
    assert is_remembered(file)
    assert digest(file) == expected
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()] == [0o600, 0o600]
    script = "import sys; from tests.integration.test_model_identity import is_remembered, Path;"
    script += "sys.exit(not is_remembered(Path(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(file)]
    assert subprocess.run(command, check=False).returncode == 0  # noqa: S603 (our own code)
    os.utime(file, ns=(1, 1))  # another ctime, as containers make at each start
    assert not is_remembered(file)


def test_small_files_are_not_remembered_nor_any_if_it_is_turned_off(
    file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest(settle(samples.tiny_model(folder=tmp_path)))
    assert not folder.exists()
    for value in ("0", "false", "No", " off", "maybe"):
        monkeypatch.setenv("TOKCACHE_REMEMBER_DIGESTS", value)
        digest(file)
        assert not folder.exists()
    monkeypatch.setenv("TOKCACHE_REMEMBER_DIGESTS", "1")
    digest(file)
    monkeypatch.setenv("TOKCACHE_REMEMBER_DIGESTS", "0")
    assert not is_remembered(file)


DAMAGES = {
    "empty": lambda data: data[:0],
    "short": lambda data: data[:40],
    "cut off": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "magic": lambda data: b"x" + data[1:],
    "identity": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "digest": lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
    "blocks": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    "mac": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "huge": lambda data: data + bytes(1 << 20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_not_used_and_is_written_again(
    file: Path, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = digest(file)
    (record,) = records(folder)
    record.write_bytes(DAMAGES[damage](record.read_bytes()))
    remembered = RememberedDigests()
    identity = file_identity(str(file))
    with caplog.at_level(logging.WARNING, logger="tokcache"):
        assert [remembered.find(identity) for _ in range(2)] == [None, None]
    assert remembered.refusals == {"damaged": 2}
    assert len(caplog.records) == 1
    assert digest(file) == expected
    assert is_remembered(file)


def test_a_record_of_another_key_or_another_file_is_not_used(
    file: Path, folder: Path, tmp_path: Path
) -> None:
    expected = digest(file)
    for key in (bytes(32), b"", bytes(31), bytes(33)):
        (folder / "key").write_bytes(key)
        assert not is_remembered(file)
        assert digest(file) == expected
        assert is_remembered(file)
    before = set(records(folder))
    other = settle(large(samples.tiny_model(folder=SHARED), tmp_path / "other.gguf"))
    digest(other)
    (theirs,) = set(records(folder)) - before
    ours = max(before, key=lambda each: each.stat().st_mtime_ns)
    theirs.write_bytes(ours.read_bytes())
    assert not is_remembered(other)


def test_the_number_of_records_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokcache._records.MAX_RECORDS", 5)
    remembered = RememberedDigests()
    made = [FileIdentity(n, 2, 3, 4, 5) for n in range(12)]
    stale = folder / ".new-1"
    for n, identity in enumerate(made):
        before = set(records(folder)) if folder.exists() else set()
        remembered.keep(FileDigest(identity, bytes(32), ()))
        (newest,) = set(records(folder)) - before
        os.utime(newest, (n, n))
        assert remembered.find(made[0]) is not None  # the one that is used stays
        stale.touch()
    os.utime(stale, (1, 1))
    remembered.keep(FileDigest(made[0], bytes(32), ()))
    assert len(records(folder)) == 5
    assert [remembered.find(each) is not None for each in made] == [True] + [False] * 7 + [True] * 4
    assert remembered.refusals == {}


def unusable(folder: Path, how: str) -> None:
    root = folder.parent
    if how == "a file":
        root.write_bytes(b"")
        return
    root.mkdir()
    if how == "a symlink":
        (root / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(root / "elsewhere")
        return
    folder.mkdir(mode=0o700)
    if how == "writable by others":
        folder.chmod(0o707)
    elif how == "of another user":
        os.chown(folder, 12345, 12345)
    elif how == "a key others can read":
        (folder / "key").write_bytes(bytes(32))
        (folder / "key").chmod(0o644)
    elif how == "a key that is a link":
        (root / "key").write_bytes(bytes(32))
        (root / "key").chmod(0o600)
        (folder / "key").symlink_to(root / "key")
    elif how == "a key that is a folder":
        (folder / "key").mkdir()


UNUSABLE = [
    "a file", "a symlink", "writable by others", "of another user", "a key others can read",
    "a key that is a link", "a key that is a folder",
]  # fmt: skip


@pytest.mark.parametrize("how", UNUSABLE)
def test_an_unsafe_folder_is_not_used_and_is_logged_once(
    file: Path, folder: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "of another user" and os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    unusable(folder, how)
    remembered = RememberedDigests()
    with caplog.at_level(logging.WARNING, logger="tokcache"):
        for _ in range(2):
            expected = hashlib.sha256(file.read_bytes()).digest()
            assert digest(file, remembered) == expected
    assert len(caplog.records) == 1
    assert "no remembered digest can be kept" in caplog.text
    assert sum(remembered.refusals.values()) >= 2
    if how != "a file":
        assert [each.name for each in folder.iterdir() if each.name != "key"] == []


def test_without_a_home_or_room_only_the_hashing_is_repeated(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokcache._records.user_cache_folder", lambda: Path("~/x"))
    monkeypatch.delenv("TOKCACHE_CACHE_DIR")
    remembered = RememberedDigests()
    assert digest(file, remembered) == hashlib.sha256(file.read_bytes()).digest()
    assert remembered.refusals == {"no_folder": 1}
    assert not Path("~").exists()


def test_processes_write_the_same_folder_at_once(file: Path, folder: Path) -> None:
    script = (
        "import sys; from tests.integration.test_model_identity import *\n"
        "for n in range(20):\n"
        "    one = RememberedDigests()\n"
        "    one.keep(FileDigest(FileIdentity(n, 0, 3, 4, 5), bytes(32), ()))\n"
        "    assert one.find(FileIdentity(n, 0, 3, 4, 5)) is not None, one.refusals\n"
        "    assert digest(Path(sys.argv[1]), one).hex() == sys.argv[2]\n"
        "    assert not one.refusals, one.refusals\n"
    )
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    command = [sys.executable, "-c", script, str(file), expected]
    running = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603 (our own code)
        for _ in range(3)
    ]
    assert [(each.communicate(timeout=100)[1], each.returncode) for each in running] == [
        ("", 0)
    ] * 3
    assert len(records(folder)) == 21


# Files that can't be read


def test_a_file_that_is_gone_or_unreadable_raises_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    identity = file_identity(str(path))
    digests = FileDigests(RememberedDigests())
    path.write_bytes(b"GGUF, another")
    for _ in range(2):
        with pytest.raises(FileChanged, match="replaced"):
            digests.begin(str(path), identity).result()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        digests.begin(str(path), identity).result()


def test_without_a_thread_the_caller_hashes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert digest(file) == hashlib.sha256(file.read_bytes()).digest()
