"""Fuzz of derived cuts: `python -m tests.text.pattern_fuzz --tokenizers 2000 --seed 1`.

Each tokenizer has one to three Splits by random patterns, with random behaviors, and a random
vocabulary over bytes. At every pair of classes that its plan allows, the pieces of `u + v` are
compared with those of `u` and `v`, for random texts; then the ids of the wrapped tokenizer are
compared with the plain ones for texts that share passages. The seed repeats a run.

With --refused, random refused pairs are looked at instead: a text must show that each is unsafe.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

import tokcache
from tests.text import drawn_patterns
from tests.text.tokenizers_synthetic import PATTERNS
from tokcache import CacheConfig
from tokcache.errors import Unrecognised
from tokcache.text.cuts.char_classes import CharClass, class_of
from tokcache.text.cuts.planner import plan_cuts
from tokcache.text.cuts.regex.pattern_cuts import LEFTS, RIGHTS
from tokcache.text.cuts.regex.safety import derive, is_ended, program_of
from tokcache.text.cuts.rules import WHITESPACE_LEFT, Pair
from tokcache.text.cuts.scanner import class_behind
from tokcache.text.engines.copying import SegmentEncoder, result_or_error

if TYPE_CHECKING:
    from tokcache.text.cuts.plan import CutPlan
    from tokcache.text.cuts.regex.automaton import Program

C = CharClass
# The faster engines have regex dialects of their own, which this fuzz is not about.
_CONFIG = CacheConfig(l0_max_bytes=1, engine="tokenizers")
CHARS = drawn_patterns.CHARS
BEHAVIORS = ("isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous")
BY_CLASS = {one: [char for char in CHARS if class_of(char) is one] for one in C}
BY_CLASS[C.NEWLINE_RUN] = ["\n"]
_NORMALIZERS = (
    normalizers.NFC, normalizers.Lowercase, normalizers.NFKC, normalizers.NFD, normalizers.Strip,
)  # fmt: skip


class Wrong(NamedTuple):
    """A comparison that failed: the tokenizer in words, the pair, the text on each side."""

    tokenizer: str
    pair: str
    left: str
    right: str


class Result(NamedTuple):
    """The comparisons made, and those that failed; `reasons` counts why plans refused."""

    n_tokenizers: int
    n_compared: int
    wrong: list[Wrong]
    reasons: Counter[str]


# ---- tokenizers


def drawn_tokenizer(rng: random.Random, n_splits: int = 0) -> tuple[Tokenizer, str]:
    """Return a random tokenizer, and its components in words.

    With `n_splits`, it has so many Splits at most, and no other component that allows or forbids
    cuts.
    """
    only_splits = n_splits > 0
    while True:
        stages: list[Any] = []
        words: list[str] = []
        for _ in range(n_splits or rng.choice((1, 1, 2, 3))):
            pattern = _known(rng) if rng.random() < 0.25 else drawn_patterns.pattern(rng)
            if rng.random() < 0.9 and not is_derived(pattern):
                continue
            behavior = "isolated" if rng.random() < 0.6 else rng.choice(BEHAVIORS)
            invert = rng.random() < (0.7 if behavior == "removed" else 0.1)
            try:
                stages.append(pre_tokenizers.Split(Regex(pattern), behavior, invert=invert))
            except Exception:  # noqa: BLE001, S112 (an invalid regex; the library raises Exception)
                continue
            words.append(f"{pattern!r} {behavior}{' inverted' if invert else ''}")
        if stages:
            break
    if not only_splits and rng.random() < 0.3:
        kind = rng.choice(("Digits", "Punctuation", "WhitespaceSplit"))
        at = rng.randint(0, len(stages))
        stages.insert(at, getattr(pre_tokenizers, kind)())
        words.insert(at, kind)
    stages.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer = Tokenizer(_vocabulary(rng))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    if not only_splits and rng.random() < 0.25:
        normalizer = rng.choice(_NORMALIZERS)()
        tokenizer.normalizer = normalizer
        words.insert(0, type(normalizer).__name__)
    if not only_splits and rng.random() < 0.3:
        flags = {flag: rng.random() < 0.3 for flag in ("lstrip", "rstrip", "single_word")}
        tokenizer.add_tokens([AddedToken("<x>", normalized=False, **flags)])
    return tokenizer, "; ".join(words)


def is_derived(pattern: str) -> bool:
    """Return whether cuts can be derived from a pattern."""
    try:
        derive(pattern)
    except Unrecognised:
        return False
    return True


def _known(rng: random.Random) -> str:
    """Return a known pattern, at times without one character."""
    pattern = rng.choice(list(PATTERNS.values()))
    if rng.random() < 0.5:
        at = rng.randrange(len(pattern))
        pattern = pattern[:at] + pattern[at + 1 :]
    return pattern


def _vocabulary(rng: random.Random) -> BPE:
    """Return a model over bytes with random merges of neighbours in random texts."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = dict.fromkeys(letters)
    merges: dict[tuple[str, str], None] = {}
    for _ in range(rng.randint(20, 150)):
        text = by_bytes.pre_tokenize_str(drawn_patterns.text(rng, 2, 4))[0][0]
        at = rng.randint(1, len(text) - 1)
        for start in range(at - 1, -1, -1):
            left, right = text[start], text[start + 1 : at + 1]
            if right in tokens:
                merges[left, right] = None
                tokens[left + right] = None
    return BPE({token: at for at, token in enumerate(tokens)}, list(merges))


