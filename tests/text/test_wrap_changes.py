"""Changes made through a wrapped tokenizer take effect in the next answer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel, WordPiece
from tokenizers.trainers import BpeTrainer

import tokcache
from tests.text.tokenizers_made import MADE, TEXTS, TRAINING, fast
from tokcache.text.tokenizer import WrappedTokenizer

Change = Callable[[Any], object]


def assign(name: str, value: Any) -> Change:
    return lambda tok: setattr(tok, name, value() if callable(value) else value)


def in_place(part: str, name: str, value: Any) -> Change:
    return lambda tok: setattr(getattr(tok, part), name, value)


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])


def assign_and_change_later(tok: Any) -> None:
    part = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.pre_tokenizer = part
    ids_of_texts(tok)
    part.add_prefix_space = True


def change_a_member(tok: Any) -> None:
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ids_of_texts(tok)
    member = tok.pre_tokenizer[0]
    ids_of_texts(tok)
    member.add_prefix_space = True


def keep_a_handle_over_other_changes(tok: Any) -> None:
    part = tok.pre_tokenizer
    tok.add_tokens(["lazy"])
    ids_of_texts(tok)
    part.add_prefix_space = True


def change_and_put_back_the_same_object(tok: Any) -> None:
    part = tok.post_processor
    ids_of_texts(tok)
    part.single = ["$A", "</s>"]
    tok.post_processor = part


def train(tok: Any) -> None:
    trainer = BpeTrainer(vocab_size=300, show_progress=False)
    tok.train_from_iterator(TRAINING[:2], trainer)


BPE_CHANGES: dict[str, Change] = {
    "add_tokens": lambda tok: tok.add_tokens(["wor", AddedToken("Hel", lstrip=True)]),
    "add_special_tokens": lambda tok: tok.add_special_tokens(["world"]),
    "flags of an added token": lambda tok: tok.add_tokens([AddedToken("<x>", single_word=True)]),
    "normalizer": assign("normalizer", normalizers.Lowercase),
    "normalizer prepends": assign("normalizer", lambda: normalizers.Prepend("_")),
    "pre_tokenizer": assign("pre_tokenizer", lambda: pre_tokenizers.ByteLevel(use_regex=False)),
    "post_processor": assign("post_processor", lambda: template("$A </s>")),
    "no post_processor": assign("post_processor", None),
    "model": assign("model", BPE),
    "encode_special_tokens": assign("encode_special_tokens", value=True),
    "pre_tokenizer in place": in_place("pre_tokenizer", "add_prefix_space", value=True),
    "pre_tokenizer twice in place": lambda tok: [
        in_place("pre_tokenizer", "add_prefix_space", value=True)(tok),
        ids_of_texts(tok),
        in_place("pre_tokenizer", "use_regex", value=False)(tok),
    ],
    "post_processor in place": in_place("post_processor", "single", ["$A", "</s>"]),
    "a component assigned and then changed": assign_and_change_later,
    "a member of a sequence": change_a_member,
    "a component held across other changes": keep_a_handle_over_other_changes,
    "the same object changed and assigned again": change_and_put_back_the_same_object,
}


def ids_of_texts(tok: Any) -> list[list[int]]:
    """Return the ids of all texts; a wrapped tokenizer encodes them twice, to use its cache."""
    if isinstance(tok, WrappedTokenizer):
        tok.token_ids_batch(TEXTS)
        single = [tok.token_ids(text).tolist() for text in TEXTS]
        assert [ids.tolist() for ids in tok.token_ids_batch(TEXTS)] == single
        return single
    return [one.ids for one in tok.encode_batch(TEXTS)]


def check(kind: str, change: Change) -> None:
    plain, wrapped = MADE[kind](), tokcache.wrap(MADE[kind]())
    before = ids_of_texts(plain)
    assert ids_of_texts(wrapped) == before
    change(plain)
    change(wrapped)
    after = ids_of_texts(plain)
    assert after != before, "this change has no effect, so it tests nothing"
    assert ids_of_texts(wrapped) == after
    n_encoded = wrapped.cache_stats().encoded_texts
    assert ids_of_texts(wrapped) == after
    if not wrapped.cache_stats().bypasses:
        assert wrapped.cache_stats().encoded_texts == n_encoded


@pytest.mark.parametrize("name", BPE_CHANGES)
def test_a_changed_bpe_tokenizer_gives_the_new_ids(name: str) -> None:
    check("byte_level_bpe", BPE_CHANGES[name])


OTHER_CHANGES: dict[str, tuple[str, Change]] = {
    "normalizer in place": ("word_piece", in_place("normalizer", "lowercase", value=False)),
    "longest word": ("word_piece", in_place("model", "max_input_chars_per_word", 3)),
    "unknown token": ("word_piece", in_place("model", "unk_token", "[SEP]")),
    "unknown word": ("word_level", in_place("model", "unk_token", "world")),
    "marker": ("unigram", in_place("pre_tokenizer", "prepend_scheme", "never")),
    "replacement": ("unigram", in_place("pre_tokenizer", "replacement", "_")),
    "train": ("word_level", lambda tok: tok.train_from_iterator(["? ? ? b hello hello"])),
    "accents": ("word_piece", in_place("normalizer", "strip_accents", value=False)),
}


@pytest.mark.parametrize("name", OTHER_CHANGES)
def test_a_changed_tokenizer_of_another_kind_gives_the_new_ids(name: str) -> None:
    check(*OTHER_CHANGES[name])


def test_components_are_watched_only_while_the_user_holds_them() -> None:
    """A component in the hands of the user may change, so each call compares its state."""
    wrapped = tokcache.wrap(MADE["byte_level_bpe"]())
    usual = wrapped._tokcache.get.__qualname__
    held = wrapped.pre_tokenizer
    wrapped.token_ids("hello")
    assert wrapped._tokcache.get.__qualname__ != usual
    wrapped.token_ids("hello")
    assert wrapped._tokcache.get.__qualname__ != usual
    del held
    gc.collect()
    wrapped.token_ids("hello")
    assert wrapped._tokcache.get.__qualname__ == usual
    assert wrapped.cache_stats().invalidations == 0


def test_a_member_that_outlives_its_sequence_is_still_watched() -> None:
    wrapped = tokcache.wrap(MADE["byte_level_bpe"]())
    change_a_member(wrapped)
    stats = wrapped.cache_stats()
    wrapped.token_ids("hello")
    assert wrapped.cache_stats().invalidations == stats.invalidations + 1


def test_setting_an_equal_component_keeps_the_cache() -> None:
    wrapped = tokcache.wrap(MADE["byte_level_bpe"]())
    wrapped.token_ids("hello")
    wrapped.post_processor = template("<s> $A </s>")
    assert wrapped.cache_stats().invalidations == 1  # its template for pairs differs
    wrapped.post_processor = template("<s> $A </s>")
    wrapped.encode_special_tokens = False
    assert wrapped.cache_stats().invalidations == 1


def test_a_normalizer_changed_under_normalized_added_tokens_is_not_cached() -> None:
    # tokenizers normalizes such tokens when they are added, not when the normalizer changes.
    plain: Any = MADE["word_piece"]()
    wrapped = tokcache.wrap(MADE["word_piece"]())
    for tok in (plain, wrapped):
        tok.normalizer = normalizers.BertNormalizer(lowercase=False)
        tok.add_tokens([AddedToken("XY", normalized=True)])
    assert wrapped.token_ids("xy XY").tolist() == plain.encode("xy XY").ids
    for tok in (plain, wrapped):
        tok.normalizer.lowercase = True
    assert wrapped.token_ids("xy XY").tolist() == plain.encode("xy XY").ids
    assert wrapped.cache_stats().bypasses == {"normalizer_changed_in_place": 1}
    for tok in (plain, wrapped):
        tok.add_tokens(["another"])
    assert wrapped.token_ids("xy XY").tolist() == plain.encode("xy XY").ids
    assert wrapped.cache_stats().bypasses == {"normalizer_changed_in_place": 2}
    for tok in (plain, wrapped):
        tok.normalizer = normalizers.BertNormalizer()
    assert wrapped.token_ids("xy XY").tolist() == plain.encode("xy XY").ids
    assert wrapped.cache_stats().bypasses == {"normalizer_changed_in_place": 2}


def test_a_normalizer_changed_before_wrap_under_normalized_added_tokens_is_not_cached() -> None:
    plain: Any = MADE["word_piece"]()
    plain.normalizer = normalizers.BertNormalizer(lowercase=False)
    plain.add_tokens([AddedToken(f"XY{i:03}", normalized=i == 7) for i in range(300)])
    plain.normalizer.lowercase = True
    wrapped = tokcache.wrap(plain)
    assert wrapped.token_ids("xy007 XY007").tolist() == plain.encode("xy007 XY007").ids
    assert wrapped.cache_stats().bypasses == {"copy_differs": 1}


def test_dropout_set_through_the_wrapper_stops_caching() -> None:
    wrapped = tokcache.wrap(MADE["byte_level_bpe"]())
    text = "hello quick brown world"
    wrapped.token_ids(text)
    wrapped.model.dropout = 0.5
    assert len({wrapped.token_ids(text) for _ in range(40)}) > 1
    assert wrapped.cache_stats().bypasses == {"bpe_dropout": 40}
    wrapped.model.dropout = None
    assert len({wrapped.token_ids(text) for _ in range(40)}) == 1
    assert wrapped.cache_stats().bypasses == {"bpe_dropout": 40}


def test_original_and_wrapper_do_not_see_each_others_changes() -> None:
    plain: Any = MADE["byte_level_bpe"]()
    wrapped = tokcache.wrap(plain)
    expected = ids_of_texts(plain)
    train(wrapped)
    wrapped.add_tokens(["hello"])
    wrapped.pre_tokenizer.add_prefix_space = True
    wrapped.enable_truncation(1)
    wrapped.encode_special_tokens = True
    assert ids_of_texts(plain) == expected
    changed = ids_of_texts(wrapped)
    plain.add_tokens(["world"])
    plain.enable_truncation(2)
    plain.pre_tokenizer.use_regex = False
    assert ids_of_texts(wrapped) == changed
    assert plain.truncation["max_length"] == 2
    assert wrapped.truncation["max_length"] == 1


def test_unwrap_returns_an_independent_plain_tokenizer_with_the_changes() -> None:
    wrapped = tokcache.wrap(MADE["byte_level_bpe"]())
    wrapped.add_tokens(["hello"])
    plain = wrapped.unwrap()
    assert type(plain) is Tokenizer
    assert ids_of_texts(plain) == ids_of_texts(wrapped)
    before = ids_of_texts(wrapped)
    plain.add_tokens(["world"])
    assert ids_of_texts(wrapped) == before != ids_of_texts(plain)


def test_cache_clear_picks_up_changes_made_outside_the_wrapper() -> None:
    plain = MADE["word_piece"]()
    wrapped = tokcache.wrap(plain)
    model = plain.model
    stale = ids_of_texts(wrapped)
    model.max_input_chars_per_word = 3
    assert ids_of_texts(wrapped) == stale  # the documented limit: the model is shared
    wrapped.cache_clear()
    assert ids_of_texts(wrapped) == ids_of_texts(plain) != stale


# ---- transformers

FAST_CHANGES: dict[str, Change] = {
    "add_tokens": lambda tok: tok.add_tokens(["wor"]),
    "add_special_tokens": lambda tok: tok.add_special_tokens({"cls_token": "hello"}),
    "add_bos_token": lambda tok: mark(tok, "bos_token", "<s>"),
    "add_eos_token": lambda tok: mark(tok, "eos_token", "<mask>"),
    "update_post_processor": lambda tok: tok.update_post_processor(),
    "split_special_tokens": assign("split_special_tokens", value=True),
    "model_input_names": assign("model_input_names", ["input_ids"]),
    "backend normalizer": lambda tok: setattr(
        tok.backend_tokenizer, "normalizer", normalizers.Lowercase()
    ),
    "backend part in place": lambda tok: setattr(
        tok._tokenizer.pre_tokenizer, "add_prefix_space", True
    ),
    "backend add_tokens": lambda tok: tok.backend_tokenizer.add_tokens(["wor"]),
    "another backend": lambda tok: setattr(tok, "_tokenizer", MADE["word_level"]()),
}


def mark(tok: Any, name: str, token: str) -> None:
    setattr(tok, name, token)
    setattr(tok, f"add_{name}", True)


def call(tok: Any) -> list[dict[str, Any]]:
    return [dict(tok(text)) for text in [*TEXTS, TEXTS]]


@pytest.mark.parametrize("name", FAST_CHANGES)
def test_a_changed_transformers_tokenizer_gives_the_new_answers(name: str) -> None:
    plain, wrapped = fast(MADE["byte_level_bpe"]()), tokcache.wrap(fast(MADE["byte_level_bpe"]()))
    before = call(plain)
    assert call(wrapped) == before
    FAST_CHANGES[name](plain)
    FAST_CHANGES[name](wrapped)
    after = call(plain)
    assert after != before, "this change has no effect, so it tests nothing"
    assert call(wrapped) == after
    assert call(wrapped) == after
    assert [wrapped.token_ids(text).tolist() for text in TEXTS] == [
        one["input_ids"] for one in after[:-1]
    ]
    assert wrapped.cache_stats().bypasses == {}


NOT_IN_LAYOUT = (
    "split_special_tokens",
    "another backend",
)  # no visible effect here; no padding token
LAYOUT_CHANGES: dict[str, Change] = {
    **{name: change for name, change in FAST_CHANGES.items() if name not in NOT_IN_LAYOUT},
    "padding_side": assign("padding_side", "left"),
    "truncation_side": assign("truncation_side", "left"),
    "pad_token": assign("pad_token", "</s>"),
    "pad_token_type_id": assign("_pad_token_type_id", 1),
    "model_max_length": assign("model_max_length", 6),
    "model_input_names with types": assign("model_input_names", ["input_ids", "token_type_ids"]),
    "backend post_processor": lambda tok: setattr(
        tok.backend_tokenizer, "post_processor", template("$A </s>")
    ),
    "backend post_processor in place": lambda tok: setattr(
        tok.backend_tokenizer.post_processor, "single", ["$A", "</s>"]
    ),
}


def call_laid_out(tok: Any) -> list[dict[str, Any]]:
    first, second = TEXTS[2:5], TEXTS[3:6]
    return [
        dict(tok(first, padding=True, truncation=True, max_length=7)),
        dict(tok(first, padding="max_length", max_length=9, pad_to_multiple_of=4)),
        dict(tok(first, second, padding=True, truncation="longest_first", max_length=8)),
        dict(tok(first[0], second[0], return_length=True, return_special_tokens_mask=True)),
        dict(tok(first, truncation=True, padding=True, return_token_type_ids=True)),
    ]


@pytest.mark.parametrize("name", LAYOUT_CHANGES)
def test_truncated_and_padded_calls_of_a_changed_tokenizer_give_the_new_answers(name: str) -> None:
    plain, wrapped = fast(MADE["byte_level_bpe"]()), tokcache.wrap(fast(MADE["byte_level_bpe"]()))
    for tok in (plain, wrapped):
        tok.pad_token = "<mask>"  # noqa: S105 (no password)
    before = call_laid_out(plain)
    assert [call_laid_out(wrapped) for _ in range(2)] == [before] * 2
    LAYOUT_CHANGES[name](plain)
    LAYOUT_CHANGES[name](wrapped)
    after = call_laid_out(plain)
    assert after != before, "this change has no effect, so it tests nothing"
    assert [call_laid_out(wrapped) for _ in range(2)] == [after] * 2


def test_split_special_tokens_in_one_call_does_not_change_other_calls() -> None:
    plain, wrapped = fast(MADE["byte_level_bpe"]()), tokcache.wrap(fast(MADE["byte_level_bpe"]()))
    text = "<s> hello <mask>"
    for tok in (plain, wrapped):
        tok(text)
    assert wrapped(text, split_special_tokens=True) == plain(text, split_special_tokens=True)
    assert plain._tokenizer.encode_special_tokens is True
    assert wrapped._tokenizer.encode_special_tokens is True
    assert wrapped.token_ids(text).tolist() == plain(text)["input_ids"]
    assert wrapped(text) == plain(text) != plain(text, split_special_tokens=True)
    assert wrapped._tokenizer.encode_special_tokens is False
    assert wrapped.cache_stats().bypasses == {"split_special_tokens": 1}


def test_a_cached_call_also_removes_truncation_left_in_the_backend() -> None:
    plain, wrapped = fast(MADE["byte_level_bpe"]()), tokcache.wrap(fast(MADE["byte_level_bpe"]()))
    text = "hello world hello world"
    for tok in (plain, wrapped):
        tok(text)
        assert len(tok(text, truncation=True, max_length=3)["input_ids"]) == 3
    for tok in (plain, wrapped):  # transformers leaves the truncation set in the backend
        assert len(tok._tokenizer.encode(text).ids) == 3
    assert wrapped(text) == plain(text)
    for tok in (plain, wrapped):
        assert len(tok._tokenizer.encode(text).ids) > 3
        assert tok._tokenizer.truncation is None
    assert wrapped._tokcache.stats().encoded_texts == 1


def test_replacing_the_model_by_one_of_the_same_class_takes_effect() -> None:
    plain: Any = MADE["word_level"]()
    wrapped = tokcache.wrap(plain)
    assert wrapped.token_ids("hello").tolist() == [3, 1]
    for tok in (plain, wrapped):
        tok.model = WordLevel({"?": 0, "world": 1, "hello": 2}, unk_token="?")  # noqa: S106
    assert wrapped.token_ids("hello").tolist() == plain.encode("hello").ids == [3, 2]


def test_training_a_model_that_the_wrapper_returned_takes_effect() -> None:
    wrapped = tokcache.wrap(Tokenizer(WordPiece({"a": 0, "?": 1}, unk_token="?")))  # noqa: S106
    assert wrapped.token_ids("hello").tolist() == [1]
    model = wrapped.model
    Tokenizer(model).train_from_iterator(["hello hello"], model.get_trainer())
    assert wrapped.token_ids("hello").tolist() == wrapped.encode("hello").ids
