"""Recognises values that change with each request: dates and clocks, random values, numbers.

A value counts only if both texts hold one of the same kind at the first difference.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from tokcache.differences.classes import DifferenceClass

_REACH = 100  # code points around the difference in which a value begins and ends

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_DAY = r"(?:Mon|Tue(?:s)?|Wed(?:nes)?|Thu(?:rs)?|Fri|Sat(?:ur)?|Sun)(?:day)?\b\.?"
_ZONE = r"(?:\s*(?:Z|(?:UTC|GMT)?[+-]\d{1,2}:?(?:\d{2})?|[A-Z]{3,4})\b)?"
_HOUR, _MINUTE = r"(?:[01]?\d|2[0-4])", r"[0-5]\d"
_HOUR_OF_12 = r"(?:1[0-2]|0?[1-9])"
_HALF = r"(?:\s?[AP]\.?M\b\.?|[ap]\.?m\b\.?|\s[ap]\.m\b\.?|\s[ap]m\b)"  # AM or PM
_CLOCK = (
    rf"{_HOUR}:{_MINUTE}(?::[0-6]\d(?:[.,]\d+)?)?{_HALF}?{_ZONE}"
    rf"|{_HOUR_OF_12}\.{_MINUTE}{_HALF}|{_HOUR_OF_12}(?:\s?[AP]\.?M\b\.?|[ap]\.?m\b\.?|\s[ap]\.m\.)"
    rf"|{_HOUR}(?:[.:]{_MINUTE})?\s?Uhr\b|{_HOUR}\s?[hH]\s?{_MINUTE}\b"
)
_CLOCK = rf"(?:{_CLOCK})"
# Not a part of an address, a line of a file, or a negative number.
_CLOCK_ALONE = rf"(?<![\w:.])(?<!\s-){_CLOCK}(?![\w:]|\.\d)"
_NUMBER_OF_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_AT = r",?\s+(?:at\s+|um\s+|à\s+|a las\s+)?"
_ISO = (
    rf"\d{{4}}-\d{{1,2}}-\d{{1,2}}(?:(?:T|{_AT}){_CLOCK}|T\d{{2}}\b|[_-]\d{{2}}-\d{{2}}(?:-\d{{2}})?)?"
    r"|\d{4}-W\d{2}(?:-\d)?\b|(?<![\w-])20[2-4]\d-[0-3]\d{2}(?![\w-])"
)
_NUMERIC = (
    r"\d{1,2}/\d{1,2}/(?:\d{4}|\d{2})|\d{4}/\d{1,2}/\d{1,2}|\d{1,2}\.\d{1,2}\.(?:\d{4}|\d{2})"
    r"|(?:19|20)\d{2}\.\s?\d{1,2}\.\s?\d{1,2}\.?|\d{1,2}-\d{1,2}-(?:19|20)\d{2}"
)
_WRITTEN = (
    rf"(?:{_DAY},?\s+)?(?:(?:the\s+)?{_NUMBER_OF_DAY}(?:\s+of)?[\s/-]+)?{_MONTH}"
    rf"(?:[\s-]+{_NUMBER_OF_DAY}\b)?(?:,?\s+{_CLOCK})?(?:,?[\s/-]+(?:\d{{4}}|\d{{2}})\b)?"
    rf"(?:(?:{_AT}|:){_CLOCK})?"
)
# In German, French, Spanish, Portuguese, Italian, Dutch and Russian, with the day's number.
_MONTHS = (
    r"janvier|januari?|janeiro|enero|gennaio|février|februari?|fevereiro|febrero|febbraio|mars|märz"
    r"|maart|março|marzo|avril|april|abril|aprile|mai|mei|maio|mayo|maggio|juin|juni|junho|junio"
    r"|giugno|juillet|juli|julho|julio|luglio|août|august(?:us)?|agosto|septembre|september"
    r"|setembro|septiembre|settembre|octobre|o[kc]tober|outubro|octubre|ottobre|novembre|november"
    r"|novembro|noviembre|décembre|de[zc]ember|dezembro|diciembre|dicembre|января|февраля|марта"
    r"|апреля|мая|июня|июля|августа|сентября|октября|ноября|декабря"
)
_DAYS = (
    r"(?:mon|diens|donners|frei|sams|sonn)tag|mittwoch|sonnabend|lundi|mardi|mercredi|jeudi"
    r"|vendredi|samedi|dimanche|lunes|martes|miércoles|jueves|viernes|sábado|domingo"
    r"|(?:segunda|terça|quarta|quinta|sexta)(?:-feira)?|(?:lune|marte|mercole|giove|vener)dì|sabato"
    r"|domenica|(?:maan|dins|woens|donder|vrij|zater|zon)dag|понедельник|вторник|среда|четверг"
    r"|пятница|суббота|воскресенье"
)
_ELSEWHERE = (
    rf"(?i:(?:\b(?:{_DAYS}),?\s+(?:der\s+|den\s+|le\s+)?)?(?<!\d)\d{{1,2}}(?:\.|er|º)?\s+(?:de\s+)?"
    rf"(?:{_MONTHS})\b(?:\s+(?:del?\s+)?\d{{4}}\b)?)(?:{_AT}{_CLOCK})?"
)
# Seconds since 1970, with three, six or nine more digits.
_EPOCH = r"(?<![\w.])1[4-9]\d{8}(?:\d{3}){0,3}(?:\.\d+)?(?!\w)"
# Year, month, day and clock without separators.
_DIGITS = r"(?<!\w)20[2-4]\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])(?:[T_-]?\d{4}(?:\d{2})?Z?)?(?!\w)"
_AGO = r"\d+(?:\.\d+)?\s*(?:ms|s|sec|seconds?|min|minutes?|h|hours?|days?|weeks?)\s+ago\b"
_QUARTER = r"\bQ[1-4][\s/-]*\d{4}\b|\b\d{4}[\s/-]*Q[1-4]\b"
# Chinese, Japanese and Korean.
_CJK_DAY = r"\d{1,2}\s*[月월]\s*\d{1,2}\s*[日号號일]"
_CJK_CLOCK = (
    r"(?:(?:[上下]午|午[前後]|早上|晚上|凌晨|오[전후])\s*\d{1,2}\s*[点點时時시](?:\s*\d{1,2}\s*[分분])?"
    r"|\d{1,2}\s*[点點时時시]\s*\d{1,2}\s*[分분])(?:\s*\d{1,2}\s*[秒초])?"
)
_CJK_WEEK = (
    r"[(\uff08]?(?:(?:星期|周|週)[一二三四五六日天]|[月火水木金土日]曜日?|[월화수목금토일]요일)[)\uff09]?"
    r"|[(\uff08][月火水木金土日월화수목금토일][)\uff09]"
)
_CJK = (
    rf"(?:(?:\d{{4}}|(?:令和|平成)\s*\d{{1,2}})\s*[年년]\s*(?:{_CJK_DAY}|\d{{1,2}}\s*[月월])|{_CJK_DAY})"
    rf"(?:\s*(?:{_CJK_WEEK}))?(?:\s*(?:{_CJK_CLOCK}|\d{{1,2}}[:時时]\d{{1,2}}))?|(?<![:\w]){_CJK_CLOCK}(?!:)|{_CJK_WEEK}"
)
_YEAR = r"(?<![\w.])(?:19|20)\d{2}(?!\w)"
_DATE = re.compile(
    rf"{_ISO}|(?<![\w.]){_ELSEWHERE}|(?<![\w./-])(?:{_NUMERIC})(?![\w/]|[.-]\d)(?:{_AT}{_CLOCK})?"
    rf"|{_WRITTEN}|{_DAY}(?:{_AT}{_CLOCK})?|{_AGO}|{_CLOCK_ALONE}|{_QUARTER}|{_CJK}|{_EPOCH}|{_DIGITS}"
    rf"|(?:morning|afternoon|evening|night|noon|midnight)\b|{_YEAR}"
)
# Scores, prices and versions look like these, too. Such a number is a date only if one of the words
# of `_CUE` stands before it.
_WEAK = re.compile(
    r"[1-9]\d?:\d{2}|1\d{9}|\d{1,2}\.\d{1,2}\.\d{2}|\d/\d{1,2}/\d{2}|\d{2}/\d/\d{2}|(?:19|20)\d{2}"
)
_CUE = re.compile(
    r"(?:time|clock|\bnow|hour|date|today|year|it(?:'s| is)\b|current|since|until|generated|started"
    r"|created|issued|expires|as of|stamp|epoch|unix|\bts\b|\biat\b|\bexp\b|uhr|heute|datum"
    r"|zeit|jahr|heure|année|hora|fecha|\bhoy\b|año|\boggi\b|\bora\b|anno|\bhoje\b|\bano\b|vandaag|[时時今现現年]"
    r"|врем|сейчас|дата|сегодня|год|시[간각]|오늘)[^\n]{0,24}$",
    re.IGNORECASE,
)
_VERSION = re.compile(r"(?:version|release|build|\bv)[ :=]*$", re.IGNORECASE)
_DOTTED = re.compile(r"[\d.]+")
_UUID = re.compile(r"(?<!\w)[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}(?!\w)")
_NUMBER = re.compile(r"\d[\d,_]*(?:\.\d+)*")
_RUN = re.compile(r"[A-Za-z0-9]+")
_WIDE_RUN = re.compile(r"[A-Za-z0-9_-]+")  # base64 for URLs
_HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+")
# A name in front of a value that says that the value is an id.
_NAMED = re.compile(
    r"(?:id|uuid|guid|nonce|cch|token|session|request|trace|span|run|seed|salt|hash|sha\d*|digest"
    r"|etag|checksum|boundary|marker|sandbox|tmp|temp|cachebust(?:er)?|version|commit|rev(?:ision)?"
    r"|call|toolu|msg|req|chatcmpl|key|sig(?:nature)?)"
    r"[\"'\])}>]*\s*(?:[:=#/_.@-]|\bis\b)?\s*[\"'`(<\[]*(?:[\w.]*[_.-])?$",
    re.IGNORECASE,
)
_N_RANDOM = 6
_N_LONG = 8
_N_LONGER = 4  # two values of one kind differ in length by no more
_N_LETTERS = 16  # base64 of this length has a digit or is improbable


class Value(NamedTuple):
    """A value that changed: [start, before_stop) of one text, [start, after_stop) of the other."""

    kind: DifferenceClass
    start: int
    before_stop: int
    after_stop: int


def changed_value(before: str, after: str, position: int) -> Value | None:
    """Return the values that differ at `position`, None for ordinary text.

    Cost: O(1): only the text near `position` is read.
    """
    low = max(0, position - _REACH)
    here = position - low
    texts = before[low : position + _REACH], after[low : position + _REACH]
    for pattern, kind in (
        (_UUID, DifferenceClass.RANDOM),
        (_DATE, DifferenceClass.DATE),
        (_RUN, DifferenceClass.RANDOM),
        (_WIDE_RUN, DifferenceClass.RANDOM),
        (_NUMBER, DifferenceClass.COUNTER),
    ):
        left, right = (_covering(pattern, text, here) for text in texts)
        if left is None or right is None or left[0] == right[0]:
            continue
        is_named = bool(_NAMED.search(texts[0][: left.start()]))
        runs = left[0], right[0]
        if pattern is _DATE:
            is_found = all(map(_is_date, texts, (left, right)))
        elif pattern is _RUN:
            is_found = _is_random(*runs, is_named=is_named)
        elif pattern is _WIDE_RUN:
            is_found = min(map(len, runs)) >= _N_LONG
            is_found = is_found and abs(len(runs[0]) - len(runs[1])) <= _N_LONGER
            plain = (re.sub("[_-]", "", run) for run in runs)
            is_found = is_found and all(_is_scattered(run, is_named=is_named) for run in plain)
        else:
            is_found = True
        if is_found:
            start = low + min(left.start(), right.start())
            # A full stop after the name of a day is the sentence's as often as the name's.
            stops = [low + one.start() + len(one[0].rstrip(".")) for one in (left, right)]
            return Value(kind, start, *stops)
    return None


def _covering(pattern: re.Pattern[str], text: str, position: int) -> re.Match[str] | None:
    """Return the value that holds `position` or ends there."""
    found = None
    for match in pattern.finditer(text):
        if match.start() > position:
            break
        if match.end() >= position:
            found = match
    return found


def _is_date(text: str, match: re.Match[str]) -> bool:
    """Return whether a text that has the form of a date or clock is one, by the words before it."""
    before = text[: match.start()]
    if _DOTTED.fullmatch(match[0]) and _VERSION.search(before):
        return False
    return not _WEAK.fullmatch(match[0]) or bool(_CUE.search(before))


def _is_random(left: str, right: str, *, is_named: bool) -> bool:
    if left.isdigit() and right.isdigit():
        # Two close numbers are a counter; two far ones with one length and a name are ids.
        is_far = abs(int(left) - int(right)) > 10 ** (len(left) // 2)
        return is_far and len(left) == len(right) >= (_N_RANDOM if is_named else _N_LONG)
    if is_named and min(len(left), len(right)) >= 3 and len(left) == len(right):  # noqa: PLR2004
        return any(any(char.isdigit() for char in run) for run in (left, right))
    if _HEX.fullmatch(left) and _HEX.fullmatch(right) and len(left) == len(right) >= _N_RANDOM:
        return any(
            any(map(str.isdigit, run)) and any(map(str.isalpha, run)) for run in (left, right)
        )
    shortest = _N_RANDOM if is_named else _N_LONG
    is_like = min(len(left), len(right)) >= shortest
    is_like = is_like and abs(len(left) - len(right)) <= _N_LONGER
    return is_like and all(_is_scattered(run, is_named=is_named) for run in (left, right))


def _is_scattered(run: str, *, is_named: bool) -> bool:
    """Return whether the kinds of characters take turns as in base64 or base 36."""
    kinds = [0 if char.isdigit() else 1 if char.islower() else 2 for char in run]
    n_turns = sum(one != other for one, other in pairwise(kinds))
    if 0 in kinds:
        return n_turns >= max(2, len(run) // 5)
    n_letters = _N_LONG if is_named else _N_LETTERS
    return len(run) >= n_letters and n_turns >= len(run) // 3
