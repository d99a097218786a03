"""Copies and pickles of a wrapped transformers tokenizer, and copies whose class is replaced.

Libraries do all of this: they copy a tokenizer, assign a class of their own to the copy, derive
from its class and send it to other processes.
"""

from __future__ import annotations

import copy
import functools
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dill
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

import tokcache
from tests.text.tokenizers_made import MADE, TEXTS, fast
from tests.text.tokenizers_synthetic import SYNTHETIC
from tokcache.text.engines import copying
from tokcache.text.tokenizer import WrappedTokenizer
from tokcache.text.wrappers.patch import load_stats

CONFIG = tokcache.CacheConfig(engine="tokenizers", l0_max_entries=77)
COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.fixture
def plain() -> Any:
    return fast(MADE["byte_level_bpe"](), pad_token="</s>", model_max_length=25)  # noqa: S106


@pytest.fixture
def wrapped(plain: Any) -> Any:
    return tokcache.wrap(plain, CONFIG)


@pytest.fixture
def patched() -> Iterator[None]:
    tokcache.patch_transformers(CONFIG)
    yield
    tokcache.unpatch_transformers()


def another_rust_tokenizer() -> Tokenizer:
    made = MADE["byte_level_bpe"]()
    made.add_tokens(["hello"])
    return made


def assert_same_answers(own: Any, other: Any) -> None:
    for text in TEXTS:
        assert own(text).data == other(text).data
        assert own(text, padding="max_length", max_length=9, truncation=True).data == (
            other(text, padding="max_length", max_length=9, truncation=True).data
        )


# ---- copies


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_stays_wrapped_and_has_the_attributes_of_a_plain_tokenizer(
    plain: Any, wrapped: Any, how: str
) -> None:
    made = COPIES[how](wrapped)
    assert type(made) is type(wrapped)
    assert vars(made).keys() == vars(wrapped).keys() == vars(plain).keys()
    assert made._tokcache.config == CONFIG
    assert_same_answers(made, plain)

    class Own(made.__class__):  # type: ignore[misc, name-defined]
        """Caches slow properties, as several servers do by replacing the class of a copy."""

        @property
        def all_special_ids(self) -> list[int]:
            return [1, 2, 3]

        def __len__(self) -> int:
            return 12345

    made.__class__ = Own
    assert type(made) is Own
    assert (made.all_special_ids, len(made)) == ([1, 2, 3], 12345)
    assert isinstance(made, WrappedTokenizer)
    assert_same_answers(made, plain)
    assert made.cache_stats().l0.hits
    assert type(wrapped) is not Own


def test_a_shallow_copy_shares_the_rust_tokenizer_and_the_cache(plain: Any, wrapped: Any) -> None:
    own, other = copy.copy(wrapped), copy.copy(plain)
    wrapped("hello world")
    own("hello world")
    assert own.cache_stats().l0.hits == 1
    for tok, its_copy in ((wrapped, own), (plain, other)):
        its_copy.add_tokens(["hello world"])
        its_copy.padding_side = "left"
        assert tok.padding_side == "right"
    assert_same_answers(wrapped, plain)
    assert_same_answers(own, other)


def test_a_deep_copy_shares_nothing(plain: Any, wrapped: Any) -> None:
    own, other = copy.deepcopy(wrapped), copy.deepcopy(plain)
    wrapped("hello world")
    for tok, its_copy in ((wrapped, own), (plain, other)):
        its_copy.add_tokens(["hello world"])
        tok.add_tokens(["quick"])
    assert_same_answers(wrapped, plain)
    assert_same_answers(own, other)
    assert own.cache_stats().l0.hits == len(TEXTS)


def test_a_copy_keeps_its_own_split_special_tokens(plain: Any, wrapped: Any) -> None:
    own, other = copy.copy(wrapped), copy.copy(plain)
    for its_copy in (own, other):
        its_copy.split_special_tokens = True
    for _ in range(2):
        assert_same_answers(own, other)
        assert_same_answers(wrapped, plain)
    assert own("a<s>b").data != wrapped("a<s>b").data


def test_replacing_the_rust_tokenizer_of_a_copy_does_not_change_the_original(
    plain: Any, wrapped: Any
) -> None:
    own, other = copy.copy(wrapped), copy.copy(plain)
    for its_copy in (own, other):
        its_copy._tokenizer = another_rust_tokenizer()
    assert_same_answers(own, other)
    assert_same_answers(wrapped, plain)
    assert wrapped("hello").data != own("hello").data


