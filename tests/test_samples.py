"""Sample files load, match their tokenizer, and have output that shows a wrong state."""

from __future__ import annotations

import builtins
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tokcache import samples
from tokcache.errors import (
    InvalidConfig,
    InvalidModel,
    MissingExtra,
    MissingFile,
    UnsupportedTokenizer,
)

TEXTS = (
    "Hello world, it's 12345 o'clock!\n\n  indented = x\n",
    "def f(a):\n\treturn a*2 # ok",
    "  leading and trailing  ",
    "日本語 текст émigré 😀",
    "<|im_start|>user\nHi<|im_end|>",
)
BUNDLED = ("qwen2.5", "gpt2", "minimind", "phi-3-mini")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


def load(model: Path, **kwargs: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return llama_cpp.Llama(str(model), n_ctx=1024, verbose=False, n_threads=2, **kwargs)


def greedy(llm: Any, tokens: list[int], n: int = 24) -> list[int]:
    llm.reset()
    llm._ctx.kv_cache_clear()
    return [token for token, _ in zip(llm.generate(tokens, temp=0.0), range(n), strict=False)]


def bundled(name: str) -> Path:
    root = Path(os.environ.get("TOKCACHE_SHARED_DATA", Path(__file__).parents[2] / "shared/data"))
    path = root / "tokenizers" / name / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"the bundled tokenizer {name} is not here (TOKCACHE_SHARED_DATA)")
    return path


def test_the_tokenizer_has_chat_tokens_and_decodes_its_own_ids(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(samples.tiny_tokenizer(folder)))
    assert tokenizer.get_vocab_size() == 2048
    assert [tokenizer.token_to_id(f"<|{name}|>") for name in ("endoftext", "im_start", "im_end")]
    assert len(tokenizer.encode("<|im_start|><|im_end|>").ids) == 2
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_another_process_makes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from tokcache import samples;"
        "print(samples.tiny_tokenizer(sys.argv[1])); print(samples.tiny_model(folder=sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    made = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    theirs = [Path(line) for line in made.stdout.split("\n") if line]
    ours = [samples.tiny_tokenizer(folder), samples.tiny_model(folder=folder)]
    assert [p.relative_to(tmp_path) for p in theirs] == [p.relative_to(folder) for p in ours]
    assert [path.read_bytes() for path in theirs] == [path.read_bytes() for path in ours]


def test_files_are_reused_and_every_argument_makes_another_file(folder: Path) -> None:
    first = samples.tiny_model(folder=folder)
    stamp = first.stat().st_mtime_ns
    assert samples.tiny_model(folder=folder) == first
    assert first.stat().st_mtime_ns == stamp
    others = (
        samples.tiny_model(folder=folder, seed=7),
        samples.tiny_model(folder=folder, n_layers=2),
        samples.tiny_model(folder=folder, n_ctx_train=512),
        samples.tiny_model(folder=folder, architecture="mamba"),
    )
    assert len({first, *others}) == 5
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TOKCACHE_CACHE_DIR", raising=False)
    assert samples.cache_folder() == tmp_path / "xdg" / "tokcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert samples.cache_folder() == tmp_path / "home" / ".cache" / "tokcache"
    monkeypatch.setenv("TOKCACHE_CACHE_DIR", str(tmp_path / "own"))
    assert samples.tiny_tokenizer().is_relative_to(tmp_path / "own")


@pytest.mark.parametrize("architecture", samples.ARCHITECTURES)
def test_every_memory_kind_loads_and_its_text_depends_on_the_whole_state(
    architecture: str, folder: Path
) -> None:
    llm = load(samples.tiny_model(folder=folder, architecture=architecture))
    import llama_cpp  # noqa: PLC0415 (load() skipped without it)

    model = llm._model.model
    kinds = {
        "attention": (False, False, False),
        "sliding window": (False, False, True),
        "recurrent": (True, False, False),
        "hybrid": (False, True, False),
        "hybrid with a window": (False, True, True),
    }
    found = (
        llama_cpp.llama_model_is_recurrent(model),
        llama_cpp.llama_model_is_hybrid(model),
        llama_cpp.llama_model_n_swa(model) > 0,
    )
    assert found == kinds[samples.ARCHITECTURES[architecture].memory]
    rng = random.Random(5)
    prompt = [rng.randrange(3, 2048) for _ in range(400)]
    # Two layers with windows of 32 tokens see only the last 64 tokens.
    n_wrong = 380 if architecture == "lfm2-windowed" else 300
    wrong = [rng.randrange(3, 2048) for _ in range(n_wrong)] + prompt[n_wrong:]
    expected = greedy(llm, prompt)
    assert expected == greedy(llm, prompt)
    assert expected != greedy(llm, wrong)
    assert len(set(expected)) > 5


