"""The cuts of the known patterns, packed; made by tools/pattern_tables.py.

Made with tokenizers 0.23.3. They hold for others, too: the characters of the
rules' classes have had their properties since Unicode 3.2.
"""

RESULTS = {
    "gpt2": "f000007c33e1effb87e0000000000f867c23e19f0fffbbfe 0 7fff 0 1fff",
    "cl100k": "30387e0c20616ffb87fc3f00000001840c2061030bffbbfe 0 7fff 0 1fff",
    "cl100k_spelt": "30387e0c20616ffb87fc3f00000001840c2061030bffbbfe 0 7fff 0 1fff",
    "cl100k_possessive": "30387e0c20616ffb87fc3f00000001840c2061030bffbbfe 0 7fff 0 1fff",
    "tiktoken_cl100k": "30387e0c20616ffb87fc3f00000001840c2061030bffbbfe 0 7fff 0 1fff",
    "nanochat": "30387e0c20616ffb87fc3f00000001840c2061030bffbbfe 0 7fff 0 1fff",
    "bailing": "30b87e0c20616ffb87fc3f00000001840c2061030bfffbfe 0 7fff 0 1fff",
    "qwen2": "30b87e0c20616ffb87fc3f00000001840c2061030bfffbfe 0 7fff 0 1fff",
    "qwen2_spelt": "30b87e0c20616ffb87fc3f00000001840c2061030bfffbfe 0 7fff 0 1fff",
    "qwen3_5": "30b87e0c20616ffb87fc3f00000001840c2061030bfffbfe 0 7fff 0 1fff",
    "seed_coder": "f0b87e3c21e16ffb87fc3f00000007843c21e10f0bfffbfe 0 7fff 0 1fff",
    "jais2": "30387e0c20616ffb87fc3f00000001840c2061030bffbbfe 0 7fff 0 1fff",
    "exaone_moe": "20b87e0c20616efb87fc3f00000001840c2061030bfffbbe 0 7fff 0 1fff",
    "o200k": "30383e0c20616fbb83fc1f00000001840c2061030bffbbee 0 7fff 0 1fff",
    "o200k_single_digits": "30b83e0c20616fbb83fc1f00000001840c2061030bfffbee 0 7fff 0 1fff",
    "tekken": "30b83e0c20616ffb83fc1f00000001840c2061030bfffbfe 0 7fff 0 1fff",
    "kimi_k2": "30387e0c20616fbb87fc3f00000001840c2061030bffbbee 0 7fff 0 1fff",
    "deepseek_v3": "30b87e4c2261effb87fc3f00000009844c2261130b7fdbfe 4002 7fff 2 1fff",
    "deepseek_v3_cjk": "6ffffffffffffefffffffffffffffffffffffffffffffffff 7fff 4400 1fff 400",
    "numbers_by_three": "7ff7fffffffffffffffffffffffffffffffffffffffffbfff 7ffd 4002 1ffd 2",
    "newlines": "7ffffffffffffffffffffffffffffffffffffffffffffffff 5cff 2300 1cff 300",
    "deepseek_coder_letters": (
        "6ffb7fdffffffeffb7fdbfedff6ffbffffffffffffffffbfe 7bfe 67c1 1bfe 7c1"
    ),
    "deepseek_coder_punctuation": (
        "1f0cf867c33e1fffcf867c33e19f0cf867c33e19f0fffffff 77c7 7bfc 17c7 1bfc"
    ),
    "deepseek_letters": "6ffb7fdffffffeffb7fdbfedff6ffbffffffffffffffffbfe 7ffe 67c1 1ffe 7c1",
    "deepseek_punctuation": "1f08f847c23e17ffcf847c23e11f08f847c23e11f0bffe7c2 6fc2 7bfd fc7 1bfd",
    "trailing_spaces": "7ffc001fffffffffc0000000000003fffffffffffffffffff 5c3f 23c0 1fff 3c0",
    "deepseek_cjk": "4febffffff9fd4febffffffffffffffffffffffffffffffff 7fff 4c00 1fff c05",
    "youtu_scripts": "4fffffffffbffefffffffffffffffffffffffffffffffffff 7fff 4c00 1fff c00",
    "afmoe_scripts": "6ffffffffffffefffffffffffffffffffffffffffffffffff 7fff 4400 1fff 400",
    "aya_digits": "6fd3fffffffffffffffffffffffffffffffffffffff7e9fff 7ffd 4002 1fff 2",
    "numbers": "7ff7fffffffffffffffffffffffffffffffffffffffffbfff 7ffd 4002 1ffd 2",
    "single_numbers": "7ffffffffffffffffffffffffffffffffffffffffffffffff 7ffd 4002 1ffd 2",
    "falcon_digits": "7ff7fffffffffffffffffffffffffffffffffffffffffbfff 7fff 4002 1fff 2",
    "clip": "f0bffe7c33e1effbffffffffffffcf867c23e19f0ffffbfe 23c0 5c3f 3c0 1c3f",
    "bloom": "4f03ffffff9e04f03fffffffffcf027813c09e04f027813c0 7bc0 4c7f 1bc0 c7f",
    "laguna_lines": "7fff9ffffffffffff9ffdffffffffffffffffffffffffffff 5dff 2300 1dff 300",
}