def test_copies_keep_their_scope(wrapped: Any) -> None:
    view = wrapped.scoped("tenant-a")
    for made in (copy.copy(view), copy.deepcopy(view)):
        assert type(made) is type(view)
        made("hello world")
        assert made._tokcache.get("hello world", True, "tenant-a") is not None
        assert made._tokcache.get("hello world", True, None) is None

        class Own(made.__class__):  # type: ignore[misc, name-defined]
            pass

        made.__class__ = Own
        assert made._tokcache_scope == "tenant-a"


def test_copies_are_freed_with_their_last_reference(wrapped: Any) -> None:
    for _ in range(3):
        copy.copy(wrapped)
    gc.collect()
    with_own_reduce = copy.copy(wrapped)
    assert sum(one() is not None for one in wrapped._tokcache_backend.wrappers) == 2
    assert len(wrapped._tokcache_backend.wrappers) == 2
    gone = weakref.ref(with_own_reduce)
    del with_own_reduce
    assert gone() is None


# ---- classes


def test_assigning_a_plain_class_to_a_wrapped_tokenizer_keeps_it_wrapped(
    plain: Any, wrapped: Any
) -> None:
    class Own(type(plain)):  # type: ignore[misc]
        def greeting(self) -> str:
            return "hello"

    for tok in (plain, wrapped):
        tok.__class__ = Own
        assert tok.greeting() == "hello"
        assert isinstance(tok, Own)
    assert isinstance(wrapped, WrappedTokenizer)
    assert_same_answers(wrapped, plain)


def test_a_class_with_its_own_encoding_bypasses_the_cache(plain: Any, wrapped: Any) -> None:
    def shouting(base: type[Any]) -> type[Any]:
        class Own(base):  # type: ignore[misc]
            def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
                return super()._encode_plus(text.upper(), *args, **kwargs)

        return Own

    own, other = copy.copy(wrapped), copy.copy(plain)
    own("hello world")
    for tok in (own, other):
        tok.__class__ = shouting(type(tok))
    assert own("hello world").data == other("hello world").data
    assert own.token_ids("hello world").tolist() == other("hello world")["input_ids"]
    assert own.cache_stats().bypasses == {"own_encode_plus": 2}
    assert_same_answers(wrapped, plain)


def test_a_subclass_of_a_wrapped_class_makes_wrapped_objects(plain: Any, wrapped: Any) -> None:
    class Named(ABC):
        @abstractmethod
        def name(self) -> str: ...

    class Own(type(wrapped), Named):  # type: ignore[misc]
        def name(self) -> str:
            return "own"

    made = Own(tokenizer_object=MADE["byte_level_bpe"](), pad_token="</s>", model_max_length=25)  # noqa: S106
    assert type(made) is Own
    assert made.name() == "own"
    assert_same_answers(made, plain)
    assert made.cache_stats().l0.hits


@pytest.mark.parametrize("library", [pickle, dill, cloudpickle])
def test_the_class_of_a_wrapped_tokenizer_can_be_pickled(
    plain: Any, wrapped: Any, library: Any
) -> None:
    for tok in (wrapped, wrapped.scoped("tenant-a")):
        made = library.loads(library.dumps(type(tok)))
        assert issubclass(made, type(plain))
        assert made.__name__ == type(plain).__name__
    assert pickle.loads(pickle.dumps(type(wrapped))) is type(plain)  # noqa: S301 (our own)


# ---- pickles


class Importable(type(fast(MADE["byte_level_bpe"]()))):  # type: ignore[misc]
    """A tokenizer class that pickle can import by its name."""


Derived: Any = type("Derived", (type(tokcache.wrap(fast(MADE["byte_level_bpe"]()), CONFIG)),), {})
Derived.__module__ = __name__


def with_own_reduce(tokenizer: Any) -> Any:
    """Return a copy whose class is replaced by one with its own `__reduce__`."""
    made = copy.copy(tokenizer)

    class OwnReduce(tokenizer.__class__):  # type: ignore[misc]
        def __reduce__(self) -> Any:
            return with_own_reduce, (tokenizer,)

    made.__class__ = OwnReduce
    return made


def pickled(made: Any, library: Any = pickle) -> Any:
    return library.loads(library.dumps(made))


