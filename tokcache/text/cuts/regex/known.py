"""The cuts of the known patterns, packed; made by tools/pattern_tables.py.

Made with tokenizers 0.23.3. They hold for others, too: the characters of the
rules' classes have had their properties since Unicode 3.2.
"""

RESULTS = {
    "gpt2": "3c00007c3bfec3f0000000007c37c27c37c3ffdbfe 0 3fff 0 fff",
    "cl100k": "c0c3f0c2bfec3fc3f0000000c20c20c20c2ffdbfe 0 3fff 0 fff",
    "cl100k_spelt": "c0c3f0c2bfec3fc3f0000000c20c20c20c2ffdbfe 0 3fff 0 fff",
    "cl100k_possessive": "c0c3f0c2bfec3fc3f0000000c20c20c20c2ffdbfe 0 3fff 0 fff",
    "tiktoken_cl100k": "c0c3f0c2bfec3fc3f0000000c20c20c20c2ffdbfe 0 3fff 0 fff",
    "nanochat": "c0c3f0c2bfec3fc3f0000000c20c20c20c2ffdbfe 0 3fff 0 fff",
    "bailing": "c2c3f0c2bfec3fc3f0000000c20c20c20c2fffbfe 0 3fff 0 fff",
    "qwen2": "c2c3f0c2bfec3fc3f0000000c20c20c20c2fffbfe 0 3fff 0 fff",
    "qwen2_spelt": "c2c3f0c2bfec3fc3f0000000c20c20c20c2fffbfe 0 3fff 0 fff",
    "qwen3_5": "c2c3f0c2bfec3fc3f0000000c20c20c20c2fffbfe 0 3fff 0 fff",
    "seed_coder": "3c2c3f3c2bfec3fc3f0000003c23c23c23c2fffbfe 0 3fff 0 fff",
    "jais2": "c0c3f0c2bfec3fc3f0000000c20c20c20c2ffdbfe 0 3fff 0 fff",
    "exaone_moe": "82c3f0c2bbec3fc3f0000000c20c20c20c2fffbbe 0 3fff 0 fff",
    "o200k": "c0c1f0c2beec1fc1f0000000c20c20c20c2ffdbee 0 3fff 0 fff",
    "o200k_single_digits": "c2c1f0c2beec1fc1f0000000c20c20c20c2fffbee 0 3fff 0 fff",
    "tekken": "c2c1f0c2bfec1fc1f0000000c20c20c20c2fffbfe 0 3fff 0 fff",
    "kimi_k2": "c0c3f0c2beec3fc3f0000000c20c20c20c2ffdbee 0 3fff 0 fff",
    "deepseek_v3": "c2c3f4c3bfec3fc3f0000004c24c24c24c2bfebfe 2002 3fff 2 fff",
    "deepseek_v3_cjk": "bffffffffbffffffffffffffffffffffffffffffff 3fff 2400 fff 400",
    "numbers_by_three": "ffdfffffffffffffffffffffffffffffffffffdfff 3ffd 2002 ffd 2",
    "newlines": "ffffffffffffffffffffffffffffffffffffffffff 2cff 1300 cff 300",
    "deepseek_coder_letters": "bfebfefffbfebfebfebfebfefffffffffffffffbfe 3bfe 37c1 bfe 7c1",
    "deepseek_coder_punctuation": "7c37c37c3fff7c37c37c37c37c37c37c37c3ffffff 37c7 3bfc 7c7 bfc",
    "deepseek_letters": "bfebfefffbfebfebfebfebfefffffffffffffffbfe 3ffe 37c1 ffe 7c1",
    "deepseek_punctuation": "7c27c27c2fff7c27c27c27c27c27c27c27c2fff7c2 3fc2 3bfd fc7 bfd",
    "trailing_spaces": "fff000ffffff000000000000ffffffffffffffffff 2c3f 13c0 fff 3c0",
    "deepseek_cjk": "3fafff3fa3faffffffffffffffffffffffffffffff 3fff 2c00 fff c05",
    "youtu_scripts": "3fffff7ffbffffffffffffffffffffffffffffffff 3fff 2c00 fff c00",
    "afmoe_scripts": "bffffffffbffffffffffffffffffffffffffffffff 3fff 2400 fff 400",
    "aya_digits": "bf4fffffffffffffffffffffffffffffffffbf4fff 3ffd 2002 fff 2",
    "numbers": "ffdfffffffffffffffffffffffffffffffffffdfff 3ffd 2002 ffd 2",
    "single_numbers": "ffffffffffffffffffffffffffffffffffffffffff 3ffd 2002 ffd 2",
    "falcon_digits": "ffdfffffffffffffffffffffffffffffffffffdfff 3fff 2002 fff 2",
    "clip": "3c2fff7c3bfeffffffffffff7c37c27c37c3fffbfe 13c0 2c3f 3c0 c3f",
    "bloom": "3c0fff3c03c0fffffffff3c03c03c03c03c03c03c0 3bc4 2c7f bc4 c7f",
    "laguna_lines": "fffcffffffffcffdffffffffffffffffffffffffff 2dff 1300 dff 300",
}
