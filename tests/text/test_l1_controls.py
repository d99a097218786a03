"""Controls of the fuzz over combinations: without a refusal, it finds the wrong cuts.

Each control disables one refusal of the planner, draws combinations as the fuzz does, and expects
different ids within `MAX_DRAWS` of them. Only tokenizers that the refusal concerns are compared.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

import tokcache
from tests.text.fuzz_texts import dense_text
from tests.text.implementations import both, implementation
from tests.text.tokenizers_combined import combination
from tests.text.tokenizers_synthetic import PATTERNS, SYNTHETIC, added_contents
from tokcache import CacheConfig
from tokcache.text.cuts import (
    added_tokens,
    normalizers,
    planner,
    pre_tokenizers,
    vocabulary,
)
from tokcache.text.cuts.patterns import KNOWN
from tokcache.text.cuts.regex.lookup import cuts_of_pattern, outcomes_of
from tokcache.text.engines import copying as engines

MAX_DRAWS = 2500
N_TEXTS = 25

Disable = Callable[[pytest.MonkeyPatch], None]
IsConcerned = Callable[[Tokenizer, list[Any]], bool]

_read_replace = normalizers._read_replace


def _replaced_by(module: Any, name: str, value: Any) -> Disable:
    return lambda patch: patch.setattr(module, name, lambda *_, **__: value)


def _replace_read_with(**instead: Any) -> Disable:
    """Make the planner read each Replace normalizer with these facts changed."""
    return lambda patch: patch.setattr(
        normalizers, "_read_replace", lambda *of: replace(_read_replace(*of), **instead)
    )


def _nfc_that_composes_nothing(patch: pytest.MonkeyPatch) -> None:
    nfc = normalizers.Normalizer("NFC")
    patch.setitem(normalizers.READERS, "NFC", lambda *_: nfc)
    patch.setitem(normalizers.READERS, "NFKC", lambda *_: replace(nfc, keeps_non_ascii=False))


def _every_stage_is_last(patch: pytest.MonkeyPatch) -> None:
    rules = pre_tokenizers._stage_rules
    patch.setattr(
        pre_tokenizers,
        "_stage_rules",
        lambda stage, context: rules(stage, replace(context, is_last=True)),
    )


def _tokens_found_in_raw_text(patch: pytest.MonkeyPatch) -> None:
    """Judge no cut by the added tokens that are searched for in the normalised text."""
    _replaced_by(planner, "unsafe_pairs", value=frozenset())(patch)
    _replaced_by(planner, "why_no_cut_inside", value=None)(patch)


def _is_normalized(made: Tokenizer, added: list[Any]) -> bool:
    return made.normalizer is not None and any(token.normalized for token in added)


def _composes(made: Tokenizer, _: list[Any]) -> bool:
    return '"NFC"' in _state(made, "normalizer") or '"NFKC"' in _state(made, "normalizer")


def _strips(_: Tokenizer, added: list[Any]) -> bool:
    takes_whitespace = any(token.lstrip or token.rstrip for token in added)
    return takes_whitespace and any(token.content != token.content.strip() for token in added)


def _has_bytes_first(made: Tokenizer, _: list[Any]) -> bool:
    return '"ByteLevel"' in _state(made, "pre_tokenizer") and '"Sequence"' in _state(
        made, "pre_tokenizer"
    )


def _replaces(made: Tokenizer, _: list[Any]) -> bool:
    return '"Replace"' in _state(made, "normalizer")


def _has_normalized_single_word(made: Tokenizer, added: list[Any]) -> bool:
    later = [token for token in added if token.normalized]
    return made.normalizer is None and len(later) > 1 and any(one.single_word for one in later)


def _is_bpe_without_pre_tokenizer(made: Tokenizer, _: list[Any]) -> bool:
    return made.pre_tokenizer is None and isinstance(made.model, BPE)


def _splits_as_deepseek(made: Tokenizer, _: list[Any]) -> bool:
    return json.dumps(PATTERNS["deepseek_v3"])[1:-1] in _state(made, "pre_tokenizer")


def _state(made: Tokenizer, part: str) -> str:
    return engines.component_state(getattr(made, part)).decode()


def _deepseek_as_cl100k(pattern: str, behavior: str, *, invert: bool) -> Any:
    """Return the outcomes of a pattern: cl100k's for that of DeepSeek, whose words have digits."""
    if cuts_of_pattern(pattern) == cuts_of_pattern(KNOWN["deepseek_v3"]):
        pattern = KNOWN["cl100k"]
    return outcomes_of(pattern, behavior, invert=invert)


