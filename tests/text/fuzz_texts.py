"""Texts to test a segment cache with: fragments whose ids depend on their neighbours, and chats.

Everything is drawn from a `random.Random`, so the same seed gives the same texts. `added` are the
strings of the tokenizer's added tokens; `corpus` may hold more texts to take excerpts from.
"""
# ruff: noqa: RUF001 (this file needs letters of many scripts)

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

WORDS = {
    "en": "the of and a to in he is was for on are with his they hello world New York don't we'll "
    "I'm it's YOU'RE they'Ve naive user assistant system quick brown fox list file end",
    "de": "der die und über Straße schön größer Äpfel Übermut nicht dass weiß Donaudampfschiff",
    "fr": "le la où été garçon l'école d'accord ça n'est œuvre à côté Noël aujourd'hui",
    "ru": "и в не на это привет мир съешь ещё этих мягких булок проверка йод Ёлка",
    "zh": "你好 世界 今天天气很好 北京 我们去吗 中文 测试 的 是 一 不",
    "ja": "東京 の 天気 は どう です か テスト カタカナ ひらがな ー 々 ｶﾀｶﾅ",
    "ko": "안녕하세요 세계 한국어 텍스트 입니다 가 각 힣 \u1100\u1161 \u1112\u1161\u11ab",
    "ar": "مرحبا بالعالم اللغة العربية اختبار السلام عليكم ١٢٣ ٤٥٦",
    "hi": "नमस्ते दुनिया हिन्दी परीक्षण क्षत्रिय ज्ञान १२३ श्री",
    "th": "สวัสดีชาวโลก ภาษาไทย ทดสอบ ก็ ที่ นี้ ๑๒๓",
    "el": "γειά σου κόσμε ελληνικά δοκιμή ΟΔΟΣ ὁδός ΰ",
    "he": "שלום עולם עברית בדיקה שָׁלוֹם",
    "vi": "xin chào thế giới tiếng Việt được không Đà Nẵng",
    "tr": "İstanbul ışık ıssız ŞİŞLİ güneş I i İ ı",
}


def _split(words: str) -> list[str]:
    return words.split(" ")


