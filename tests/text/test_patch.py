"""patch_transformers: every fast tokenizer loaded afterwards is wrapped; nothing else changes."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tokcache
from tests.text.tokenizers_made import MADE, TEXTS, fast
from tokcache.errors import InvalidConfig
from tokcache.samples import tiny_tokenizer
from tokcache.text._native import is_native
from tokcache.text.tokenizer import WrappedTokenizer
from tokcache.text.wrappers import patch
from tokcache.text.wrappers.patch import load_stats, patch_transformers, unpatch_transformers

# The engine "tokenizers" needs no proof, which would take time in each test.
CONFIG = tokcache.CacheConfig(engine="tokenizers", l0_max_entries=77)


def base() -> Any:
    from transformers import PreTrainedTokenizerBase  # noqa: PLC0415 (seconds to import)

    return PreTrainedTokenizerBase


def loader(name: str) -> Any:
    import transformers  # noqa: PLC0415 (seconds to import)

    return getattr(transformers, name)


@pytest.fixture(autouse=True)
def unpatched_afterwards() -> Iterator[None]:
    before = vars(base())["from_pretrained"]
    yield
    unpatch_transformers()
    assert vars(base())["from_pretrained"] is before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("byte_level_bpe")
    fast(MADE["byte_level_bpe"](), pad_token="</s>").save_pretrained(path)  # noqa: S106
    return path


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slow")
    loader("ByT5Tokenizer")().save_pretrained(path)
    return path


LOADERS = ("AutoTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer")


@pytest.mark.parametrize("name", LOADERS)
def test_every_class_loads_wrapped_tokenizers_of_its_kind(name: str, folder: Path) -> None:
    plain = loader(name).from_pretrained(folder)
    patch_transformers(CONFIG)
    wrapped = loader(name).from_pretrained(folder)
    assert isinstance(wrapped, WrappedTokenizer)
    assert isinstance(wrapped, type(plain))
    assert wrapped._tokcache.config == CONFIG
    assert wrapped.name_or_path == plain.name_or_path
    for text in TEXTS * 2:
        assert wrapped(text).data == plain(text).data
    assert wrapped.cache_stats().l0.hits == len(TEXTS)


def test_arguments_and_errors_pass_through(folder: Path) -> None:
    arguments: dict[str, Any] = {"padding_side": "left", "model_max_length": 7, "pad_token": "<s>"}
    plain = loader("AutoTokenizer").from_pretrained(folder, **arguments)
    patch_transformers(CONFIG)
    wrapped = loader("AutoTokenizer").from_pretrained(folder, **arguments)
    for name in ("padding_side", "model_max_length", "pad_token", "init_kwargs"):
        assert getattr(wrapped, name) == getattr(plain, name)
    with pytest.raises(OSError, match="no-such-folder"):
        loader("PreTrainedTokenizerFast").from_pretrained("./no-such-folder")


def test_the_sample_tokenizer_is_loaded_wrapped(tmp_path: Path) -> None:
    home = tiny_tokenizer(tmp_path).parent
    chat = [{"role": "user", "content": "What is a prefix cache?"}]
    plain = loader("AutoTokenizer").from_pretrained(home)
    patch_transformers(CONFIG)
    wrapped = loader("AutoTokenizer").from_pretrained(home)
    for _ in range(2):
        own, other = wrapped.apply_chat_template(chat), plain.apply_chat_template(chat)
        assert own.data == other.data
    assert wrapped.cache_stats().encoded_texts == 1


REAL = ("bert-base-uncased", "gpt2", "minimind", "phi-3-mini", "qwen2.5", "t5-small")


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_are_loaded_wrapped(name: str, shared_data: Path) -> None:
    home = shared_data / "tokenizers" / name
    plain = loader("AutoTokenizer").from_pretrained(home)
    patch_transformers(CONFIG)
    wrapped = loader("AutoTokenizer").from_pretrained(home)
    assert isinstance(wrapped, WrappedTokenizer)
    assert type(wrapped).__name__ == type(plain).__name__
    for text in TEXTS * 2:
        assert wrapped(text).data == plain(text).data


def test_a_processor_has_a_wrapped_tokenizer(tmp_path: Path) -> None:
    plain = fast(MADE["byte_level_bpe"](), pad_token="</s>")  # noqa: S106 (no password)
    processor = loader("WhisperProcessor")(loader("WhisperFeatureExtractor")(), plain)
    processor.save_pretrained(tmp_path / "plain")
    patch_transformers(CONFIG)
    for name in ("AutoProcessor", "WhisperProcessor"):
        made = loader(name).from_pretrained(tmp_path / "plain")
        assert isinstance(made.tokenizer, WrappedTokenizer)
        for _ in range(2):
            assert made(text="hello world").data == processor(text="hello world").data
        made.save_pretrained(tmp_path / name)
        again = loader("AutoProcessor").from_pretrained(tmp_path / name)
        assert again(text="hello world").data == processor(text="hello world").data


def test_unpatching_restores_the_same_method_object(folder: Path) -> None:
    before = vars(base())["from_pretrained"]
    others = {name: vars(loader(name)).get("from_pretrained") for name in LOADERS}
    names = set(vars(base()))
    for _ in range(2):
        patch_transformers(CONFIG)
        assert vars(base())["from_pretrained"] is not before
        assert {n: vars(loader(n)).get("from_pretrained") for n in LOADERS} == others
        unpatch_transformers()
        assert vars(base())["from_pretrained"] is before
    unpatch_transformers()
    assert vars(base())["from_pretrained"] is before
    assert set(vars(base())) == names
    assert not isinstance(loader("AutoTokenizer").from_pretrained(folder), WrappedTokenizer)


def test_the_patched_method_keeps_its_signature_and_docstring() -> None:
    kind = loader("PreTrainedTokenizerFast")
    signature, doc = inspect.signature(kind.from_pretrained), kind.from_pretrained.__doc__
    patch_transformers(CONFIG)
    assert isinstance(inspect.getattr_static(kind, "from_pretrained"), classmethod)
    assert kind.from_pretrained.__self__ is kind
    assert inspect.signature(kind.from_pretrained) == signature
    assert kind.from_pretrained.__doc__ == doc
    assert kind.from_pretrained.__qualname__ == "PreTrainedTokenizerBase.from_pretrained"


def test_tokenizers_loaded_before_stay_plain_and_wrapped_ones_stay_wrapped(folder: Path) -> None:
    plain = loader("AutoTokenizer").from_pretrained(folder)
    kind, state = type(plain), dict(vars(plain))
    patch_transformers(CONFIG)
    wrapped = loader("AutoTokenizer").from_pretrained(folder)
    assert type(plain) is kind
    assert vars(plain) == state
    unpatch_transformers()
    assert isinstance(wrapped, WrappedTokenizer)
    for _ in range(2):
        assert wrapped("hello world").data == plain("hello world").data
    assert wrapped.cache_stats().l0.hits == 1


def test_patching_twice_needs_the_same_config(folder: Path) -> None:
    patch_transformers(CONFIG)
    installed = vars(base())["from_pretrained"]
    patch_transformers(CONFIG)
    patch_transformers()
    assert vars(base())["from_pretrained"] is installed
    wrapped = loader("AutoTokenizer").from_pretrained(folder)
    assert wrapped._tokcache.config == CONFIG
    with pytest.raises(InvalidConfig, match=r"=77,.*=78,.*unpatch_transformers\(\) first"):
        patch_transformers(tokcache.CacheConfig(engine="tokenizers", l0_max_entries=78))
    assert vars(base())["from_pretrained"] is installed
    unpatch_transformers()
    patch_transformers()
    patch_transformers(tokcache.CacheConfig())
    with pytest.raises(InvalidConfig):
        patch_transformers(CONFIG)


@pytest.mark.parametrize("config", [5, {}, tokcache.CacheConfig])
def test_an_invalid_config_is_refused(config: Any) -> None:
    with pytest.raises(InvalidConfig, match="CacheConfig or None"):
        patch_transformers(config)
    patch_transformers()
    with pytest.raises(InvalidConfig, match="CacheConfig or None"):
        patch_transformers(config)


def test_an_overridden_from_pretrained_is_called(folder: Path) -> None:
    class Greeting(loader("PreTrainedTokenizerFast")):  # type: ignore[misc]
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            made = super().from_pretrained(*args, **kwargs)
            made.add_tokens(["hello world"])
            return made

    own_method = vars(Greeting)["from_pretrained"]
    plain = Greeting.from_pretrained(folder)
    patch_transformers(CONFIG)
    assert vars(Greeting)["from_pretrained"] is own_method
    wrapped = Greeting.from_pretrained(folder)
    assert isinstance(wrapped, WrappedTokenizer)
    assert isinstance(wrapped, Greeting)
    assert wrapped("hello world").data == plain("hello world").data
    assert len(wrapped) == len(plain)


def test_a_tokenizer_that_its_class_wrapped_keeps_its_config(folder: Path) -> None:
    own = tokcache.CacheConfig(engine="tokenizers", l0_max_entries=3)

    class Wrapping(loader("PreTrainedTokenizerFast")):  # type: ignore[misc]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return tokcache.wrap(loader("PreTrainedTokenizerFast")(*args, **kwargs), own)

    patch_transformers(CONFIG)
    assert Wrapping.from_pretrained(folder)._tokcache.config == own


def test_a_slow_tokenizer_is_loaded_plain_and_logged_once(
    slow_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(loader("ByT5Tokenizer")):  # type: ignore[misc]
        pass

    n_wrapped = load_stats().n_wrapped
    patch_transformers(CONFIG)
    assert type(loader("AutoTokenizer").from_pretrained(slow_folder)) is loader("ByT5Tokenizer")
    with caplog.at_level(logging.WARNING, "tokcache"):
        for _ in range(3):
            assert type(Slow.from_pretrained(slow_folder)) is Slow
    assert load_stats().unwrapped[Slow.__qualname__] == 3
    assert load_stats().n_wrapped == n_wrapped
    [said] = [one.getMessage() for one in caplog.records if Slow.__qualname__ in one.getMessage()]
    assert "without a cache: UnsupportedTokenizer" in said


def test_a_class_that_can_not_be_subclassed_is_loaded_plain(folder: Path) -> None:
    class Final(loader("PreTrainedTokenizerFast")):  # type: ignore[misc]
        def __init_subclass__(cls) -> None:
            raise TypeError("Final has no subclasses")

    patch_transformers(CONFIG)
    made = Final.from_pretrained(folder)
    assert type(made) is Final
    assert load_stats().unwrapped[Final.__qualname__] == 1


def test_the_class_of_a_wrapped_tokenizer_loads_wrapped_only_while_patched(folder: Path) -> None:
    kind = loader("PreTrainedTokenizerFast")
    earlier: Any = tokcache.wrap(kind.from_pretrained(folder), CONFIG)
    patch_transformers(CONFIG)
    for wrapped in (earlier, kind.from_pretrained(folder)):
        assert isinstance(type(wrapped).from_pretrained(folder), WrappedTokenizer)
    unpatch_transformers()
    assert not isinstance(type(earlier).from_pretrained(folder), WrappedTokenizer)


def test_a_later_patch_by_another_library_is_kept(folder: Path) -> None:
    """Restoring the original method would also remove the other patch."""
    original = vars(base())["from_pretrained"]
    patch_transformers(CONFIG)
    ours = vars(base())["from_pretrained"]
    seen: list[Any] = []

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(ours.__get__(None, cls)(*args, **kwargs))
        return seen[-1]

    theirs = classmethod(from_pretrained)
    base().from_pretrained = theirs
    try:
        loader("AutoTokenizer").from_pretrained(folder)
        unpatch_transformers()
        assert vars(base())["from_pretrained"] is theirs
        loader("AutoTokenizer").from_pretrained(folder)
        patch_transformers()
        wrapped = loader("AutoTokenizer").from_pretrained(folder)
        unpatch_transformers()
        assert vars(base())["from_pretrained"] is theirs
    finally:
        base().from_pretrained = original
    assert [isinstance(one, WrappedTokenizer) for one in seen] == [True, False, False]
    assert isinstance(wrapped, WrappedTokenizer)


def test_tokenizers_saved_or_pickled_while_patched_load_plain_after_unpatching(
    folder: Path, tmp_path: Path
) -> None:
    patch_transformers(CONFIG)
    wrapped = loader("AutoTokenizer").from_pretrained(folder)
    wrapped.add_tokens(["hello world"])
    wrapped.save_pretrained(tmp_path)
    again = loader("AutoTokenizer").from_pretrained(tmp_path)
    data = pickle.dumps(wrapped)
    unpatch_transformers()
    pickled = pickle.loads(data)  # noqa: S301 (our own)
    plain = loader("AutoTokenizer").from_pretrained(tmp_path)
    assert isinstance(again, WrappedTokenizer)
    assert type(pickled) is type(plain)
    for text in TEXTS:
        assert wrapped(text).data == again(text).data == plain(text).data == pickled(text).data


def test_loaded_tokenizers_are_listed_while_they_are_referenced(folder: Path) -> None:
    patch_transformers(CONFIG)
    gc.collect()
    before = patch.loaded()
    wrapped = loader("AutoTokenizer").from_pretrained(folder)
    [new] = [one for one in patch.loaded() if one not in before]
    assert new == (str(folder), wrapped._tokcache)
    view, name = wrapped.scoped("a"), new[0]
    del wrapped, new
    gc.collect()
    assert [one[0] for one in patch.loaded() if one not in before] == [name]
    del view
    gc.collect()
    assert patch.loaded() == before


def test_threads_may_load_while_others_patch_and_unpatch(folder: Path) -> None:
    plain = loader("AutoTokenizer").from_pretrained(folder)
    original = vars(base())["from_pretrained"]
    expected = plain("hello world").data
    stop = threading.Event()

    def toggle() -> int:
        n = 0
        while not stop.is_set():
            patch_transformers(CONFIG)
            unpatch_transformers()
            n += 1
        return n

    def load(_: int) -> bool:
        made = loader("AutoTokenizer").from_pretrained(folder)
        assert made("hello world").data == expected
        return isinstance(made, WrappedTokenizer)

    with ThreadPoolExecutor(6) as pool:
        toggling = [pool.submit(toggle) for _ in range(2)]
        try:
            assert len(list(pool.map(load, range(40)))) == 40
        finally:
            stop.set()
        assert sum(one.result() for one in toggling) > 0
    assert vars(base())["from_pretrained"] is original


def test_a_forked_child_can_patch_while_the_parent_holds_the_lock(folder: Path) -> None:
    with patch._state.lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this test forks while threads run
        child = os.fork()
        if child == 0:
            patch_transformers(CONFIG)
            made = loader("AutoTokenizer").from_pretrained(folder)
            os._exit(0 if isinstance(made, WrappedTokenizer) else 1)
    assert os.waitpid(child, 0)[1] == 0


LOAD_PATCHED = """
import sys
from tokcache.text.wrappers.patch import load_stats, patch_transformers, unpatch_transformers
unpatch_transformers()
assert "transformers" not in sys.modules
patch_transformers()
from transformers import AutoTokenizer
tok = AutoTokenizer.from_pretrained(sys.argv[1])
assert tok("hello world").data == tok("hello world").data
print(tok.cache_stats().l0.hits, load_stats().n_wrapped)
"""

PATCH_WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
from tokcache.text.wrappers.patch import patch_transformers
try:
    patch_transformers()
except ImportError as error:
    print(type(error).__name__, error)
"""


def run_in_new_process(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )


def test_transformers_is_imported_by_patching_not_by_unpatching(folder: Path) -> None:
    done = run_in_new_process(LOAD_PATCHED, str(folder))
    assert done.stdout.split() == ["1", "1"]
    assert "Traceback" not in done.stderr
    assert "tokcache" not in done.stderr or not is_native()  # the reference one is announced


def test_without_transformers_the_error_names_the_extra_to_install() -> None:
    assert run_in_new_process(PATCH_WITHOUT_TRANSFORMERS).stdout.startswith(
        "MissingExtra patch_transformers needs transformers"
    )
    assert "pip install 'tokcache[hf]'" in run_in_new_process(PATCH_WITHOUT_TRANSFORMERS).stdout
