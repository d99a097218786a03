"""Runs every native class while one allocation after the other fails; a process for each class.

`python -m tests.native.failing_allocations NAME` needs the library of `failing_allocations.c` in
LD_PRELOAD, and PYTHONMALLOC=malloc. For every n, the n-th allocation of a scenario fails, alone and
with all later ones. Then the scenario ends with its own result or with a MemoryError, the object
passes `_check()` and answers correctly, and no block is left when it is gone.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from array import array
from collections.abc import Callable
from marshal import dumps
from traceback import format_exception
from typing import Any

from tests.text.tokenizers_synthetic import SYNTHETIC, plain
from tokcache.text import _l0, _token_ids
from tokcache.text.chat import _freezing
from tokcache.text.cuts.planner import plan_cuts
from tokcache.text.segments import _l1

N_LEAK_RUNS = 3  # a leak adds to each; a cache of Python's own is filled once


class Scenario:
    """One class under test: `run` is called while allocations fail, `check` afterwards."""

    def run(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError


def ids_for(text: str) -> list[int]:
    """Return the ids of a tokenizer that has one id per character."""
    return [*map(ord, text)]


SHARED = "The quick brown fox jumps over the lazy dog. " * 20
TEXTS = [
    "short",
    "é wide",
    "漢字 and more",
    "🙂",
    *(f"{SHARED}{at:06d}{SHARED}" for at in range(6)),  # one digest of samples: crowded
    *(f"ü{SHARED}{at:06d}{SHARED}" for at in range(3)),
]
SCOPES = [None, None, "tenant-a", "tenant-b"]


class L0(Scenario):
    """Entries in several scopes; at most 9, so that the rest is evicted."""

    def __init__(self) -> None:
        self.cache = _l0.L0Cache(max_entries=9, max_bytes=60_000)
        self.ids = {text: _token_ids.TokenIds(ids_for(text)) for text in TEXTS}
        for scope in range(300):  # their numbers and counts are ints that are allocated
            self.cache.put("x", [1], scope=f"scope {scope}")

    def run(self) -> None:
        cache = self.cache
        for at, text in enumerate(TEXTS):
            scope = SCOPES[at % len(SCOPES)]
            cache.put(text, self.ids[text], scope=scope, add_special_tokens=at % 3 == 0)
            assert cache.get(text, scope="tenant-c") is None
            found = cache.get(text, scope=scope, add_special_tokens=at % 3 == 0)
            assert found is None or found == self.ids[text]
        rows = cache.held()
        cache.clear(scope="tenant-a")
        cache.fill(rows)
        cache.stats()
        cache.clear()
        cache.fill(rows)

    def check(self) -> None:
        cache = self.cache
        cache._check()
        for text, _, ids, _ in cache.held():
            assert ids.tolist() == (self.ids[text].tolist() if text in self.ids else [1])
        for at, text in enumerate(TEXTS):
            assert cache.put(text, self.ids[text], scope=SCOPES[at % len(SCOPES)])
            assert cache.get(text, scope=SCOPES[at % len(SCOPES)]) == self.ids[text]
            cache._check()
        cache.clear(scope="tenant-a")
        cache._check()


class L0Crowd(Scenario):
    """Many entries of one scope, and texts with one digest of samples."""

    def __init__(self) -> None:
        self.cache = _l0.L0Cache(max_entries=1000)
        self.texts = [*map(str, range(258)), *(f"{SHARED}{at:06d}{SHARED}" for at in range(9))]
        for text in self.texts[:262]:
            self.cache.put(text, ids_for(text), scope="tenant-a")

    def run(self) -> None:
        for text in self.texts[257:]:
            self.cache.put(text, ids_for(text), scope="tenant-a")

    def check(self) -> None:
        self.cache._check()
        for at, text in enumerate(self.texts):
            found = self.cache.get(text, scope="tenant-a")
            assert found == ids_for(text) or (found is None and at >= 257)
        self.cache.clear(scope="tenant-a")
        self.cache._check()
        assert len(self.cache) == 0


TOKENIZER = plain(SYNTHETIC["gpt2"])
PLAN = plan_cuts(TOKENIZER)
LINES = [f"The dog number {at} doesn't mind; it's fine, and {at * at} too.\n" for at in range(400)]
LONG = ["".join(LINES[at : at + 40]) for at in (0, 30, 90, 0)]
WIDE = ["漢字 and é, words with 🙂 in between; " * 30 + LINES[7]]
SEPARATOR = 1


def encode(text: str) -> array[int]:
    return array("i", text.encode("utf-32-le"))  # as `ids_for`, in few allocations


def length_of(index: int) -> int:
    return len(chr(index).encode())


class L1(Scenario):
    """Texts that share chunks and segments, in a cache with room for some of them."""

    max_bytes = 40_000

    def __init__(self) -> None:
        self.cache: Any = _l1.SegmentCache(PLAN, self.max_bytes, True)
        self.cache.cut_seed = bytes(range(48))
        self.lengths: Any = _l1.IdLengths(0x30000, length_of, None)
        self.texts = [*LONG, *WIDE]
        self.expect(LINES[0] * 3)

    def expect(self, text: str, scope: int = 0) -> None:
        assert self.ids(text, scope).tobytes() == text.encode("utf-32-le")

    def ids(self, text: str, scope: int) -> Any:
        found = self.cache.look(text, False, scope)
        if hasattr(found, "finish"):
            for variant in range(3):
                for lengths in (self.lengths, None):
                    texts = found.joined(variant, -1, chr(SEPARATOR), lengths, None, 3000, 64)
                    encoded = [*map(encode, texts)]
                    assert found.take(encoded, SEPARATOR, lengths) is not False
            found = found.finish()
        return found

    def run(self) -> None:
        for scope, text in enumerate(self.texts):
            self.expect(text, scope % 2)
        chunks, segments = self.cache.held_chunks(), self.cache.held_segments()
        self.cache.clear(scope=1)
        self.cache.cut(self.texts[0], fine=True)
        self.cache.clear()
        self.cache.fill_chunks(chunks)
        self.cache.fill_segments(segments)
        self.cache.stats()

    def check(self) -> None:
        self.cache._check()
        for scope, text in enumerate(self.texts):
            self.expect(text, scope % 2)
            self.cache._check()


class L1Beginnings(L1):
    """Texts that were put together before, and go on: they are kept in one piece."""

    max_bytes = 1 << 20

    def __init__(self) -> None:
        super().__init__()
        for n in (60, 60):
            self.expect("".join(LINES[:n]))
        self.texts = [*("".join(LINES[:n]) for n in (60, 61, 61, 120, 120))]

    def run(self) -> None:
        for text in self.texts:
            self.expect(text)


class Ids(Scenario):
    """TokenIds from lists, buffers and slices."""

    def __init__(self) -> None:
        self.numbers = [*range(1000, 1100), 5, 2**31 - 1, -(2**31), 400_000]
        self.ids = _token_ids.TokenIds(self.numbers)

    def run(self) -> None:
        make: Any = _token_ids.TokenIds
        for source in (self.numbers, array("i", self.numbers), self.ids):
            ids = make(source)
            assert ids.tolist() == self.numbers
            part = ids[3:90]
            assert part == self.numbers[3:90]
            assert part[::2].tolist() == self.numbers[3:90:2]
            assert make(part) == part
            assert memoryview(part)[0] == 1003
            assert hash(part) == hash(ids[3:90])
            function, arguments = part.__reduce__()  # pickle itself loses a block
            assert function(*arguments) == part
            assert bytes(memoryview(part)) == part.tobytes()
            assert part.count(1003) == 1
            assert part.index(1004) == 1

    def check(self) -> None:
        assert self.ids.tolist() == self.numbers
        assert _token_ids.TokenIds(self.numbers) == self.ids


class Frozen(Scenario):
    """Values of every type that a chat has."""

    def __init__(self) -> None:
        self.value: list[Any] = [
            {"role": "user", "content": "text " * 3000, "é": ["漢字🙂" * 20, 1, 2**80, -3, 1.5]},
            {"role": "tool", "content": [None, True, {"a": (1, 2.5, "ü")}]},
        ]
        self.frozen = dumps(self.value, 0)
        self.messages = b"".join([dumps(one, 0) for one in self.value])

    def run(self) -> None:
        assert _freezing.freeze(self.value) == self.frozen
        keys, ends = _freezing.freeze_messages(self.value)
        assert keys == self.messages
        assert ends[-1] == len(keys)

    def check(self) -> None:
        self.run()


class Lengths(Scenario):
    """IdLengths and CodePoints, from their construction on."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.points = _l1.CodePoints([(0, 0x1FF)])

    def exact(self) -> Any:
        return self.points

    def run(self) -> None:
        points = _l1.CodePoints([(0, 0x1FF), (0x4E00, 0x9FFF), (0x1F600, 0x1F64F)])
        assert points.cover("漢字 and 🙂")
        lengths: Any = _l1.IdLengths(0x30000, length_of, self.exact)
        lengths.fill([1] * 128)
        self.made = [lengths, points]
        cache: Any = _l1.SegmentCache(PLAN, 100_000, True)
        self.made = [lengths, points, cache]
        found = cache.look("漢字 and 🙂 are, words; words.", False, 0)
        texts = found.joined(PLAN.variant_of[0], -1, chr(SEPARATOR), lengths, points, 100, 64)
        assert found.take([ids_for(one) for one in texts], SEPARATOR, lengths) is True

    def check(self) -> None:
        for one in self.made[2:]:
            one._check()