WHITESPACE = list(
    " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f"
    "\u205f\u3000"
)
NOT_WHITESPACE = list(
    "\x00\x01\x07\x08\x1b\x7f\x80\x9f\xad\u180e\u200b\u2060\ufeff\ufffd\ufff9\ufffe"
)
NEWLINES = [*_split("\n \r\n \r \n\r \n\n \r\n\r\n \n\t \u2028 \n\n\n"), " \n", "\n "]
# The \u017f is a long s, which (?i:'s) may match.
CONTRACTIONS = [
    *_split(
        "'s 't 're 've 'm 'll 'd 'S 'T 'LL 'Re 'lL ' '' ''s s' 'x ’s ’t ‘ 's's 'll's '\u017f '\n"
    ),
    " 's",
    "' s",
]
DIGITS = _split(
    "0 1 12 123 1234 123456789012345678901234567890 3.14 1,000 ½ ² Ⅷ ١٢ ① 𝟙𝟚 १ 0x1F 1e-9 "
    "12:30 2024-01-02 ٣.٥ ㊿"
)
EMOJI = _split(
    "😀 👩\u200d💻 👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇩🇪 🇩 👍🏽 ❤\ufe0f ☎ \u200d \ufe0f 🫠 "
    "1\ufe0f⃣ 🏽"
)
MARKS = _split(
    "e\u0301 \u0301 a\u0323\u0307 \u0307\u0323 n\u0303o \u0345 \u0f71\u0f72 ำ "
    "q\u0307\u0323\u0307 =\u0338 <\u0338 .e\u0301 \u1e9b\u0323 \u2126 \u212b \uac00\u11a8 \u093c"
)
FOLDED = _split("ﬁ ﬀ ß ẞ ĳ İ \u212a \u017f \u2126 ﷺ Ａｂ … ℃ ㌔ ª µ ǆ `` ''")
NEWER_UNICODE = _split(
    "\ua7dc \u1c89 \U00010ec3 \U00016d40 \U0001c8c0 \U000105c0 \u0897 \U00011f02 "
    "\U00031350 \U0002ebf0 ꟲ ࡰ \U0001e4d0 \U0001fae9 ⃀ \U0001cc00 \U000e0041 \u0378 "
    "\U0010ffff \ue000"
)
ASTRAL = _split("𝒳 𐐀𐐨 𠀀 𞤀 𝕳𝖊𝖑𝖑𝖔 𐍈 𐎀 𒀀 𓀀 𐲀")
PUNCTUATION = _split(
    "... — // / :// -> == !! ?! ， 。 ！？ «» _ __ ▁ ▁▁ Ġ ## ##a < > </ <| |> $ € ` ^ ~ + | ( "
    ")}] .\n !\n\n ;\r\n )\n/ \n/ //\n/ ...\n//x ¿ · ’ “x” % &amp;"
)
NAUGHTY = [
    "",
    "undefined",
    "NULL",
    "%s%d%n",
    "<script>alert('x')</script>",
    "1;DROP TABLE users--",
    "../../etc/passwd\x00",
    "Ω≈ç√∫˜µ≤≥÷",
    "T̸̡̫̣̎h̷̢̛̗ȩ̶̭́",
    "\u202etest\u202c",
    "社會科學院語學研究所",
    "ヽ༼ຈل͜ຈ༽ﾉ",
    "(╯°□°）╯︵ ┻━┻)",
    "﷽",
    "{{ x }} ${y} #{z}",
    "\\n \\u0041 \\",
    "A" * 130,
    "=" * 70,
    "-" * 33 + ">",
    "ab|cd|ef ab|cdcd|ef",
    "<s>x<s>xy</s><s><s>",
    "<0x0A><0xFF><0x",
    "[CLS][SEP][UNK][MASK] [PAD]",
    "<|im_start|><|im_end|><|endoftext|><|im_st",
    "New York a\nb x  y NewYork a\n b",
]
CODE = [
    "def main(argv: list[str]) -> int:\n    for name in argv[1:]:\n        print(f'Hi, {name}!')\n",
    "if (x == NULL) {\n\t\treturn -1;\n\t}\n\n\t/* done */\r\n#include <stdio.h>\r\n",
    "    return self._x  # noqa\n\n\nclass A(B):\n    '''It's a \"doc\".'''\n",
    "SELECT a.b, COUNT(*) FROM t WHERE c = 'd''e' GROUP BY 1;\n",
    '<div class="a b">\n  <p>don\'t</p>\n</div>\n\n<!-- // -->\n',
    '$ ls -la | grep "x" && cat /etc/hosts > /dev/null 2>&1\n',
    "https://example.org/a/b?c=d&e=f%20g#h\n/path/to/file.py:12:3: E501\n",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n* x\n* y\n    1. z\n",
]
TEMPLATES = [
    ("<|im_start|>user\n", "<|im_end|>\n"),
    ("<|im_start|>assistant\n", "<|im_end|>\n"),
    ("<s>[INST] ", " [/INST]</s>"),
    ("### User:\n", "\n\n"),
    ("[CLS] ", " [SEP]"),
    ("<|user|>\n", "<|end|>\n"),
    ("", "\n"),
    ("", " "),
    ("\r\n> ", "\r\n"),
    ("", ""),
]
CEILINGS = (0x7F, 0xFF, 0xFFFF, 0x10FFFF)  # the largest code point of each width of Python strings

_Maker = Callable[[random.Random, list[str]], str]


def _pick(*choices: Sequence[str]) -> _Maker:
    flat = [one for several in choices for one in several]
    return lambda rng, _: rng.choice(flat)


_ENGLISH = WORDS["en"].split(" ")
_WORDS = [words.split(" ") for words in WORDS.values()]


def _word(rng: random.Random, _: list[str]) -> str:
    return rng.choice(_ENGLISH if rng.random() < 0.5 else rng.choice(_WORDS))


def _sentence(rng: random.Random, _: list[str]) -> str:
    words = _ENGLISH if rng.random() < 0.4 else rng.choice(_WORDS)
    mark = "" if words in (_WORDS[4], _WORDS[5]) else " "
    return mark.join(rng.choice(words) for _ in range(rng.randint(2, 14))) + rng.choice(
        [".", ". ", "! ", "?\n", ",", "", " ", "。"]
    )


def _whitespace_run(rng: random.Random, _: list[str]) -> str:
    if rng.random() < 0.6:
        return rng.choice(" \n\t") * rng.choice([1, 2, 2, 3, 4, 7, 16, 40])
    return "".join(rng.choice(WHITESPACE) for _ in range(rng.randint(1, 5)))


