"""Code that needs the Rust tokenizer: methods that accept no wrapper, and attributes set on it."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from tokenizers import Encoding, Tokenizer, tools
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE

import tokcache
from tests.text.tokenizers_made import MADE, TEXTS, fast
from tokcache.errors import UnsupportedTokenizer
from tokcache.text.tokenizer import WrappedTokenizer
from tokcache.text.wrappers.patch import load_stats
from tokcache.text.wrappers.tokenizers import _INSISTING

CONFIG = tokcache.CacheConfig(engine="tokenizers")
MODULES = ("decoders", "models", "normalizers", "pre_tokenizers", "processors", "trainers")


@pytest.fixture
def plain() -> Any:
    return fast(MADE["byte_level_bpe"](), pad_token="</s>")  # noqa: S106 (no password)


@pytest.fixture
def wrapped(plain: Any) -> Any:
    return tokcache.wrap(plain, CONFIG)


# ---- methods that accept only the Rust object


def native_classes() -> Iterator[type[Any]]:
    for name in MODULES:
        module = importlib.import_module(f"tokenizers.{name}")
        for found in vars(module).values():
            if isinstance(found, type) and found.__module__.startswith("tokenizers"):
                yield found


def test_every_library_method_that_takes_a_tokenizer_is_listed() -> None:
    found = set()
    for kind in native_classes():
        for name, method in inspect.getmembers(kind):
            plain = getattr(method, "__wrapped__", method)
            signature = getattr(plain, "__text_signature__", None) or ""
            if "tokenizer" in signature.replace("pre_tokenizer", ""):
                found.add((kind.__module__, kind.__name__, name))
    assert ("tokenizers.decoders", "DecodeStream", "step") in found
    assert found <= set(_INSISTING)


@pytest.mark.parametrize("scope", [None, "tenant-a"])
def test_decode_stream_accepts_a_wrapper(plain: Any, wrapped: Any, scope: str | None) -> None:
    for text in TEXTS:
        ids = plain(text)["input_ids"]
        pieces = []
        for tokenizer in (
            plain._tokenizer,
            wrapped.scoped(scope)._tokenizer,
            wrapped.backend_tokenizer.scoped(scope),
        ):
            stream = DecodeStream(skip_special_tokens=False)
            pieces.append([stream.step(tokenizer, one) for one in ids])
        assert pieces[0] == pieces[1] == pieces[2]


def test_decode_stream_sees_a_token_added_through_the_wrapper(wrapped: Any) -> None:
    wrapped.add_tokens(["<new>"])
    stream = DecodeStream(skip_special_tokens=False)
    assert stream.step(wrapped._tokenizer, wrapped.convert_tokens_to_ids("<new>")) == "<new>"


def test_decode_stream_still_refuses_other_objects() -> None:
    tokcache.wrap(MADE["unigram"](), CONFIG)
    with pytest.raises(TypeError):
        DecodeStream().step("no tokenizer", 1)  # type: ignore[arg-type]


def train_and_encode(tokenizer: Any) -> Any:
    trainers: Any = importlib.import_module("tokenizers.trainers")
    trainer = trainers.ParityBpeTrainer(num_merges=40, show_progress=False)
    trainer.train_from_iterator(tokenizer, [["hello world"] * 4, ["русский текст"] * 4])
    return tokenizer.encode("hello world").ids


@pytest.mark.parametrize("is_rust", [True, False])
def test_methods_have_the_signatures_of_the_plain_class(
    plain: Any, wrapped: Any, is_rust: bool
) -> None:
    # Splitters look for `add_special_tokens` in the signature of `encode` before they pass it.
    if is_rust:
        plain, wrapped = plain._tokenizer, wrapped._tokenizer
    names = [
        name for name in dir(plain) if not name.startswith("_") and callable(getattr(plain, name))
    ]
    assert "encode" in names
    for name in names:
        assert parameters(getattr(wrapped, name)) == parameters(getattr(plain, name)), name


def parameters(method: Any) -> list[inspect.Parameter]:
    # The signature of a bound method of the Rust class may contain `self`.
    found = inspect.signature(method).parameters.values()
    return [parameter for parameter in found if parameter.name != "self"]


def test_training_through_a_wrapper_clears_its_cache() -> None:
    if not hasattr(importlib.import_module("tokenizers.trainers"), "ParityBpeTrainer"):
        pytest.skip("this release of tokenizers has no trainer that takes a tokenizer")
    plain, source = MADE["byte_level_bpe"](), MADE["byte_level_bpe"]()
    wrapped = tokcache.wrap(source, CONFIG)
    before = wrapped.token_ids("hello world").tolist()
    assert train_and_encode(wrapped) == train_and_encode(plain) != before
    assert wrapped.token_ids("hello world").tolist() == plain.encode("hello world").ids
    assert source.encode("hello world").ids == before


def test_the_encoding_visualizer_accepts_a_wrapper() -> None:
    plain = MADE["byte_level_bpe"]()
    visualizer: Any = tools.visualizer.EncodingVisualizer
    pages = [
        visualizer(tok, default_to_notebook=False)("hello <s> world")
        for tok in (plain, tokcache.wrap(plain, CONFIG))
    ]
    assert pages[0] == pages[1]


# ---- attributes set on the Rust object


def wrap_decode(tokenizer: Any) -> None:
    """Replace `decode` as CLIPTokenizer does, by a closure over the original method."""
    original = tokenizer.decode
    suffix = "o"

    def decode(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs).replace(suffix, "0")

    tokenizer.decode = decode


def wrap_decode_by_partial(tokenizer: Any) -> None:
    tokenizer.decode = partial(tokenizer.decode, skip_special_tokens=False)


def wrap_decode_by_default(tokenizer: Any) -> None:
    def decode(ids: Any, original: Any = tokenizer.decode, *, end: str = "!", **kwargs: Any) -> Any:
        return original(ids, **kwargs) + end

    tokenizer.decode = decode


REPLACED = (wrap_decode, wrap_decode_by_partial, wrap_decode_by_default)


@pytest.mark.parametrize("replace", REPLACED)
def test_a_replaced_decode_is_rebound_to_the_copy(replace: Callable[[Any], None]) -> None:
    plain = MADE["byte_level_bpe"]()
    replace(plain)
    wrapped: Any = tokcache.wrap(plain, CONFIG)
    for _ in range(2):
        ids = wrapped.token_ids("hello <s> world <new>").tolist()
        assert ids == plain.encode("hello <s> world <new>").ids
        assert wrapped.decode(ids) == plain.decode(ids) == wrapped.unwrap().decode(ids)
        for tok in (plain, wrapped):  # the replaced method must see the new token
            tok.add_tokens(["<new>"])
    assert not wrapped.cache_stats().bypasses


def own_encode_batch(tokenizer: Any) -> None:
    original = tokenizer.encode_batch

    def encode_batch(texts: Any, *args: Any, **kwargs: Any) -> list[Encoding]:
        found: list[Encoding] = original([text.upper() for text in texts], *args, **kwargs)
        return found

    tokenizer.encode_batch = encode_batch


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_encode_batch_bypasses_the_cache(plain: Any, when: str) -> None:
    if when == "before":
        own_encode_batch(plain._tokenizer)
    wrapped = tokcache.wrap(plain, CONFIG)
    if when == "after":
        wrapped("hello world")
        for tok in (plain, wrapped):
            own_encode_batch(tok._tokenizer)
    for _ in range(2):
        assert wrapped("hello world").data == plain("hello world").data
        assert wrapped.token_ids("hello world").tolist() == plain("hello world")["input_ids"]
    assert wrapped.cache_stats().bypasses == {"own_encode_batch": 4}
    if when == "after":
        for tok in (plain, wrapped):
            del tok._tokenizer.encode_batch
        wrapped("hello world")
        assert wrapped("hello world").data == plain("hello world").data
        assert wrapped.cache_stats().l0.hits


class Decoder:
    """A callable that holds the tokenizer in an attribute, where it can't be rebound."""

    def __init__(self, tokenizer: Any) -> None:
        self.original = tokenizer.decode

    def __call__(self, ids: Any, **kwargs: Any) -> Any:
        return "decoded: " + self.original(ids, **kwargs)


