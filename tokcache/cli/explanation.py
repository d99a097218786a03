"""Collects the facts that `tokcache explain` shows: whether a tokenizer is cached, and how.

Each reason comes from the code that decides: the engine, the cut plan and the notes of L1. A
sample text is then encoded through the cache, and every answer is compared with the plain
tokenizer's. `explain_report` prints the result.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcache._prefix import first_difference
from tokcache.cli.by_transformers import ByTransformers, by_transformers
from tokcache.config import ENGINES, CacheConfig
from tokcache.demo.tokenizers import TokenizerSource
from tokcache.errors import InvalidPrompts, MissingFile
from tokcache.text.engines.copying import why_random
from tokcache.text.engines.fast import installed
from tokcache.text.wrappers import wrap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Tokenizer

    from tokcache.text.cuts.plan import CutPlan
    from tokcache.text.cuts.rules import Rule
    from tokcache.text.segments.cache import L1
    from tokcache.text.tokenizer import WrappedTokenizer

_REASONS = {
    "bpe_dropout": "BPE dropout is on, so one text has many encodings",
    "unigram_sampling": "sampling is on, so one text has many encodings",
    "python_model": "the kind of its model is unknown",
    "python_component": "a component is written in Python, so its rules can't be read",
    "empty_added_token": "an added token is empty once normalised, and may be found without end",
    "copy_differs": "a copy of the tokenizer gives other ids",
    "difference": "an answer assembled from segments differed from the tokenizer's own",
}

# The built-in sample starts each message with the first of these tokens that the tokenizer has:
# tokens that open a chat message come before tokens that open a text.
_OPENING_TOKENS = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<|user|>",
    "<\uff5cUser\uff5c>",
    "[INST]",
    "<s>",
    "[CLS]",
    "<|endoftext|>",
    "</s>",
)
_MESSAGES = (
    (
        "system\nYou are a careful assistant. Answer in one or two sentences, and show the code"
        " that it takes; don't guess.\n"
    ),
    (
        "user\nHow do I sum 1,250 numbers from `data.csv`, skipping every row with id=42? It's"
        " from 2024-05-17, with lines like:\r\n17;3.14159\r\n"
    ),
    (
        "assistant\ndef total(rows: list[str]) -> float:\n    # rows[0] is the header\n"
        "    return sum(float(r.split(';')[1]) for r in rows[1:])\n\n"
    ),
    "user\nСпасибо, работает! 请用中文再说一遍，谢谢。 👍🏽 🚀\n",  # noqa: RUF001 (Chinese)
)


class Grain(StrEnum):
    """The kind of text that may end at a rule's cuts."""

    CHUNK = "chunk"  # both chunks and the segments inside them
    SEGMENT = "segment"
    NONE = "none"


class Origin(StrEnum):
    """The source of an answer: the engine, cached segments, or the cached whole text."""

    ENCODED = "encoded"
    PARTS = "parts"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Cut:
    """A rule of the cut plan; `left` and `right` are the character classes around the cut."""

    name: str
    grain: Grain
    reason: str
    left: tuple[str, ...]
    right: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Added:
    """An added token: whether texts are cut around it, whether a chunk may begin with it."""

    content: str
    id: int
    special: bool
    is_cut_out: bool
    opens: bool
    why_not: str | None