def _letters(rng: random.Random, _: list[str]) -> str:
    """Return arbitrary code points that are close to each other."""
    start = rng.choice([0x20, 0xA0, 0x300, 0x600, 0x900, 0x2000, 0x3000, 0xA000, 0xFB00])
    start = rng.randrange(0xE000, 0x110000 - 64) if rng.random() < 0.2 else start
    return "".join(chr(start + rng.randrange(64)) for _ in range(rng.randint(1, 6)))


def _json(rng: random.Random, added: list[str]) -> str:
    one: Any = {_word(rng, added): rng.choice([1, None, True, -0.5, _word(rng, added)])}
    whole = {"id": rng.randrange(10**6), "tags": [_word(rng, added)] * rng.randint(0, 3), "x": one}
    return json.dumps(
        whole, indent=rng.choice([None, 2, 4]), ensure_ascii=rng.random() < 0.5
    ) + rng.choice(["", "\n"])


def _added(rng: random.Random, added: list[str]) -> str:
    """Return an added token's string: joined to others, truncated, overlapping, in another case."""
    if not added:
        return ""
    one, other = rng.choice(added), rng.choice(added)
    split = rng.randint(0, len(one))
    return rng.choice(
        [
            one,
            one,
            one,
            f" {one} ",
            f"{one}{other}",
            f"{one} {other}\n",
            f"x{one}",
            f"{one}x",
            f"é{one}1",
            f"\n{one}\n\n",
            f"  \t{one} \u3000",
            f"_{one}'s",
            one[:split],
            one[split:],
            one[:-1] + other,
            one[:split] + one,
            one.lower(),
            one.upper(),
            one.replace("|", "").replace("<", "＜"),
            f"{one[:split]} {one[split:]}",
        ]
    )


# A cut next to any of these could be wrong.
CHARS = (
    *"aabbeAE1122=!.,'_/`<>\"- ",
    *["  ", " ", " ", " ", "\n", "\n", "\t", "\r\n", "\n\n", "``", "''"],
    *["\u0338", "\u0301", "\xe9", "\u2026", "\u4f60", "\u2260", "\u2581", "\u3000", "\x00", "\xa0"],
    *["it's", "ab", "new york", "12", "=\u0338", "e\u0301", ".e\u0301", "a_b", "<x>", "</s>"],
)


def dense_text(rng: random.Random, added: Sequence[str], n_chars: int = 40) -> str:
    """Return a text of few different characters, so that rare pairs of neighbours occur."""
    parts: list[str] = []
    few = rng.sample(CHARS, rng.randint(2, 12))
    length = 0
    while length < n_chars:
        parts.append(rng.choice(added) if added and rng.random() < 0.2 else rng.choice(few))
        length += len(parts[-1])
    return "".join(parts)


_MAKERS: list[tuple[int, _Maker]] = [
    (30, _word),
    (22, _sentence),
    (18, _whitespace_run),
    (16, _added),
    (6, _pick(NEWLINES)),
    (6, _pick(PUNCTUATION)),
    (5, _pick(CONTRACTIONS)),
    (4, _pick(DIGITS)),
    (3, _pick(CODE)),
    (3, _pick(NAUGHTY)),
    (3, _pick(MARKS, FOLDED)),
    (2, _pick(EMOJI, ASTRAL)),
    (2, _pick(NEWER_UNICODE, NOT_WHITESPACE)),
    (2, _json),
    (2, lambda rng, added: dense_text(rng, added, 12)),
    (2, _letters),
]
_WEIGHTS = [weight for weight, _ in _MAKERS]


def fragment(rng: random.Random, added: list[str]) -> str:
    """Return one random fragment: a word, a sentence, whitespace, an added token and so on."""
    maker = rng.choices(_MAKERS, _WEIGHTS)[0][1]
    return maker(rng, added)


def _excerpt(rng: random.Random, corpus: Sequence[str]) -> str:
    text = rng.choice(corpus)
    start = rng.randrange(max(1, len(text) - 200)) if rng.random() < 0.3 else 0
    return text[start : start + rng.choice([30, 200, 1500])]


def _without_above(text: str, ceiling: int) -> str:
    if text.isascii():
        return text
    return "".join(letter for letter in text if ord(letter) <= ceiling)