def test_a_method_that_can_not_be_rebound_bypasses_the_cache(plain: Any) -> None:
    plain._tokenizer.decode = Decoder(plain._tokenizer)
    wrapped = tokcache.wrap(plain, CONFIG)
    plain.add_tokens(["<new>"])
    ids = plain("hello <new> world")["input_ids"]
    for _ in range(2):
        assert wrapped("hello <new> world")["input_ids"] == ids
        assert wrapped.decode(ids) == plain.decode(ids)
    assert wrapped.cache_stats().bypasses == {"own_decode": 2}


_original: Any = None


def decode_that_refers_to_itself(tokenizer: Any) -> None:
    def decode(ids: Any, **kwargs: Any) -> Any:
        return decode if ids is None else original(ids, **kwargs)

    original = tokenizer.decode
    tokenizer.decode = decode


def decode_that_uses_a_global(tokenizer: Any) -> None:
    global _original  # noqa: PLW0603 (it is the case)
    _original = tokenizer.decode

    def decode(ids: Any, **kwargs: Any) -> Any:
        return _original(ids, **kwargs)

    tokenizer.decode = decode


@pytest.mark.parametrize("replace", [decode_that_refers_to_itself, decode_that_uses_a_global])
def test_a_function_that_refers_to_itself_or_a_global_is_not_rebound(
    plain: Any, replace: Callable[[Any], None]
) -> None:
    replace(plain._tokenizer)
    wrapped = tokcache.wrap(plain, CONFIG)
    assert wrapped("hello").data == plain("hello").data
    assert wrapped.decode([5, 6]) == plain.decode([5, 6])
    assert wrapped.cache_stats().bypasses == {"own_decode": 1}