@pytest.mark.parametrize("name", ["tiny", *BUNDLED])
def test_llama_cpp_gives_the_ids_of_the_tokenizer(name: str, folder: Path) -> None:
    source = samples.tiny_tokenizer(folder) if name == "tiny" else bundled(name)
    tokenizer = Tokenizer.from_file(str(source))
    sizes: dict[str, Any] = {"n_layers": 1, "n_embd": 32, "n_heads": 1, "n_kv_heads": 1, "n_ff": 32}
    llm = load(samples.tiny_model(source, folder=folder, **sizes), vocab_only=True)
    for text in TEXTS:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert llm.tokenize(text.encode(), add_bos=False, special=True) == expected, text
        assert llm.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text).ids


def test_a_bos_adding_tokenizer_makes_a_bos_adding_model(folder: Path, tmp_path: Path) -> None:
    description = json.loads(samples.tiny_tokenizer(folder).read_text())
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    source = tmp_path / "tokenizer.json"
    source.write_text(json.dumps(description))
    llm = load(samples.tiny_model(source, folder=folder), vocab_only=True)
    expected = Tokenizer.from_file(str(source)).encode("some text").ids
    assert expected[0] == 0
    assert llm.tokenize(b"some text", add_bos=True) == expected


def test_a_unigram_tokenizer_makes_a_model(folder: Path) -> None:
    llm = load(samples.tiny_model(bundled("t5-small"), folder=folder, n_layers=1))
    expected = Tokenizer.from_file(str(bundled("t5-small"))).encode("Translate this text").ids
    assert llm.tokenize(b"Translate this text", add_bos=True) == expected
    assert greedy(llm, expected, 4)


def test_a_wordpiece_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedTokenizer, match="byte-level BPE"):
        samples.tiny_model(bundled("bert-base-uncased"))


def test_a_lora_changes_the_text(folder: Path) -> None:
    model = samples.tiny_model(folder=folder)
    adapters = [samples.tiny_lora(model, seed=seed, folder=folder) for seed in (1, 2)]
    prompt = list(range(10, 90))
    texts = [greedy(load(model), prompt)]
    texts += [greedy(load(model, lora_path=str(path)), prompt) for path in adapters]
    assert len({tuple(text) for text in texts}) == 3
    assert samples.tiny_lora(model, seed=1, folder=folder) == adapters[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gpt-9"}, "architecture must be one of llama"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"n_heads": 3}, "multiple of n_heads"),
    ],
)
def test_the_error_names_an_invalid_setting(
    arguments: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        samples.tiny_model(folder=folder, **arguments)


def test_the_error_names_a_file_that_is_not_a_tokenizer_or_model(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingFile, match="absent"):
        samples.tiny_model(tmp_path / "absent.json", folder=folder)
    (tmp_path / "text.json").write_text("no json")
    with pytest.raises(UnsupportedTokenizer, match="not valid JSON"):
        samples.tiny_model(tmp_path / "text.json", folder=folder)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UnsupportedTokenizer, match="list"):
        samples.tiny_model(tmp_path / "list.json", folder=folder)
    with pytest.raises(MissingFile, match="absent"):
        samples.tiny_lora(tmp_path / "absent.gguf", folder=folder)
    (tmp_path / "text.gguf").write_bytes(b"no model at all " * 8)
    with pytest.raises(InvalidModel, match="not a GGUF"):
        samples.tiny_lora(tmp_path / "text.gguf", folder=folder)


def test_without_gguf_the_message_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtra, match=r"pip install 'tokcache\[demo\]'"):
        samples.tiny_model(folder=folder)