def random_text(
    rng: random.Random,
    added: list[str],
    corpus: Sequence[str] = (),
    ceiling: int = CEILINGS[-1],
    n_chars: int | None = None,
) -> str:
    """Return a text of about `n_chars` characters; by default most are short and some are long."""
    if n_chars is None:
        n_chars = rng.choice([0, 1, 3, 10, 30, 30, 100, 100, 300, 300, 1000, 3000])
    parts: list[str] = []
    length = 0
    glue = rng.choice(["", " ", " ", "\n"])
    while length < n_chars:
        if corpus and rng.random() < 0.05:
            part = _excerpt(rng, corpus)
        elif parts and rng.random() < 0.08:
            part = rng.choice(parts)
        else:
            part = fragment(rng, added)
        part = _without_above(part, ceiling) + (glue if rng.random() < 0.7 else "")
        parts.append(part)
        length += max(1, len(part))
    return "".join(parts)


def _message(rng: random.Random, added: list[str], corpus: Sequence[str], ceiling: int) -> str:
    opening, closing = rng.choice(TEMPLATES[:3] if rng.random() < 0.5 else TEMPLATES)
    n_chars = rng.choice([5, 40, 150, 150, 500, 1500, 1500, 4000])
    return opening + random_text(rng, added, corpus, ceiling, n_chars) + closing


def _edited(rng: random.Random, text: str, added: list[str], ceiling: int) -> str:
    """Return `text` with a few characters inserted, removed or replaced."""
    start = rng.randint(0, len(text))
    end = min(len(text), start + rng.choice([0, 0, 1, 1, 2, 30]))
    new = "" if rng.random() < 0.2 else _without_above(fragment(rng, added), ceiling)
    return text[:start] + new + text[end:]


def histories(
    rng: random.Random,
    added: list[str],
    corpus: Sequence[str] = (),
    max_chars: int = 20_000,
    n_steps: int = 16,
) -> Iterator[str]:
    """Yield the prompts of a growing chat, with messages edited, truncated and swapped in between.

    No prompt is longer than `max_chars`. The character width of the strings may change within a
    history, or stay the same.
    """
    ceiling = rng.choice(CEILINGS)
    parts = [_message(rng, added, corpus, ceiling) for _ in range(rng.randint(1, 3))]
    for _ in range(n_steps):
        whole = "".join(parts)
        if len(whole) > max_chars:  # drop the front, within a message
            parts = [whole[len(whole) - max_chars * rng.randint(3, 9) // 10 :]]
            whole = parts[0]
        yield whole
        _step(rng, parts, added, corpus, ceiling)


def _step(
    rng: random.Random, parts: list[str], added: list[str], corpus: Sequence[str], ceiling: int
) -> None:
    """Change a history as chats and agents do."""
    at = rng.randrange(len(parts))
    draw = rng.random()
    if draw < 0.45:
        parts.append(_message(rng, added, corpus, ceiling))
    elif draw < 0.55:
        parts.append(parts[at])
    elif draw < 0.7:
        parts[at] = _edited(rng, parts[at], added, ceiling)
    elif draw < 0.77:
        other = rng.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    elif draw < 0.84:
        parts[0] = parts[0][rng.randint(0, len(parts[0])) :]
    elif draw < 0.9:
        parts[-1] = parts[-1][: rng.randint(0, len(parts[-1]))]
    elif draw < 0.95:
        parts.append(_without_above(fragment(rng, added), ceiling))
    else:  # a letter that may change the character width of the whole string
        parts.append(rng.choice("aé你😀"))


@cache
def corpus_of(shared: Path) -> list[str]:
    """Return naughty strings, messages in ten languages and code from a folder of corpora."""
    corpora = shared / "corpora"
    naughty = json.loads((corpora / "blns" / "blns.json").read_text())
    found = [one for path in sorted((corpora / "i18n").iterdir()) for one in _leaves(path)[:60]]
    with gzip.open(corpora / "human-eval" / "HumanEval.jsonl.gz", "rt") as lines:
        tasks = [json.loads(line) for line in lines]
    code = [task["prompt"] + task["canonical_solution"] for task in tasks]
    return [*naughty, *found, *code]


def _leaves(path: Path) -> list[str]:
    found: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, dict):
            for one in node.values():
                walk(one)

    walk(json.loads(path.read_text()))
    return found
