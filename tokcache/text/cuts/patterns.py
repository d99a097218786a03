"""The patterns of known pre-tokenizers, whose cuts ship with the package (`regex/known.py`).

Any other pattern is derived when it is first met; an entry here saves that time. It also says that
the faster engines were compared with tokenizers on this pattern: with others, tokenizers encodes.
After a change run `python tools/pattern_tables.py`.

Sources: the tokenizer.json files of the models named; for those marked (llama.cpp), the list of
patterns in src/llama-vocab.cpp of ggml-org/llama.cpp.
"""

from __future__ import annotations

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # without ignoring case
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+"
_POSSESSIVE = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_HAN = r"&&[^\p{Han}]]"
_KIMI_UPPER = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NO_HAN}"
_KIMI_LOWER = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NO_HAN}"
_ASCII_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_RUNS_OF_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))


def _cased(contraction: str, numbers: str, spaces: str = _SPACES) -> str:
    """Return a pattern of the o200k family: a word begins at a capital that follows a small one."""
    return (
        rf"{_UPPER}*{_LOWER}+{contraction}|{_UPPER}+{_LOWER}*{contraction}"
        rf"|{numbers}|{_PUNCTUATION}[\r\n/]*|{spaces}"
    )


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

KNOWN: dict[str, str] = {
    # ByteLevel with its own pattern: GPT-2, OLMo 1, RoBERTa, Whisper, StarCoder, SmolLM, Command R
    "gpt2": GPT2,
    # Llama 3, phi-4, dolma2, Granite 4, GLM-4
    "cl100k": rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n]*|{_SPACES}",
    "cl100k_spelt": rf"{_SPELT}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n]*|{_SPACES}",
    "cl100k_possessive": (
        rf"{_POSSESSIVE}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "tiktoken_cl100k": (
        rf"{_POSSESSIVE}++|\p{{N}}{{1,3}}+| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    ),
    # nanochat: GPT-4's pattern with at most two digits a piece
    "nanochat": (
        rf"{_POSSESSIVE}+|\p{{N}}{{1,2}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    # LLaDA, Ling
    "bailing": (rf"{_POSSESSIVE}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),
    # Qwen 2 to 3, Hunyuan, Grok 2, Solar Open, MiniCPM 4 and 5
    "qwen2": rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_PUNCTUATION}[\r\n]*|{_SPACES}",
    "qwen2_spelt": rf"{_SPELT}|{_WORD}|\p{{N}}|{_PUNCTUATION}[\r\n]*|{_SPACES}",
    "qwen3_5": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
    ),
    "seed_coder": (rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"),
    # Jais 2 (llama.cpp)
    "jais2": (
        rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n]*|\s*[\r\n]+"
        rf"|{_RUNS_OF_SPACES}|\s{{1,2}}(?!\S)|\s{{1}}"
    ),
    # EXAONE MoE (llama.cpp): words of several letters with spaces between them
    "exaone_moe": (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    # gpt-oss, Llama 4, MiniMax M2, and the second stage of Cohere's Aya and Command A
    "o200k": _cased(f"{_CONTRACTION}?", r"\p{N}{1,3}"),
    "o200k_single_digits": _cased(f"{_CONTRACTION}?", r"\p{N}"),  # Youtu, second stage
    # Mistral NeMo and newer, Nemotron 3
    "tekken": _cased("", r"\p{N}"),
    "kimi_k2": (
        rf"[\p{{Han}}]+|{_KIMI_UPPER}*{_KIMI_LOWER}+{_CONTRACTION}?"
        rf"|{_KIMI_UPPER}+{_KIMI_LOWER}*{_CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n]*|{_SPACES}"
    ),
    # DeepSeek V3, R1, V4 and Hunyuan dense; AFMoE's last stage
    "deepseek_v3": (
        rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
    ),
    "deepseek_v3_cjk": "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "numbers_by_three": r"\p{N}{1,3}",
    # DeepSeek Coder, LLM and V2: several stages each
    "newlines": r"[\r\n]",
    "deepseek_coder_letters": r"\s?\p{L}+",
    "deepseek_coder_punctuation": r"\s?\p{P}+",
    "deepseek_letters": (
        "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295"
        "-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-"
        "\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
        "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-"
        "\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
        "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-"
        "\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-"
        "\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e"
        "\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-"
        "\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
        "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
        "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-"
        "\U0001e943]+"
    ),
    "deepseek_punctuation": "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "trailing_spaces": r"\s+$",
    "deepseek_cjk": "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    # Youtu, first stage (llama.cpp)
    "youtu_scripts": (
        "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b"
        "\uff0c\u3001-\u303f\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
    ),
    # AFMoE, second stage (llama.cpp)
    "afmoe_scripts": (
        "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
        "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
        "\u1100-\u11ff]+"
    ),
    # Cohere's Aya and Command A, first stage: three digits at a time from the right
    "aya_digits": r"\d{1,3}(?=(?:\d{3})*\b)",
    "numbers": r"\p{N}+",  # SuperBPE, first stage
    "single_numbers": r"\p{N}",  # Viking, Chameleon
    "falcon_digits": "[0-9][0-9][0-9]",
    "clip": r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    # BLOOM, Poro, Viking
    "bloom": " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
    "laguna_lines": r"(?:\r?\n)+(?!\r?\n)",
}
