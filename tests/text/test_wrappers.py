"""A wrapped tokenizer behaves as the plain one does: its class, its methods, its errors."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import logging
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Encoding,
    NormalizedString,
    PreTokenizedString,
    Tokenizer,
    normalizers,
    pre_tokenizers,
)
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

import tokcache
from tests.text.tokenizers_made import MADE, TEXTS, fast
from tokcache.errors import (
    InvalidConfig,
    InvalidScope,
    InvalidText,
    MissingFile,
    UnsupportedTokenizer,
)
from tokcache.text.tokenizer import WrappedTokenizer

CHAT = [{"role": "user", "content": "hello <s> world"}, {"role": "assistant", "content": "fox"}]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
LONE_SURROGATE = "a\ud800b"


@pytest.fixture
def plain() -> Any:
    made = fast(MADE["byte_level_bpe"](), pad_token="</s>", model_max_length=25)  # noqa: S106
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def wrapped(plain: Any) -> Any:
    return tokcache.wrap(plain)


def outcome(ask: Callable[[], Any]) -> Any:
    """Return the answer, or the class and message of the error."""
    try:
        answer = ask()
    except Exception as error:  # noqa: BLE001 (any exception of the plain tokenizer)
        return type(error), str(error)
    return type(answer), answer.data if hasattr(answer, "encodings") else answer


def pickled(made: Any) -> Any:
    return pickle.loads(pickle.dumps(made))  # noqa: S301 (our own)


@pytest.mark.parametrize("kind", ["tokenizers", "transformers"])
def test_repr_shows_the_wrapped_tokenizer_and_the_cache_sizes(kind: str) -> None:
    raw: Any = MADE["byte_level_bpe"]()
    plain = raw if kind == "tokenizers" else fast(raw)
    wrapped: Any = tokcache.wrap(plain, tokcache.CacheConfig(engine="tokenizers"))
    wrapped.token_ids("a secret of two words", scope="tenant-a")
    stats = wrapped.cache_stats()
    n_segments = stats.l1.n_chunks + stats.l1.n_segments
    start = (
        f"<tokcache.wrap of {plain!r}: 1 texts and {n_segments} segments held, "
        f"{stats.l0.n_bytes + stats.l1.n_bytes:,} bytes"
    )
    assert n_segments > 0
    assert repr(wrapped) == f"{start}>"
    assert repr(wrapped.scoped("tenant-a")) == f"{start}, scope 'tenant-a'>"
    assert repr(wrapped.unwrap()) == repr(plain)
    assert "secret" not in repr(wrapped)


# ---- tokenizers.Tokenizer


def test_the_wrapper_is_a_tokenizer_to_isinstance() -> None:
    wrapped: Any = tokcache.wrap(MADE["unigram"]())
    assert isinstance(wrapped, Tokenizer)
    assert isinstance(wrapped, WrappedTokenizer)
    assert tokcache.wrap(wrapped) is wrapped
    assert {"encode", "token_ids", "decode", "save"} <= set(dir(wrapped))


@pytest.mark.parametrize("kind", MADE)
def test_methods_of_the_plain_tokenizer_work_on_the_wrapper(kind: str, tmp_path: Path) -> None:
    plain: Any = MADE[kind]()
    wrapped = tokcache.wrap(plain)
    assert wrapped.to_str() == plain.to_str()
    assert str(wrapped) == str(plain)
    assert repr(wrapped) == f"<tokcache.wrap of {plain!r}: 0 texts and 0 segments held, 0 bytes>"
    assert wrapped.get_vocab() == plain.get_vocab()
    assert wrapped.decode([1, 2, 3]) == plain.decode([1, 2, 3])
    assert wrapped.num_special_tokens_to_add(False) == plain.num_special_tokens_to_add(False)
    assert (
        wrapped.post_processor.__getstate__() == plain.post_processor.__getstate__()
        if (plain.post_processor)
        else wrapped.post_processor is None
    )
    wrapped.save(str(tmp_path / "t.json"))
    assert Tokenizer.from_file(str(tmp_path / "t.json")).to_str() == plain.to_str()
    for text in TEXTS:
        own, other = wrapped.encode(text, "pair"), plain.encode(text, "pair")
        assert isinstance(own, Encoding)
        assert (own.ids, own.offsets, own.tokens) == (other.ids, other.offsets, other.tokens)
    for method in ("encode_batch", "encode_batch_fast"):
        got = getattr(wrapped, method)(TEXTS, add_special_tokens=False)
        assert [one.ids for one in got] == [
            one.ids for one in getattr(plain, method)(TEXTS, add_special_tokens=False)
        ]
    assert wrapped.cache_stats().bypasses == {"encoding_objects": len(TEXTS) + 2}
    with pytest.raises(AttributeError):
        wrapped.no_such_method()
    wrapped.remark = plain.remark = "kept, as the plain one keeps it"
    assert wrapped.remark == plain.remark


def test_truncation_and_padding_apply_to_encode_but_not_to_token_ids() -> None:
    wrapped = tokcache.wrap(MADE["byte_level_bpe"]())
    whole = wrapped.token_ids("hello world hello").tolist()
    wrapped.enable_truncation(4)
    wrapped.enable_padding(length=9)
    assert len(wrapped.encode("hello world hello").ids) == 9
    assert wrapped.token_ids("hello world hello").tolist() == whole
    wrapped.no_truncation()
    wrapped.no_padding()
    assert wrapped.encode("hello world hello").ids == whole
    assert wrapped.cache_stats().invalidations == 0


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_copies_of_a_wrapper_are_wrapped_and_its_pickle_is_plain(
    again: Callable[[Any], Any],
) -> None:
    wrapped = tokcache.wrap(MADE["word_piece"]())
    wrapped.add_tokens(["hello"])
    made = again(wrapped)
    assert isinstance(made, WrappedTokenizer) == (again is not pickled)
    assert isinstance(made, Tokenizer)
    assert made.to_str() == wrapped.to_str()
    made.add_tokens(["world"])
    assert made.to_str() != wrapped.to_str()


def test_a_scoped_wrapper_shares_statistics_but_not_entries() -> None:
    wrapped = tokcache.wrap(MADE["unigram"]())
    view = wrapped.scoped("a")
    assert type(view) is type(wrapped)
    view.token_ids("hello")
    assert wrapped.cache_stats() == view.cache_stats()
    assert wrapped.cache_stats().l0.n_entries == 1
    assert wrapped.token_ids("hello") == view.token_ids("hello")
    assert wrapped.cache_stats().encoded_texts == 2
    wrapped.token_ids("hello", scope="a")
    view.scoped(None).token_ids("hello")
    assert wrapped.cache_stats().encoded_texts == 2
    with pytest.raises(InvalidScope):
        wrapped.scoped(3)


# ---- tokenizers that are never cached


class Upper:
    def normalize(self, text: NormalizedString) -> None:
        text.uppercase()


class Spaces:
    def pre_tokenize(self, text: PreTokenizedString) -> None:
        text.split(lambda _, one: one.split(" ", "removed"))


def with_dropout() -> Tokenizer:
    made = MADE["byte_level_bpe"]()
    made.model.dropout = 1.0  # drops every merge: dropout that always gives the same ids
    return made


def with_sampling() -> Tokenizer:
    made = MADE["unigram"]()
    made.model.alpha = 0.5
    made.model.nbest_size = 1
    return made


def with_python_component() -> Tokenizer:
    made: Any = MADE["word_level"]()
    made.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Spaces())
    return made  # type: ignore[no-any-return]


def with_empty_token() -> Tokenizer:
    """Return one with a token that BertNormalizer empties, so the search for it may not end."""
    made: Any = MADE["word_level"]()
    made.normalizer = normalizers.BertNormalizer()
    made.add_tokens([AddedToken("\0", rstrip=True), AddedToken("\0\u4f60>")])
    return made  # type: ignore[no-any-return]


UNCACHED = {
    "bpe_dropout": with_dropout,
    "unigram_sampling": with_sampling,
    "python_component": with_python_component,
    "empty_added_token": with_empty_token,
}


@pytest.mark.parametrize("reason", UNCACHED)
def test_uncacheable_tokenizers_are_bypassed_and_counted(reason: str) -> None:
    plain = UNCACHED[reason]()
    expected = plain.encode("hello big world").ids
    wrapped = tokcache.wrap(plain)
    for _ in range(3):
        assert wrapped.token_ids("hello big world").tolist() == expected
    wrapped.enable_truncation(2)
    assert wrapped.token_ids_batch(["hello big world"])[0].tolist() == expected
    assert wrapped.truncation["max_length"] == 2
    assert wrapped.cache_stats().bypasses == {reason: 4}
    assert wrapped.cache_stats().l0.n_entries == 0


@pytest.mark.parametrize("reason", UNCACHED)
def test_uncacheable_backends_of_transformers_are_bypassed_and_counted(reason: str) -> None:
    plain = fast(MADE["word_level"]())
    plain._tokenizer = UNCACHED[reason]()
    wrapped = tokcache.wrap(plain)
    for _ in range(2):
        assert wrapped("hello big world").data == plain("hello big world").data
    assert wrapped.token_ids("hello big world").tolist() == plain.encode("hello big world")
    assert wrapped.cache_stats().bypasses == {reason: 3}


# ---- transformers


def test_the_wrapped_class_has_the_name_and_signatures_of_the_plain_one(
    plain: Any, wrapped: Any
) -> None:
    own, other = type(wrapped), type(plain)
    assert isinstance(wrapped, other)
    assert (own.__name__, own.__module__, own.__doc__) == (
        other.__name__,
        other.__module__,
        other.__doc__,
    )
    assert inspect.signature(wrapped.__call__) == inspect.signature(plain.__call__)
    assert inspect.signature(wrapped.encode) == inspect.signature(plain.encode)
    assert tokcache.wrap(wrapped) is wrapped
    assert repr(plain) in repr(wrapped)
    assert len(wrapped) == len(plain)
    assert isinstance(wrapped.backend_tokenizer, Tokenizer)
    with pytest.raises(AttributeError):
        wrapped.no_such_attribute  # noqa: B018


FROM_IDS: list[dict[str, Any]] = [
    {"truncation": True, "max_length": 4},
    {"max_length": 4},
    {"truncation": True},
    {"padding": "max_length", "max_length": 30},
    {"padding": True},
    {"padding": True, "pad_to_multiple_of": 8},
    {"return_tensors": "np", "padding": True},
    {"return_special_tokens_mask": True},
    {"return_token_type_ids": True},
    {"return_attention_mask": False},
    {"return_length": True},
    {"verbose": False},
    {"tokenizer_kwargs": {"padding": True}},
]

ARGUMENTS: list[dict[str, Any]] = [
    *FROM_IDS,
    {"text_pair": "hello"},
    {"text_target": "hello"},
    {"padding": 0},
    {"return_offsets_mapping": True},
    {"return_overflowing_tokens": True, "truncation": True, "max_length": 4, "stride": 1},
    {"is_split_into_words": True},
    {"split_special_tokens": True},
    {"add_special_tokens": 0},
    {"add_special_tokens": None},
    {"truncation": True, "max_length": 2},
    {"truncation": True, "max_length": True},
    {"truncation": "only_second", "max_length": 4},
    {"padding": "max_length", "max_length": 0},
    {"padding": True, "padding_side": "up"},
    {"return_tensors": "xx"},
    {"return_length": 1},
    {"no_such_argument": 1},
    {"truncation": "no such strategy"},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_every_argument_gives_the_result_of_the_plain_tokenizer(
    plain: Any, wrapped: Any, arguments: dict[str, Any]
) -> None:
    for text in ("hello <s> world, quick brown", ["hello world", "fox", "the lazy dog"]):
        for method in ("__call__", "encode"):
            own = outcome(partial(getattr(wrapped, method), text, **arguments))
            other = outcome(partial(getattr(plain, method), text, **arguments))
            assert str(own) == str(other)
            assert vars(wrapped)["_tokenizer"].truncation == plain._tokenizer.truncation
            assert vars(wrapped)["_tokenizer"].padding == plain._tokenizer.padding
        assert plain(text).data == wrapped(text).data
        assert vars(wrapped)["_tokenizer"].truncation == plain._tokenizer.truncation
        assert vars(wrapped)["_tokenizer"].padding == plain._tokenizer.padding
    other_reasons = {"other_argument", "input_type", "encoding_objects", "truncation", "padding"}
    assert set(wrapped.cache_stats().bypasses) <= {*arguments, *other_reasons}


@pytest.mark.parametrize("arguments", FROM_IDS, ids=str)
def test_cached_ids_serve_calls_with_other_arguments(
    wrapped: Any, arguments: dict[str, Any]
) -> None:
    texts = ["hello <s> world, quick brown", "hello world"]
    wrapped(texts)
    before = wrapped.cache_stats()
    for text in (*texts, texts):
        wrapped(text, **arguments)
    after = wrapped.cache_stats()
    assert after.l0.hits == before.l0.hits + 4
    assert after.encoded_texts == before.encoded_texts == 2
    assert after.bypasses == {}


BAD: list[Any] = [
    None,
    3,
    b"bytes",
    LONE_SURROGATE,
    [LONE_SURROGATE],
    ["x", LONE_SURROGATE],
    [],
    [3],
    ["x", 3],
    [None],
    {},
    "",
    (),
]


@pytest.mark.parametrize("bad", BAD, ids=ascii)
def test_bad_input_gives_the_errors_of_the_plain_tokenizer(
    plain: Any, wrapped: Any, bad: Any
) -> None:
    for _ in range(2):
        assert outcome(lambda: wrapped(bad))[1] == outcome(lambda: plain(bad))[1]
        assert outcome(lambda: wrapped.encode(bad)) == outcome(lambda: plain.encode(bad))
    n_entries = wrapped.cache_stats().l0.n_entries
    assert n_entries == (1 if bad == "" else 0)
    assert wrapped("hello").data == plain("hello").data


class _OwnCall(PreTrainedTokenizerFast):
    """Overrides `_encode_plus`, so that its answers are not cached."""

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus(*args, **kwargs)


def _wrappers() -> dict[str, tuple[Any, Any]]:
    made: dict[str, tuple[Any, Any]] = {}
    make: Any = _OwnCall
    for kind in MADE:
        made[kind] = MADE[kind](), tokcache.wrap(MADE[kind]())
        one = fast(MADE[kind](), pad_token="[P]")  # noqa: S106
        one.chat_template = TEMPLATE
        made[f"fast {kind}"] = one, tokcache.wrap(one)
    own = make(tokenizer_object=MADE["unigram"](), pad_token="[P]")  # noqa: S106
    own.chat_template = TEMPLATE
    made["own call"] = own, tokcache.wrap(own)
    return made


@pytest.mark.parametrize("kind", [*MADE, *(f"fast {kind}" for kind in MADE), "own call"])
def test_token_ids_refuses_a_lone_surrogate_and_names_its_position(kind: str) -> None:
    _, wrapped = _wrappers()[kind]
    text = "hello " * 500 + "\udfff and \ud800"
    for scope in (None, "a"):
        for flag in (True, False):
            with pytest.raises(
                InvalidText, match=r"text has .* U\+DFFF, at character 3,000 of 3,007"
            ):
                wrapped.token_ids(text, add_special_tokens=flag, scope=scope)
            with pytest.raises(InvalidText, match=r"texts\[2\] has .* at character 1 of 3"):
                wrapped.token_ids_batch(
                    ["hello", "world", LONE_SURROGATE, text], add_special_tokens=flag, scope=scope
                )
        with pytest.raises(InvalidText, match="at character 0 of 1"):
            asyncio.run(wrapped.atoken_ids("\udc80", scope=scope))
    with pytest.raises(InvalidText) as caught:
        wrapped.token_ids("secret \ud800")
    assert "secret" not in str(caught.value)
    assert wrapped.cache_stats().l0.n_entries == 0
    text = "\U0001f600 hello"  # a surrogate pair in UTF-16 only
    assert wrapped.token_ids(text) == wrapped.token_ids_batch([text])[0]


@pytest.mark.parametrize("kind", [*MADE, *(f"fast {kind}" for kind in MADE), "own call"])
def test_plain_methods_keep_the_plain_error_for_a_lone_surrogate(kind: str) -> None:
    plain, wrapped = _wrappers()[kind]
    calls: list[Callable[[Any], Any]] = [
        lambda tok: tok.encode(LONE_SURROGATE),
        lambda tok: tok.encode(LONE_SURROGATE, add_special_tokens=False),
        lambda tok: tok.encode(LONE_SURROGATE, LONE_SURROGATE),
        lambda tok: tok.encode_batch(["hello", LONE_SURROGATE]),
    ]
    if "chat_template" in dir(plain):
        chat = [{"role": "user", "content": LONE_SURROGATE}]
        calls[3:] = [
            lambda tok: tok(LONE_SURROGATE),
            lambda tok: tok(["hello", LONE_SURROGATE]),
            lambda tok: tok("hello", LONE_SURROGATE),
            lambda tok: tok([LONE_SURROGATE, "hello"], padding=True, truncation=True, max_length=5),
            lambda tok: tok(LONE_SURROGATE, return_tensors="np", add_special_tokens=False),
            lambda tok: tok(LONE_SURROGATE, return_offsets_mapping=True),
            lambda tok: tok.tokenize(LONE_SURROGATE),
            lambda tok: tok.apply_chat_template(chat),
            lambda tok: tok.apply_chat_template(chat, return_dict=False),
            lambda tok: tok.apply_chat_template(chat, tokenize=False),
        ]
    for call in calls:
        for _ in range(2):
            assert outcome(lambda: call(wrapped)) == outcome(lambda: call(plain))  # noqa: B023
    assert wrapped.cache_stats().l0.n_entries <= 1  # "hello", encoded before the failing text


def test_encodings_are_computed_when_first_needed(plain: Any, wrapped: Any) -> None:
    text = "hello <s> world"
    for own, other in (
        (wrapped(text), plain(text)),
        (wrapped(text), plain(text)),
        (wrapped([text, text]), plain([text, text])),
    ):
        assert "_made" not in vars(own)
        assert own.is_fast is other.is_fast is True
        assert "_made" not in vars(own)
        assert own.n_sequences == other.n_sequences
        assert own.tokens() == other.tokens()
        assert own.word_ids() == other.word_ids()
        assert own.sequence_ids() == other.sequence_ids()
        assert own.char_to_token(3) == other.char_to_token(3)
        assert own[0].offsets == other[0].offsets
        assert own.data == other.data
        assert own == other
        assert type(own).__name__ == type(other).__name__
        tensors = own.convert_to_tensors("np", prepend_batch_axis=True)
        assert str(tensors.data) == str(
            other.convert_to_tensors("np", prepend_batch_axis=True).data
        )
    wrapped(text, truncation=True, max_length=2)
    late = wrapped(text)
    wrapped.add_tokens(["hello"])
    assert late.tokens() == plain(text).tokens()  # with the tokenizer as it was at the call


def test_copies_of_an_answer_are_batch_encodings(plain: Any, wrapped: Any) -> None:
    expected = plain("hello")
    for again in (copy.deepcopy, pickled):
        made = again(wrapped("hello"))
        assert type(made) is type(expected)
        assert made.data == expected.data
        assert made.tokens() == expected.tokens()
    assert copy.copy(wrapped("hello")).tokens() == expected.tokens()


def test_callers_may_change_the_returned_lists(wrapped: Any) -> None:
    first = wrapped("hello")
    expected = first["input_ids"].copy()
    for key in first:
        first[key].append(99)
    wrapped.encode("hello").append(99)
    wrapped(["hello", "hello"])["input_ids"][0].append(99)
    assert wrapped("hello")["input_ids"] == wrapped.encode("hello") == expected
    assert wrapped(["hello", "hello"])["input_ids"] == [expected, expected]


@pytest.mark.parametrize("long", ["hello world " * 20, ["a", "hello world " * 20]], ids=len)
def test_the_warning_about_length_is_logged_once_as_by_the_plain_tokenizer(
    plain: Any, wrapped: Any, long: Any
) -> None:
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(listener)
    try:
        for tok in (plain, wrapped):
            for _ in range(2):
                tok("short")
                tok(long)
    finally:
        logger.removeHandler(listener)
    assert len(said) == 2
    assert said[0] == said[1]
    assert wrapped.cache_stats().bypasses == {}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_generation_prompt": True},
        {"return_dict": False},
        {"tokenize": False},
        {"continue_final_message": True},
        {"truncation": True, "max_length": 5},
        {"padding": "max_length", "max_length": 60},
        {"return_tensors": "np"},
    ],
    ids=str,
)
def test_apply_chat_template_answers_as_the_plain_tokenizer(
    plain: Any, wrapped: Any, arguments: dict[str, Any]
) -> None:
    for chat in (CHAT, [CHAT, CHAT[:1] + CHAT[1:]]):
        for _ in range(2):
            own = outcome(partial(wrapped.apply_chat_template, chat, **arguments))
            other = outcome(partial(plain.apply_chat_template, chat, **arguments))
            assert str(own[1]) == str(other[1])
    if set(arguments) <= {"add_generation_prompt", "return_dict", "continue_final_message"}:
        assert wrapped.cache_stats().bypasses == {}
        assert wrapped.cache_stats().encoded_texts == 1


def test_other_methods_of_a_transformers_tokenizer_answer_alike(plain: Any, wrapped: Any) -> None:
    text = "hello <s> world"
    assert wrapped.tokenize(text) == plain.tokenize(text)
    ids = plain.encode(text)
    assert wrapped.decode(ids) == plain.decode(ids)
    assert wrapped.batch_decode([ids]) == plain.batch_decode([ids])
    assert wrapped.convert_ids_to_tokens(ids) == plain.convert_ids_to_tokens(ids)
    assert (
        wrapped.pad([wrapped(text), wrapped("a")]).data == plain.pad([plain(text), plain("a")]).data
    )
    assert wrapped.special_tokens_map == plain.special_tokens_map
    assert wrapped.pad_token_id == plain.pad_token_id
    wrapped.padding_side = "left"
    assert wrapped(["a", text], padding=True)["input_ids"][0][0] == plain.pad_token_id
    assert plain.padding_side == "right"
    wrapped.deprecation_warnings["mine"] = True
    assert "mine" not in plain.deprecation_warnings


def test_the_pickle_of_a_wrapped_transformers_tokenizer_is_plain(plain: Any, wrapped: Any) -> None:
    wrapped.add_tokens(["hello world"])
    for made in (pickled(wrapped), wrapped.unwrap()):
        assert type(made) is type(plain)
        assert type(made._tokenizer) is Tokenizer
        assert made("hello world").data == wrapped("hello world").data
        made.add_tokens(["quick"])
        assert len(made) == len(wrapped) + 1


def test_a_saved_wrapped_tokenizer_loads_as_the_original_class(
    plain: Any, wrapped: Any, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415 (seconds to import)

    plain.save_pretrained(tmp_path / "plain")
    wrapped("hello", truncation=True, max_length=1)
    wrapped("hello")
    wrapped.save_pretrained(tmp_path / "wrapped")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "wrapped").iterdir()) == names
    for name in names:
        own, other = ((tmp_path / side / name).read_text() for side in ("wrapped", "plain"))
        assert (json.loads(own) == json.loads(other)) if name.endswith("json") else own == other
    for load in (AutoTokenizer.from_pretrained, type(wrapped).from_pretrained):
        made = load(tmp_path / "wrapped")
        assert type(made) is type(plain)
        assert made("hello world").data == plain("hello world").data


def test_classes_that_override_encoding_are_not_cached(plain: Any) -> None:
    class Own(type(plain)):  # type: ignore[misc]
        def _encode_plus(self, text: Any, **kwargs: Any) -> Any:
            return super()._encode_plus(text[::-1] if isinstance(text, str) else text, **kwargs)

    class Modes(type(plain)):  # type: ignore[misc]
        def _switch_to_input_mode(self) -> None:
            self._tokenizer.post_processor = MADE["byte_level_bpe"]().post_processor

    for kind, reason in ((Own, "own_encode_plus"), (Modes, "own_switch_to_input_mode")):
        original = kind(tokenizer_object=MADE["byte_level_bpe"]())
        wrapped = tokcache.wrap(original)
        assert wrapped("hello world").data == original("hello world").data
        assert wrapped.token_ids("hello world").tolist() == original("hello world")["input_ids"]
        assert wrapped.cache_stats().bypasses == {reason: 2}
        assert wrapped.cache_stats().l0.n_entries == 0


def test_a_scoped_transformers_tokenizer_shares_settings_but_not_entries(
    plain: Any, wrapped: Any
) -> None:
    view = wrapped.scoped("a")
    assert isinstance(view, type(plain))
    assert view("hello").data == wrapped("hello").data == plain("hello").data
    assert wrapped.cache_stats().encoded_texts == 2
    view.padding_side = "left"
    assert wrapped.padding_side == "left"
    view.add_tokens(["hello"])
    plain.add_tokens(["hello"])
    assert view("hello").data == wrapped("hello").data == plain("hello").data


def test_every_wrap_checks_for_missing_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr("tokcache.text.wrappers.log_missing_extension", lambda: said.append(1))
    tokcache.wrap(tokcache.wrap(MADE["unigram"]()))
    assert said == [1, 1]


def test_another_config_for_a_wrapped_tokenizer_is_refused(plain: Any) -> None:
    config = tokcache.CacheConfig(l0_max_entries=3)
    wrapped = tokcache.wrap(plain, config)
    assert tokcache.wrap(wrapped, config) is wrapped
    with pytest.raises(InvalidConfig):
        tokcache.wrap(wrapped, tokcache.CacheConfig())
    for n in range(9):
        wrapped(str(n))
    assert wrapped.cache_stats().l0.n_entries == 3


@pytest.mark.parametrize("config", [5, {}, tokcache.CacheConfig])
def test_an_invalid_config_is_refused(plain: Any, config: Any) -> None:
    for tokenizer in (plain, plain._tokenizer, tokcache.wrap(plain)):
        with pytest.raises(InvalidConfig, match="CacheConfig or None"):
            tokcache.wrap(tokenizer, config)


@pytest.mark.parametrize("other", [None, object(), BPE(), Unigram()])
def test_other_objects_are_refused(other: Any) -> None:
    with pytest.raises(UnsupportedTokenizer, match=r"pass a tokenizers\.Tokenizer or a fast"):
        tokcache.wrap(other)


def test_the_name_of_a_tokenizer_is_refused() -> None:
    with pytest.raises(MissingFile, match="gpt2; wrap takes the path of a GGUF, or a loaded tok"):
        tokcache.wrap("gpt2")


def test_a_slow_tokenizer_is_refused() -> None:
    import transformers  # noqa: PLC0415 (seconds to import)

    slow: Any = transformers.CanineTokenizer
    with pytest.raises(UnsupportedTokenizer, match=r"CanineTokenizer.*fast transformers"):
        tokcache.wrap(slow())


def test_a_tokenizer_of_mistral_common_is_refused() -> None:
    from transformers.tokenization_mistral_common import (  # noqa: PLC0415 (seconds to import)
        MistralCommonBackend,
    )

    made = MistralCommonBackend.__new__(
        MistralCommonBackend
    )  # works without mistral_common installed
    with pytest.raises(UnsupportedTokenizer, match=r"MistralCommonBackend.*fast transformers"):
        tokcache.wrap(made)


def _chat_ids(tok: Any) -> list[int]:
    tok.chat_template = "{{ messages[0].content }}"
    found = tok.apply_chat_template([{"role": "user", "content": "hello a"}], return_dict=False)
    assert isinstance(found, list)
    return found


def _begins_with_seven(plain: type[Any]) -> type[Any]:
    class Own(plain):  # type: ignore[misc]
        def encode(self, *args: Any, **kwargs: Any) -> list[int]:
            return [7, *super().encode(*args, **kwargs)]

    return Own


def _shouts(plain: type[Any]) -> type[Any]:
    class Own(plain):  # type: ignore[misc]
        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(text.upper(), *args, **kwargs)

    return Own


@pytest.mark.parametrize("make", [_begins_with_seven, _shouts])
def test_apply_chat_template_calls_overridden_methods(
    make: Callable[[type[Any]], type[Any]],
) -> None:
    plain = fast(MADE["byte_level_bpe"]())
    plain.__class__ = make(type(plain))
    wrapped = tokcache.wrap(plain)
    assert _chat_ids(wrapped) == _chat_ids(plain)
    assert wrapped.encode("hello a") == plain.encode("hello a")


@pytest.mark.parametrize("is_set_before", [True, False])
@pytest.mark.parametrize("name", ["_encode_plus", "_convert_encoding"])
def test_a_method_replaced_on_the_object_is_called(name: str, is_set_before: bool) -> None:
    def replace(tok: Any) -> None:
        before = getattr(tok, name)

        def own(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return before(*args, **kwargs)

        setattr(tok, name, own)

    called: list[str] = []
    tok = fast(MADE["byte_level_bpe"]())
    if is_set_before:
        replace(tok)
    wrapped = tokcache.wrap(tok)
    right = wrapped("hello a")["input_ids"]
    if not is_set_before:
        replace(wrapped)
    called.clear()
    for _ in range(2):
        assert wrapped("hello a")["input_ids"] == right
    assert called == [name] * 2
    delattr(wrapped, name)
    assert wrapped("hello a")["input_ids"] == right
    assert called == [name] * 2
    wrapped("hello a")
    assert wrapped.cache_stats().l0.hits > 0