@pytest.mark.parametrize("library", [pickle, dill, cloudpickle])
def test_the_pickle_of_a_wrapped_tokenizer_is_that_of_a_plain_one(
    plain: Any, wrapped: Any, library: Any
) -> None:
    wrapped("hello world")
    wrapped.add_tokens(["hello world"])
    plain.add_tokens(["hello world"])
    for tok in (wrapped, wrapped.scoped("tenant-a")):
        assert b"tokcache" not in library.dumps(tok)
        made = pickled(tok, library)
        assert type(made) is type(plain)
        assert type(made._tokenizer) is Tokenizer
        assert_same_answers(made, plain)


def test_a_pickle_loads_where_tokcache_is_not_installed(
    plain: Any, wrapped: Any, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.pickle"
    path.write_bytes(pickle.dumps((wrapped, type(wrapped))))
    code = (
        "import pickle, sys\n"
        "sys.modules['tokcache'] = None\n"
        f"tok, kind = pickle.load(open({str(path)!r}, 'rb'))\n"
        "assert type(tok) is kind, kind\n"
        "print(tok('hello world')['input_ids'])\n"
    )
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(plain("hello world")["input_ids"])


def test_a_reduce_method_of_a_replaced_class_is_used(plain: Any, wrapped: Any) -> None:
    made = with_own_reduce(wrapped)
    assert type(made).__name__ == "OwnReduce"
    for again in (pickled(made), copy.copy(made), copy.deepcopy(made)):
        assert type(again).__name__ == "OwnReduce"
        assert_same_answers(again, plain)


def test_an_object_of_a_derived_class_keeps_class_scope_and_config_in_a_pickle(
    plain: Any, wrapped: Any
) -> None:
    wrapped.__class__ = Derived
    made = pickled(wrapped.scoped("tenant-a"))
    assert isinstance(made, Derived)
    assert made._tokcache_scope == "tenant-a"
    assert made._tokcache.config == CONFIG
    assert_same_answers(made, plain)


LOAD_AND_PRINT = """
import pickle, sys
if sys.argv[2] == "patched":
    import tokcache
    tokcache.patch_transformers(tokcache.CacheConfig(engine="tokenizers"))
with open(sys.argv[1], "rb") as file:
    tok = pickle.load(file)
assert type(tok).__name__ == "Local", type(tok)
print(len(tok), hasattr(tok, "cache_stats"), tok("hello world")["input_ids"])
"""


@pytest.mark.parametrize("process", ["patched", "unpatched"])
def test_a_local_class_assigned_to_a_copy_loads_in_another_process(
    plain: Any, wrapped: Any, process: str, tmp_path: Path
) -> None:
    """cloudpickle stores a local class by value, with the class of the wrapper as its base."""
    made = copy.copy(wrapped)

    class Local(wrapped.__class__):  # type: ignore[misc]
        def __len__(self) -> int:
            return 12345

    Local.__module__ = "__main__"
    made.__class__ = Local
    path = tmp_path / "tokenizer.pickle"
    path.write_bytes(cloudpickle.dumps(made))
    command = [sys.executable, "-c", LOAD_AND_PRINT, str(path), process]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert not done.returncode, done.stderr[-800:]
    n_tokens, is_wrapped, ids = done.stdout.strip().split(" ", 2)
    assert n_tokens == "12345"
    assert ids == str(plain("hello world")["input_ids"])
    assert is_wrapped == "True" or process == "unpatched"


@pytest.mark.usefixtures("patched")
def test_unpickled_tokenizers_are_wrapped_if_transformers_is_patched(
    plain: Any, wrapped: Any
) -> None:
    before = load_stats().n_wrapped
    for library in (pickle, dill, cloudpickle):
        for tok in (plain, wrapped, wrapped.scoped("tenant-a")):
            made = pickled(tok, library)
            assert type(made) is type(wrapped)
            assert made._tokcache.config == CONFIG
            assert_same_answers(made, plain)
    assert load_stats().n_wrapped == before + 9


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_plain_tokenizer_stays_plain_if_transformers_is_patched(
    plain: Any, how: str
) -> None:
    made = COPIES[how](plain)
    assert type(made) is type(plain)
    assert type(made._tokenizer) is Tokenizer
    assert (made._tokenizer is plain._tokenizer) == (how == "copy")


def test_a_tokenizer_that_can_not_be_wrapped_is_unpickled_plain(plain: Any) -> None:
    made: Any = Importable.__new__(Importable)
    vars(made).update(vars(plain), _tokenizer=functools.partial(int))
    data = pickle.dumps(made)
    tokcache.patch_transformers(CONFIG)
    try:
        again = pickle.loads(data)  # noqa: S301 (our own)
    finally:
        tokcache.unpatch_transformers()
    assert type(again) is Importable
    assert load_stats().unwrapped["Importable"]


def test_unpatching_removes_the_unpickling_hook(plain: Any) -> None:
    from transformers import TokenizersBackend  # noqa: PLC0415 (seconds to import)

    assert not hasattr(TokenizersBackend, "__setstate__")
    tokcache.patch_transformers(CONFIG)
    assert hasattr(TokenizersBackend, "__setstate__")
    tokcache.unpatch_transformers()
    assert not hasattr(TokenizersBackend, "__setstate__")
    assert type(pickled(plain)) is type(plain)


PRINT_FINGERPRINT = """
import sys, pathlib, dill, hashlib
import tokcache
from transformers import AutoTokenizer
config = tokcache.CacheConfig(engine="tokenizers")
tok = tokcache.wrap(AutoTokenizer.from_pretrained(sys.argv[1]), config)
tok("hello world")
if len(sys.argv) > 2:
    exec(sys.argv[2])
# The library datasets hashes the class and the attributes in this way for its fingerprints.
print(hashlib.sha256(dill.dumps((type(tok), vars(tok)), recurse=True)).hexdigest())
"""


def test_datasets_fingerprints_are_stable_across_processes_and_follow_changes(
    plain: Any, tmp_path: Path
) -> None:
    plain.save_pretrained(tmp_path)

    def fingerprint(seed: int, change: str = "") -> str:
        done = subprocess.run(  # noqa: S603 (our own code)
            [sys.executable, "-c", PRINT_FINGERPRINT, str(tmp_path), *([change] if change else [])],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        )
        return done.stdout.strip()

    first = fingerprint(1)
    assert fingerprint(2) == first
    changes = ["tok.add_tokens(['hello'])", "tok.padding_side = 'left'"]
    assert len({first, *(fingerprint(3, change) for change in changes)}) == 3


def test_a_tokenizer_sent_to_another_process_works_there(plain: Any, wrapped: Any) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert (
            pool.apply(input_ids_of, (wrapped, "hello world")) == plain("hello world")["input_ids"]
        )


def input_ids_of(tokenizer: Any, text: str) -> Any:
    return tokenizer(text)["input_ids"]


def test_assigning_dict_replaces_the_rust_tokenizer(plain: Any, wrapped: Any) -> None:
    for tok in (plain, wrapped):
        tok.__dict__ = {**vars(tok), "_tokenizer": another_rust_tokenizer()}
    assert_same_answers(wrapped, plain)


# ---- the proof of a copy


@pytest.mark.parametrize(
    ("contents", "wanted"),
    [(["<a>", "<b\xe9>"], 1), (["<b\xe9>", "<be\u0301>"], 2)],
    ids=["distinct", "alike_once_normalised"],
)
def test_two_copies_that_are_made_alike_cost_one_proof(
    contents: list[str], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two added tokens that NFC makes equal, each copy finds one by chance: both are proven."""
    tokenizer = SYNTHETIC["gpt2"]()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(one, normalized=True) for one in contents])
    proven: list[Tokenizer] = []
    is_equal = copying._is_equal

    def counted(own: Tokenizer, *rest: Any) -> bool:
        proven.append(own)
        # A copy may find the other one of two tokens that are alike: it is then made in other ways.
        return is_equal(own, *rest) or wanted > 1

    monkeypatch.setattr(copying, "_is_equal", counted)
    wrapped = tokcache.wrap(tokenizer, tokcache.CacheConfig(engine="tokenizers"))
    assert len(proven) == wanted
    if wanted == 1:
        text = " ".join([*contents, "a be\u0301"])
        assert list(wrapped.token_ids(text)) == tokenizer.encode(text).ids


def test_nfc_is_not_called_for_ascii() -> None:
    calls: list[str] = []

    class Counted:
        def __init__(self, state: bytes, normalizer: Any) -> None:
            self.state, self.normalizer = state, normalizer

        def __getstate__(self) -> bytes:
            return self.state

        def normalize_str(self, text: str) -> str:
            calls.append(text)
            return str(self.normalizer.normalize_str(text))

    texts = ["<a>", "be\u0301", "~\x7f"]
    for made, wanted in (
        (normalizers.NFC(), ["be\u0301"]),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), texts),
    ):
        calls.clear()
        state = copying.component_state(made)
        found = copying.normalized_forms(Counted(state, made), texts)
        assert found == [made.normalize_str(one) for one in texts]
        assert calls == wanted