# ---- comparisons


def text_before(rng: random.Random, left: CharClass) -> str:
    """Return a text that ends in a character of a class on the left of a cut."""
    end = rng.choice(BY_CLASS[left])
    before = drawn_patterns.text(rng, 0, 6)
    if left is C.NEWLINE and before and class_behind("\n", class_of(before[-1])) is not left:
        before += rng.choice("as1.'_")
    return before + end


def text_after(rng: random.Random, right: CharClass) -> str:
    """Return a text that begins with a character of a class on the right of a cut."""
    return rng.choice(BY_CLASS[right]) + drawn_patterns.text(rng, 0, 6)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the pieces of a text that reach the model."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def allowed(plan: CutPlan) -> list[Pair]:
    """Return the pairs of classes at which a plan allows a cut."""
    return [pair for pair in product(C, C) if plan.allows(*pair)]


def unsafe_cuts(
    rng: random.Random, tokenizer: Tokenizer, pairs: Sequence[Pair], n_texts: int
) -> Iterator[tuple[Pair, str, str]]:
    """Yield each of `n_texts` random texts whose pieces change with a cut at one of the pairs."""
    plan = plan_cuts(tokenizer)
    whole, inside = (
        SegmentEncoder(tokenizer, one.normalizer, one.pre_tokenizer).tokenizer
        for one in (plan.variants[plan.variant_of[0]], plan.variants[plan.variant_of[2]])
    )
    for _ in range(n_texts if pairs else 0):
        pair = rng.choice(pairs)
        left, right = text_before(rng, pair[0]), text_after(rng, pair[1])
        if pieces(whole, left + right) != pieces(whole, left) + pieces(inside, right):
            yield pair, left, right


def fuzz(seed: int, n_tokenizers: int, n_texts: int, *, wrapped: bool = True) -> Result:
    """Compare random tokenizers with themselves, in parts and wrapped."""
    rng = random.Random(seed)
    n_compared, wrong, reasons = 0, [], Counter[str]()
    for _ in range(n_tokenizers):
        tokenizer, words = drawn_tokenizer(rng)
        plan = plan_cuts(tokenizer)
        reasons.update(_reason(one) for one in plan.refused)
        pairs = allowed(plan)
        n_compared += n_texts if pairs else 0
        for pair, left, right in unsafe_cuts(rng, tokenizer, pairs, n_texts):
            wrong.append(Wrong(words, f"{pair[0].name} {pair[1].name}", left, right))
            break
        if wrapped and pairs:
            for text, is_equal in _compared_wrapped(rng, tokenizer):
                n_compared += 1
                if not is_equal:
                    wrong.append(Wrong(words, "wrapped", text, ""))
                    break
    return Result(n_tokenizers, n_compared, wrong, reasons)


def _reason(sentence: str) -> str:
    """Return a refusal without the pattern and the place."""
    return sentence.rsplit("': ", 1)[-1].rsplit('": ', 1)[-1].split(" at character", maxsplit=1)[0]