REFUSALS: dict[str, tuple[Disable, IsConcerned]] = {
    "normalized tokens with a normalizer": (
        _tokens_found_in_raw_text,
        _is_normalized,
    ),
    "composed punctuation": (
        lambda patch: patch.setattr(
            pre_tokenizers, "_without_marked_punctuation", lambda rule: rule
        ),
        _composes,
    ),
    "composed characters in the vocabulary": (_nfc_that_composes_nothing, _composes),
    "whitespace inside another token": (
        _replaced_by(added_tokens, "_why_not_found", value=None),
        _strips,
    ),
    "whitespace hidden by ByteLevel": (
        _every_stage_is_last,
        _has_bytes_first,
    ),
    "a marked run": (_replace_read_with(marks_runs=False), _replaces),
    "replaced strings": (_replace_read_with(replaced=()), _replaces),
    "single_word tokens next to another added token": (
        lambda patch: patch.setattr(added_tokens, "_MAYBE_WORDS", frozenset()),
        _has_normalized_single_word,
    ),
    "byte tokens that merge": (
        _replaced_by(vocabulary, "_has_plain_bytes", value=True),
        _is_bpe_without_pre_tokenizer,
    ),
    "merges that prove nothing": (
        _replaced_by(vocabulary, "_why_merges_tell_nothing", value=None),
        _is_bpe_without_pre_tokenizer,
    ),
    "a word that begins with a digit": (
        lambda patch: patch.setattr(pre_tokenizers, "outcomes_of", _deepseek_as_cl100k),
        _splits_as_deepseek,
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_the_fuzz_finds_wrong_ids_without_the_refusal(
    refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disable, is_concerned = REFUSALS[refusal]
    assert not any(_differs(seed) for seed in _drawn(is_concerned, 40))
    disable(monkeypatch)
    assert any(_differs(seed) for seed in _drawn(is_concerned, MAX_DRAWS))


def _drawn(is_concerned: IsConcerned, n_draws: int) -> Any:
    """Yield the seeds of the combinations that the refusal concerns."""
    for seed in range(n_draws):
        made = combination(random.Random(seed))
        if is_concerned(made, engines.added_tokens(made)):
            yield seed


def _differs(seed: int) -> bool:
    """Return whether the cached ids of any of `N_TEXTS` texts differ from the tokenizer's."""
    rng = random.Random(seed)
    made = combination(rng)
    added = added_contents(made)
    wrapped = tokcache.wrap(made, CacheConfig(engine="tokenizers", l0_max_entries=1))
    texts = (dense_text(rng, added, rng.choice([4, 20, 60, 300])) for _ in range(N_TEXTS))
    return any(
        _outcome(wrapped.token_ids, text)
        != _outcome(lambda *of, **how: made.encode(*of, **how).ids, text)
        for text in texts
    )


def _outcome(encode: Callable[..., Any], text: str) -> Any:
    try:
        return list(encode(text, add_special_tokens=False))
    except BaseException as error:
        if not engines.is_of_library(error):
            raise
        return type(error).__name__


@both
def test_no_segment_ends_before_it_begins_even_without_the_refusal(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length below zero would make the native module copy from before the text."""
    implementation(name).use(monkeypatch)
    REFUSALS["whitespace inside another token"][0](monkeypatch)
    made = SYNTHETIC["gpt2"]()
    made.add_special_tokens([AddedToken("<a>", rstrip=True), AddedToken("\n\n<b>")])
    l1 = tokcache.wrap(made, CacheConfig(engine="tokenizers"))._tokcache.l1
    assert l1 is not None
    for fine in (True, False):
        spans = l1.segments("one <a> \n\n<b> two", fine=fine)
        assert spans
        assert all(start <= stop for start, stop, _ in spans), spans