class LosesABlock(Scenario):
    """Planted: an object that frees one of its blocks only if the other could be allocated."""

    def run(self) -> None:
        library = ctypes.CDLL(None)
        library.malloc.restype = ctypes.c_void_p
        library.free.argtypes = [ctypes.c_void_p]
        one = library.malloc(1000)
        if not one:
            raise MemoryError
        other = library.malloc(2000)
        if not other:
            raise MemoryError
        library.free(one)
        library.free(other)

    def check(self) -> None:
        pass


class CountsFirst(Scenario):
    """Planted: a list and its counter, of which the counter changes before the list."""

    def __init__(self) -> None:
        self.all: list[bytes] = []
        self.n = 0

    def run(self) -> None:
        for _ in range(10):
            self.n += 1
            self.all.append(bytes(100))

    def check(self) -> None:
        assert self.n == len(self.all)


SCENARIOS: dict[str, type[Scenario]] = {
    "l0": L0,
    "l0_crowd": L0Crowd,
    "l1": L1,
    "l1_beginnings": L1Beginnings,
    "token_ids": Ids,
    "freezing": Frozen,
    "id_lengths": Lengths,
    "planted_leak": LosesABlock,
    "planted_count": CountsFirst,
}


class Library:
    """The functions of the preloaded library."""

    shows = False  # says in `where` which line got the MemoryError

    def __init__(self) -> None:
        library = ctypes.PyDLL(None)
        self._call = library.failing_call
        self._call.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.py_object]
        self._call.restype = None
        self.n_failed: Callable[[], int] = library.failing_count
        self.n_live: Callable[[], int] = library.failing_live
        library.failing_live.restype = ctypes.c_long

    def call(self, n: int, forever: bool, function: Callable[[], None]) -> None:
        """Call a function while its n-th allocation fails; expect no other error."""
        self.where = ""
        try:
            self._call(n, forever, function)
        except MemoryError as error:
            if self.shows:
                self.where = "".join(format_exception(error))