def test_attributes_that_hide_no_method_are_kept(plain: Any) -> None:
    plain._tokenizer.remark = remark = ["kept"]
    wrapped = tokcache.wrap(plain, CONFIG)
    assert wrapped._tokenizer.remark is remark
    assert wrapped.unwrap()._tokenizer.remark is remark
    wrapped("hello")
    wrapped._tokenizer.another = 1
    wrapped("hello")
    assert wrapped.cache_stats().l0.hits == 1
    del wrapped._tokenizer.another
    with pytest.raises(AttributeError):
        wrapped._tokenizer.another  # noqa: B018


def clip() -> Any:
    from transformers import CLIPTokenizer  # noqa: PLC0415 (seconds to import)

    words = ["<|startoftext|>", "<|endoftext|>", *"helowrd"]
    words += [f"{letter}</w>" for letter in "helowrd"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


def test_clip_decodes_as_without_the_cache() -> None:
    plain = clip()
    assert "decode" in vars(plain._tokenizer)
    wrapped = tokcache.wrap(plain, CONFIG)
    ids = plain("hello world")["input_ids"]
    assert wrapped("hello world")["input_ids"] == ids
    assert wrapped.decode(ids, skip_special_tokens=True) == plain.decode(
        ids, skip_special_tokens=True
    )
    assert "</w>" not in wrapped.decode(ids)
    assert not wrapped.cache_stats().bypasses


def test_a_subclass_of_a_class_that_replaces_methods_in_init_is_wrapped() -> None:
    kind = type(tokcache.wrap(clip(), CONFIG))

    class Own(kind):  # type: ignore[misc, valid-type]
        pass

    own, other = Own(), clip().__class__()
    assert isinstance(own, WrappedTokenizer)
    assert own.decode([0, 1]) == other.decode([0, 1])


# ---- another library's object instead of the Rust object


def test_the_error_for_a_shim_names_it_and_its_undo_function(plain: Any) -> None:
    fastokens = pytest.importorskip("fastokens", reason="the extra `engines` is not installed")
    shim = importlib.import_module("fastokens._compat")._TokenizerShim
    assert hasattr(fastokens, "unpatch_transformers")
    vars(plain)["_tokenizer"] = shim(plain._tokenizer)
    with pytest.raises(UnsupportedTokenizer, match=r"_TokenizerShim.*unpatch_transformers\(\)"):
        tokcache.wrap(plain, CONFIG)
    vars(plain)["_tokenizer"] = object()
    with pytest.raises(UnsupportedTokenizer, match=r"builtins\.object, not a tokenizers\.Token"):
        tokcache.wrap(plain, CONFIG)


@pytest.mark.parametrize("first", ["fastokens", "tokcache"])
def test_fastokens_and_tokcache_patches_together_give_correct_ids(
    first: str, plain: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fastokens = pytest.importorskip("fastokens", reason="the extra `engines` is not installed")
    from transformers import AutoTokenizer  # noqa: PLC0415 (seconds to import)

    plain.save_pretrained(tmp_path)
    before = load_stats()
    patches = [fastokens.patch_transformers, partial(tokcache.patch_transformers, CONFIG)]
    for patch in patches if first == "fastokens" else reversed(patches):
        patch()
    try:
        with caplog.at_level(logging.WARNING, logger="tokcache"):
            made = AutoTokenizer.from_pretrained(tmp_path)
    finally:
        tokcache.unpatch_transformers()
        fastokens.unpatch_transformers()
    assert [made(text)["input_ids"] for text in TEXTS] == [
        plain(text)["input_ids"] for text in TEXTS
    ]
    # The library that patched last loads the tokenizer; the other one reports that it can't.
    assert not isinstance(made, WrappedTokenizer)
    unwrapped = load_stats().unwrapped.get("TokenizersBackend", 0)
    if first == "fastokens":
        assert unwrapped == before.unwrapped.get("TokenizersBackend", 0) + 1
    else:
        assert "fastokens.unpatch_transformers()" in caplog.text


def test_assigning_a_backend_of_another_library_unwraps_the_tokenizer(
    plain: Any, wrapped: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Foreign:
        """An encoder of another library."""

        def __init__(self, rust: Tokenizer) -> None:
            self._rust = rust

        def __getattr__(self, name: str) -> Any:
            return getattr(self._rust, name)

    wrapped("hello")
    with caplog.at_level(logging.WARNING, logger="tokcache"):
        wrapped._tokenizer = Foreign(MADE["byte_level_bpe"]())
    assert type(wrapped) is type(plain)
    assert "Foreign, not a tokenizers.Tokenizer" in caplog.text
    assert isinstance(wrapped._tokenizer, Foreign)
    assert wrapped.decode([5, 6]) == plain.decode([5, 6])


def test_assigning_a_model_to_the_rust_object_takes_effect(plain: Any, wrapped: Any) -> None:
    wrapped("hello world")
    for tok in (plain, wrapped):
        tok._tokenizer.model = BPE()
    assert wrapped("hello world").data == plain("hello world").data