@dataclass(frozen=True, slots=True)
class Continuation:
    """How the encoding of a segment at `place` differs from that of a text's beginning."""

    place: str
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Affixes:
    """The tokens that add_special_tokens puts around a text."""

    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of the sample, in code points; `is_token` is true if it is one added token."""

    start: int
    stop: int
    is_token: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, its chunks and its segments; `why_uncut` is the reason if there are none."""

    text: str
    chunks: tuple[Segment, ...]
    segments: tuple[Segment, ...]
    why_uncut: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the cache; `difference` is None if it is right and was made as intended."""

    engine: str
    add_special_tokens: bool
    origin: Origin
    n_tokens: int
    difference: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Whether a tokenizer's whole texts and segments are cached, where texts are cut, and why.

    `why_not_whole` is None if whole texts are cached, `why_not_parts` is None if segments are.
    `continuations` is empty if every segment is encoded alike; `affixes` is None if unknown.
    `why_not_compared` is the reason if there are no `answers`. `by_transformers` is what a user of
    `AutoTokenizer` gets, None if the files don't say.
    """

    name: str
    model: str
    n_tokens: int
    n_added_tokens: int
    why_not_whole: str | None
    why_not_parts: str | None
    recognised: tuple[tuple[str, str], ...]
    refused: tuple[str, ...]
    cuts: tuple[Cut, ...]
    added_tokens: tuple[Added, ...]
    continuations: tuple[Continuation, ...]
    affixes: Affixes | None
    engine: str | None
    engine_reason: str
    engine_notes: tuple[str, ...]
    looks_up_segments: bool
    sample: Sample
    answers: tuple[Answer, ...]
    why_not_compared: str | None
    by_transformers: ByTransformers | None = None

    @property
    def is_different(self) -> bool:
        """Whether an answer differed from the plain tokenizer's."""
        other = self.by_transformers
        is_other = other is not None and other.is_different
        return is_other or any(answer.difference for answer in self.answers)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict that JSON can hold."""
        made = asdict(self)
        for grain in ("chunks", "segments"):
            for part in made["sample"][grain]:
                part["text"] = self.sample.text[part["start"] : part["stop"]]
        return {**made, "identical": None if self.why_not_compared else not self.is_different}


def explain(
    source: TokenizerSource | Tokenizer, config: CacheConfig | None = None, text: str | None = None
) -> Explanation:
    """Return the Explanation of a tokenizer, with `text` or a built-in chat as the sample.

    Errors: UnsupportedTokenizer if the source holds none; MissingExtra for an engine that is not
            installed.
    Cost:   loads the tokenizer, proves the engine and encodes the sample: some seconds at most.
    """
    plain = source.load() if isinstance(source, TokenizerSource) else source
    config = config or CacheConfig()
    wrapped = wrap(plain, config)
    wrapped.wait_for_engine()
    core = wrapped._tokcache  # noqa: SLF001 (ours)
    l1 = core.l1
    reason = core.engine(core.fresh()).reason
    # Only the engine "tokenizers" looks up segments. With a faster engine a second cache with that
    # engine is made, which shows and proves them.
    by_segments = wrapped
    if l1 is not None and l1.off is None and l1.engine != "tokenizers":
        by_segments = wrap(plain, replace(config, engine="tokenizers"))
    plan = None if l1 is None else l1.plan
    added = tuple(_added(plain, plan))
    text = _sample_text(added) if text is None else text
    sample = _sample(by_segments, text)  # before any answer: a wrong one switches L1 off
    answers, why_not_compared = _answers(plain, dict.fromkeys((wrapped, by_segments)), text)
    return Explanation(
        name=source.name if isinstance(source, TokenizerSource) else "a tokenizer in memory",
        model=type(plain.model).__name__,
        n_tokens=plain.get_vocab_size(),
        n_added_tokens=len(added),
        why_not_whole=None if reason is None else _in_words(reason),
        why_not_parts=_why_not_parts(plan, reason),
        recognised=plan.recognised if plan else (),
        refused=plan.refused if plan else (),
        cuts=tuple(_cut(rule, plan) for rule in plan.rules) if plan else (),
        added_tokens=added,
        continuations=tuple(_continuations(plan)) if plan else (),
        affixes=_affixes(plain, plan),
        engine=l1.engine if l1 is not None and l1.off is None else None,
        engine_reason=wrapped.cache_stats().engine_reason,
        engine_notes=tuple(_engine_notes(l1, config.engine)) if l1 else (),
        looks_up_segments=by_segments is wrapped,
        sample=sample,
        answers=answers,
        why_not_compared=why_not_compared,
        by_transformers=(
            by_transformers(source, config, text, _why_not_parts)
            if isinstance(source, TokenizerSource)
            else None
        ),
    )


def read_sample(path: Path) -> str:
    """Return the text of a file with its line ends unchanged.

    Errors: MissingFile; InvalidPrompts for a file that can't be read, is empty or not UTF-8.
    """
    if not path.exists():
        raise MissingFile(f"no such text file: {path}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidPrompts(f"{path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidPrompts(f"{path} is not UTF-8 text: byte {error.start} is wrong") from None
    if not text:
        raise InvalidPrompts(f"{path} is empty; name a file with some text to cut")
    return text


# ---- the cuts, added tokens and engine


def _in_words(reason: str) -> str:
    return _REASONS.get(reason, reason)


def _why_not_parts(plan: CutPlan | None, reason: str | None) -> str | None:
    if reason is not None:
        return _in_words(reason)
    if plan is None:
        return "the segment cache is switched off (l1=False)"
    if plan.off is not None:
        return "; ".join(plan.refused) or _in_words(plan.off)
    if not any(plan.fine) and not plan.separators:
        return "; ".join(plan.refused) or "no safe place to cut a text is known"
    return None


def _cut(rule: Rule, plan: CutPlan) -> Cut:
    pairs = list(rule.pairs())
    grain = Grain.SEGMENT if any(plan.allows(*pair) for pair in pairs) else Grain.NONE
    if any(plan.allows(*pair, fine=False) for pair in pairs):
        grain = Grain.CHUNK
    left, right = (
        tuple(one.name.lower() for one in sorted(side)) for side in (rule.left, rule.right)
    )
    return Cut(rule.name, grain, rule.reason, left, right)


def _added(tokenizer: Tokenizer, plan: CutPlan | None) -> Iterator[Added]:
    separators = {one.id: one for one in plan.separators} if plan else {}
    for index, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        one = separators.get(index)
        why_not: str | None = "nothing is cut"
        if one is not None:
            reasons = (
                (one.opens, None),
                (one.skips, "special tokens are read as text: encode_special_tokens"),
                (one.lstrip, "it includes the whitespace before it: lstrip"),
                (one.single_word, "it must be a whole word: single_word"),
                (True, "added tokens overlap, or one is the beginning of another"),
            )
            why_not = next(reason for applies, reason in reasons if applies)
        elif token.normalized and plan is not None and plan.off is None:
            why_not = "it is found in the normalised text"
        yield Added(
            content=token.content,
            id=index,
            special=token.special,
            is_cut_out=one is not None and not one.skips,
            opens=one is not None and one.opens,
            why_not=why_not,
        )


def _continuations(plan: CutPlan) -> Iterator[Continuation]:
    if len(plan.variants) < 2:  # noqa: PLR2004 (a first one and another)
        return
    first = plan.variants[plan.variant_of[0]]
    places = ("after an added token", "at a cut")
    for place, index in zip(places, plan.variant_of[1:], strict=True):
        other = plan.variants[index]
        changes = [
            change
            for part in ("normalizer", "pre_tokenizer")
            for change in _changes(*(json.loads(getattr(one, part)) for one in (first, other)))
        ]
        yield Continuation(place, tuple(changes))


def _changes(first: Any, other: Any) -> Iterator[str]:
    """Yield the settings that differ between two components, none that are equal."""
    if first == other:
        return
    kind = first["type"]
    if kind != other["type"]:
        yield f"without {kind}"
        return
    for key, value in first.items():
        if key in ("normalizers", "pretokenizers"):
            for one, another in zip(value, other[key], strict=True):
                yield from _changes(one, another)
        elif value != other[key]:
            yield f"{kind} with {key} {other[key]}, not {value}"


def _affixes(tokenizer: Tokenizer, plan: CutPlan | None) -> Affixes | None:
    around = plan.affixes[True] if plan else None
    if around is None:
        return None
    before, after = (
        tuple(tokenizer.id_to_token(index) or f"id {index}" for index in side) for side in around
    )
    return Affixes(before, after)


def _engine_notes(l1: L1, wanted: str) -> Iterator[str]:
    if l1.off is not None:
        return
    present = installed()
    faster = [name for name in ENGINES if name not in ("auto", "tokenizers")]
    for name in faster[: faster.index(l1.engine)] if l1.engine in faster else faster:
        if wanted == "auto" and name not in present:
            yield f"{name} is not installed (pip install 'tokcache[engines]')"
    if wanted == "tokenizers":
        yield "chosen by the engine setting"
    yield from l1.notes


# ---- the sample


def _sample_text(added: Sequence[Added]) -> str:
    """Return a chat; each message starts with a special token of the tokenizer, if it has one."""
    special = [one for one in added if one.special]
    known = {one.content for one in special}
    likely = [content for content in _OPENING_TOKENS if content in known]
    likely += [one.content for one in sorted(special, key=lambda one: not one.opens)]
    token = likely[0] if likely else ""
    return "".join(token + message for message in _MESSAGES)


def _sample(wrapped: WrappedTokenizer, text: str) -> Sample:
    l1 = wrapped._tokcache.l1  # noqa: SLF001 (ours)
    if l1 is None or l1.off is not None:
        return Sample(text, (), (), "this tokenizer's texts are not cut")
    grains = [l1.segments(text, fine=fine) for fine in (False, True)]
    chunks, segments = (tuple(Segment(*part) for part in parts or ()) for parts in grains)
    is_cut = None not in grains
    why = "next to a whole-word added token is a character that may or may not belong to a word"
    return Sample(text, chunks, segments, None if is_cut else why)


def _answers(
    plain: Tokenizer, caches: dict[WrappedTokenizer, None], text: str
) -> tuple[tuple[Answer, ...], str | None]:
    """Encode the sample twice with and twice without special tokens; compare every answer."""
    if why_random(plain.model) is not None:
        return (), "two encodings of one text may differ"
    truncation, padding = plain.truncation, plain.padding
    plain.no_truncation()  # so that it returns a text's own ids
    plain.no_padding()
    try:
        right = {
            special: plain.encode(text, add_special_tokens=special).ids for special in (True, False)
        }
    except Exception as error:  # noqa: BLE001 (tokenizers raises Exception itself)
        return (), f"the plain tokenizer can't encode the sample: {error}"
    finally:
        if truncation is not None:
            plain.enable_truncation(**truncation)
        if padding is not None:
            plain.enable_padding(**padding)
    answers = [
        _answer(cache, text, special, right[special])
        for cache in caches
        for _ in range(2)
        for special in (True, False)
    ]
    return tuple(answers), None


def _answer(cache: WrappedTokenizer, text: str, special: bool, right: list[int]) -> Answer:
    before = cache.cache_stats()
    found = cache.token_ids(text, add_special_tokens=special).tolist()
    after = cache.cache_stats()
    origin = Origin.PARTS if after.l1.hits > before.l1.hits else Origin.ENCODED
    if after.l0.hits > before.l0.hits:
        origin = Origin.WHOLE
    l1 = cache._tokcache.l1  # noqa: SLF001 (ours)
    engine = "tokenizers" if l1 is None else l1.engine
    difference = None
    index = first_difference(right, found)
    if index is not None:
        one, other = (ids[index] if index < len(ids) else None for ids in (right, found))
        difference = f"id {index} is {one} in the plain tokenizer and {other} in the cache"
    n_whole = [stats.l1.refusals.get("segments_differ", 0) for stats in (before, after)]
    if difference is None and n_whole[0] < n_whole[1]:
        difference = "token ids run across a cut, so the text was encoded whole"
    return Answer(engine, special, origin, len(found), difference)