def blocks_left(library: Library, scenario: type[Scenario], n: int, forever: bool) -> int:
    """Run a scenario once; return the number of blocks afterwards."""
    one = scenario()
    library.call(n, forever, one.run)
    n_failed = library.n_failed()
    one.check()
    del one
    gc.collect()
    left = library.n_live()
    return left if n_failed else -1


def run(name: str, first: int = 0, stride: int = 1) -> str:
    """Let every `stride`-th allocation of a scenario fail; return a summary."""
    library, scenario = Library(), SCENARIOS[name]
    gc.disable()
    summary = []
    left = array("q", [0] * N_LEAK_RUNS)  # it allocates nothing for its items
    is_leak = False
    for forever in (False, True):
        blocks_left(library, scenario, 1 << 40, forever)
        n = first
        while True:
            try:
                for at in range(N_LEAK_RUNS):
                    left[at] = blocks_left(library, scenario, n, forever)
                    is_leak = at == N_LEAK_RUNS - 1 and left[at] > left[at - 1]
                    if at and left[at] <= left[at - 1]:
                        break
            except BaseException as error:
                error.add_note(f"allocation {n} of {name} failed, forever={forever}")
                raise
            if left[0] == -1:
                break
            if is_leak:
                library.shows = True
                blocks_left(library, scenario, n, forever)
                raise AssertionError(
                    f"allocation {n} of {name} (forever={forever}) leaks: {left}\n{library.where}"
                )
            n += stride
        summary.append(f"{n - first:,} allocations")
    return f"{name}: {summary[0]} failed alone, {summary[1]} with all later ones"


if __name__ == "__main__":
    sys.stdout.write(run(sys.argv[1], *map(int, sys.argv[2:])) + "\n")