def _compared_wrapped(rng: random.Random, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yield texts that share passages, and whether a wrapped copy returns the same ids."""
    wrapped = tokcache.wrap(Tokenizer.from_str(tokenizer.to_str()), _CONFIG)
    passages = [drawn_patterns.text(rng, 5, 60) for _ in range(6)] + [" a1 s.\n", "<x>", " <x>\n"]
    for _ in range(8):
        text = "".join(rng.choices(passages, k=rng.randint(1, 12)))
        # A catastrophic pattern makes the library fail, for the plain tokenizer, too.
        ours = result_or_error(wrapped.token_ids, text)
        theirs = result_or_error(tokenizer.encode, text)
        if isinstance(ours, BaseException) or isinstance(theirs, BaseException):
            yield text, str(ours) == str(theirs)
        else:
            yield text, list(ours) == theirs.ids


# ---- refused pairs


class Tightness(NamedTuple):
    """The refused pairs looked at, and those that no text shows to be unsafe."""

    n_pairs: int
    unshown: list[tuple[str, str]]


def tightness(
    seed: int, n_tokenizers: int, n_pairs: int, n_texts: int, n_splits: int = 1
) -> Tightness:
    """Look for a text that shows that a cut is unsafe, at random pairs that a plan refuses.

    Tokenizers whose pattern is refused as a whole are left out.
    """
    rng = random.Random(seed)
    n_looked_at, unshown = 0, []
    for _ in range(n_tokenizers):
        tokenizer, words = drawn_tokenizer(rng, n_splits=n_splits)
        plan = plan_cuts(tokenizer)
        if any("forces none" not in one for one in plan.refused):
            continue
        allowed_pairs = set(allowed(plan))
        refused = [pair for pair in product(LEFTS, RIGHTS) if is_text(pair)]
        refused = [pair for pair in refused if pair not in allowed_pairs]
        programs = [program_of(one["pattern"]["Regex"]) for one in _splits(tokenizer)]
        for pair in rng.sample(refused, min(n_pairs, len(refused))):
            n_looked_at += 1
            if next(unsafe_cuts(rng, tokenizer, [pair], n_texts), None) is None and not any(
                _shows(rng, tokenizer, program, pair, n_texts) for program in programs
            ):
                unshown.append((words, f"{pair[0].name} {pair[1].name}"))
    return Tightness(n_looked_at, unshown)


def _splits(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    stages = json.loads(tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    return [stage for stage in stages if stage["type"] == "Split"]


def _shows(
    rng: random.Random, tokenizer: Tokenizer, program: Program, pair: Pair, n_texts: int
) -> bool:
    """Return whether a text that leads the automaton to an open match shows a cut to be unsafe."""
    samples, open_at = program.alphabet.samples, _open_matches(program, pair)
    for _ in range(n_texts if open_at else 0):
        left, symbol = rng.choice(open_at)
        state, right = program.start, samples[symbol]
        for char in left + right:
            state = program.step(state, samples.index(char)).state
        while rng.random() < 0.8:
            # Mostly a character that goes on with the match.
            ahead = [one for one in range(len(samples)) if program.step(state, one).state.threads]
            symbol = rng.choice(ahead if ahead and rng.random() < 0.8 else range(len(samples)))
            state = program.step(state, symbol).state
            right += samples[symbol]
        if pieces(tokenizer, left + right) != pieces(tokenizer, left) + pieces(tokenizer, right):
            return True
    return False


def _open_matches(program: Program, pair: Pair) -> list[tuple[str, int]]:
    """Return short texts that end in the left class and whose match the right class leaves open.

    Each comes with a symbol of the right class.
    """
    alphabet = program.alphabet
    rights = [one for one in range(alphabet.n) if alphabet.rights[pair[1]] >> one & 1]
    newline = alphabet.samples.index("\n")
    visible = [one for one in range(alphabet.n) if alphabet.visible >> one & 1]
    lefts = alphabet.newline if pair[0] in (C.NEWLINE, C.NEWLINE_RUN) else alphabet.lefts[pair[0]]
    texts, rest = {program.start: ""}, deque([program.start])
    found: list[tuple[str, int]] = []
    while rest:
        state = rest.popleft()
        text = texts[state]
        for symbol in range(alphabet.n):
            reached = program.step(state, symbol).state
            if not reached.threads:
                continue
            is_single = symbol == newline and (
                not text or alphabet.samples.index(text[-1]) in visible
            )
            if lefts >> symbol & 1 and (pair[0] is not C.NEWLINE or is_single):
                found += (
                    (text + alphabet.samples[symbol], right)
                    for right in rights
                    if not is_ended(program, reached, right)
                )
            if reached not in texts:
                texts[reached] = text + alphabet.samples[symbol]
                rest.append(reached)
    return found


def is_text(pair: Pair) -> bool:
    """Return whether a pair is one of two classes that a plan knows, as they meet in texts."""
    left, right = pair
    return left is not C.OTHER and not (left in WHITESPACE_LEFT and right is C.NEWLINE)


def main() -> int:
    """Run the command; return 1 if a comparison failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--tokenizers", type=int, default=2000)
    parser.add_argument("--texts", type=int, default=150, help="texts in parts a tokenizer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--refused", action="store_true", help="look at refused pairs instead")
    parser.add_argument("--splits", type=int, default=1, help="with --refused: Splits at most")
    options = parser.parse_args()
    started = time.perf_counter()
    if options.refused:
        tight = tightness(options.seed, options.tokenizers, 10, 40 * options.texts, options.splits)
        _write(f"{tight.n_pairs} refused pairs, {len(tight.unshown)} not shown unsafe")
        for words, pair in tight.unshown:
            _write(f"{pair:30} {words}")
        return 0
    found = fuzz(options.seed, options.tokenizers, options.texts)
    seconds = time.perf_counter() - started
    n_wrong = len(found.wrong)
    _write(f"{found.n_tokenizers} tokenizers, {found.n_compared} comparisons, {n_wrong} wrong")
    _write(f"seed {options.seed}, {seconds:.0f} s")
    for wrong in found.wrong[:20]:
        _write("\n    ".join(map(repr, wrong)))
    for reason, times in found.reasons.most_common():
        _write(f"{times:6} {reason}")
    return bool(found.wrong)


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
