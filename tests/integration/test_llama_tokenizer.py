"""The `tokenizer=` argument: the rules of llama.cpp, with the ids of another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing

import tokcache
from tests.integration.models import GREEDY, llama, plain, store, text
from tokcache import samples
from tokcache.errors import VocabularyMismatch

TEXTS = [
    "",
    "Hello",
    "The import system\n\n  of Python: caf\u00e9 \U0001f600 \u6c49\u5b57",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b <|endoftext|>",
]
BOS, EOS = "<|endoftext|>", "<|im_end|>"


def tiny() -> Tokenizer:
    return Tokenizer.from_file(str(samples.tiny_tokenizer()))


def with_bos() -> Tokenizer:
    """Return a tokenizer that adds BOS itself, as llama-3's does."""
    tokenizer = tiny()
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def bos_model(tmp_path: Path, *, add_eos: bool = False) -> Path:
    """Return a copy of the tiny model whose flags tell llama.cpp to add BOS."""
    import gguf  # noqa: PLC0415 (an extra)

    source = gguf.GGUFReader(str(samples.tiny_model()))
    bos = tiny().token_to_id(BOS)
    path = tmp_path / f"bos-{add_eos}.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for field in source.fields.values():
        name = field.name
        if name.startswith("GGUF.") or name in ("general.architecture", *_FLAGS):
            continue
        kind, sub = field.types[0], field.types[-1]
        is_array = kind == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), kind, sub if is_array else None)
    writer.add_bos_token_id(bos)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(add_eos)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_FLAGS = (
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.bos_token_id",
)


@pytest.mark.parametrize("add_eos", [False, True])
def test_ids_are_llama_cpps_own_with_every_flag(tmp_path: Path, add_eos: bool) -> None:
    model = bos_model(tmp_path, add_eos=add_eos)
    own = plain(model=model)
    wrapped = llama(model=model, tokenizer=tokcache.wrap(with_bos()))
    cached = llama(model=model)
    for string in TEXTS:
        for add_bos in (True, False):
            for special in (True, False):
                arguments = (string.encode(), add_bos, special)
                expected = own.tokenize(*arguments)
                for _ in range(2):
                    assert wrapped.tokenize(*arguments) == expected, arguments
                    assert cached.tokenize(*arguments) == expected, arguments


def test_a_tokenizer_that_adds_bos_gets_exactly_one(tmp_path: Path) -> None:
    llm = llama(store(), model=bos_model(tmp_path), tokenizer=tokcache.wrap(with_bos()))
    bos = llm.token_bos()
    assert llm.tokenize(b"Hello", add_bos=True).count(bos) == 1
    assert llm.tokenize(f"{BOS}Hello".encode(), add_bos=True, special=True).count(bos) == 1
    assert llm.tokenize(b"Hello", add_bos=False).count(bos) == 0
    llm.create_completion("Hello", **GREEDY)
    assert list(llm._input_ids).count(bos) == 1


@pytest.mark.parametrize(
    ("chat_format", "has_bos"), [("llama-2", True), ("chatml", True), (None, False)]
)
def test_a_chat_has_one_bos_at_most(tmp_path: Path, chat_format: str, has_bos: bool) -> None:
    llm = llama(
        store(),
        model=bos_model(tmp_path),
        tokenizer=tokcache.wrap(with_bos()),
        chat_format=chat_format,
    )
    prompts: list[list[int]] = []
    original = llm._hold

    def hold(tokens: list[int]) -> Any:
        prompts.append(list(tokens))
        return original(tokens)

    llm._hold = hold
    llm.create_chat_completion([{"role": "user", "content": "Hello"}], **GREEDY)
    assert prompts[0].count(llm.token_bos()) == int(has_bos)


def test_a_template_that_writes_bos_gets_no_second_one(tmp_path: Path) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: PLC0415

    llm = llama(store(), model=bos_model(tmp_path), tokenizer=tokcache.wrap(with_bos()))
    llm.chat_handler = Jinja2ChatFormatter(
        template="{{ bos_token }}{{ messages[0]['content'] }}",
        eos_token=EOS,
        bos_token=BOS,
    ).to_chat_handler()
    llm.create_chat_completion([{"role": "user", "content": "Hello"}], **GREEDY)
    ids = list(llm._input_ids)
    assert ids[0] == llm.token_bos()
    assert ids[: len(ids) - 5].count(llm.token_bos()) == 1


def test_texts_are_the_same_with_the_wrapped_tokenizer_as_with_the_models_own() -> None:
    ours = llama(store(), tokenizer=tokcache.wrap(tiny()), reproducible=True)
    theirs = llama(reproducible=True)
    for string in (*TEXTS[1:], *TEXTS[1:]):
        theirs.reset()
        answers = [text(x.create_completion(string, **GREEDY)) for x in (ours, theirs)]
        assert answers[0] == answers[1]
        message = [{"role": "user", "content": string}]
        theirs.reset()
        chats = [x.create_chat_completion(message, **GREEDY) for x in (ours, theirs)]
        assert chats[0]["choices"] == chats[1]["choices"]


def test_a_plain_tokenizer_is_wrapped_and_the_cache_is_used() -> None:
    llm = llama(store(), tokenizer=tiny())
    for _ in range(3):
        llm.create_completion("The import system", **GREEDY)
    assert llm.tokenizer_._tokenizer.cache_stats().l0.hits == 2


def test_the_models_own_tokenizer_is_cached_by_l0() -> None:
    llm = llama(scope="a")
    calls: list[bytes] = []
    original = llm._model.tokenize

    def counting(string: bytes, **flags: Any) -> Any:
        calls.append(string)
        return original(string, **flags)

    llm._model.tokenize = counting
    for string in (b"Hello", b"Hello", b"\xff\xfe", b"\xff\xfe"):
        assert llm.tokenize(string) == original(string, add_bos=True, special=False)
    assert calls == [b"Hello", b"\xff\xfe"]


def test_a_list_that_the_caller_changes_changes_nothing_in_the_cache() -> None:
    llm = llama()
    first = llm.tokenize(b"The import system")
    expected = list(first)
    first.append(7)
    first[0] = 9
    assert llm.tokenize(b"The import system") == expected
    assert llm.tokenizer_.int32_ids(first).tolist() == first


def test_ids_of_the_last_text_are_not_converted_again() -> None:
    llm = llama()
    tokens = llm.tokenize(b"The import system " * 20)
    known = llm.tokenizer_.int32_ids(tokens)
    assert not known.flags.writeable  # the TokenIds' own memory
    assert llm.tokenizer_.int32_ids([3, *tokens]).tolist() == [3, *tokens]
    for other in ([], [5], [*tokens[:-1], 5], [1, 2, *tokens]):
        assert llm.tokenizer_.int32_ids(other).tolist() == other


def test_bytes_that_are_not_utf8_are_encoded_by_the_model() -> None:
    llm, own = llama(tokenizer=tokcache.wrap(tiny())), plain()
    assert llm.tokenize(b"caf\xc3", False, True) == own.tokenize(b"caf\xc3", False, True)


def test_the_model_detokenizes() -> None:
    llm, own = llama(tokenizer=tokcache.wrap(tiny())), plain()
    tokens = own.tokenize(TEXTS[2].encode() + b"<|im_end|>", special=True)
    for special in (True, False):
        expected = own.detokenize(tokens, special=special)
        assert llm.detokenize(tokens, prev_tokens=[5, 6], special=special) == expected


def changed(change: Any) -> Tokenizer:
    data = json.loads(samples.tiny_tokenizer().read_text())
    change(data)
    return Tokenizer.from_str(json.dumps(data))


def _swap(data: Any) -> None:
    vocab = data["model"]["vocab"]
    one, two = [piece for piece, token in vocab.items() if token in (1000, 1001)]
    vocab[one], vocab[two] = vocab[two], vocab[one]


def test_another_vocabulary_is_a_clear_error_before_the_first_token() -> None:
    with pytest.raises(VocabularyMismatch, match=r"2,048 tokens.*first that differs is id 1000"):
        llama(tokenizer=tokcache.wrap(changed(_swap)))


def test_a_tokenizer_with_more_ids_than_the_model_is_a_clear_error() -> None:
    larger = tiny()
    larger.add_tokens(["<extra>"])
    with pytest.raises(VocabularyMismatch, match=r"has 2,049 tokens.*has 2,048.*nothing in the"):
        llama(tokenizer=tokcache.wrap(larger))


def test_a_model_padded_to_more_ids_than_the_tokenizer_is_fine(tmp_path: Path) -> None:
    larger = tiny()
    larger.add_tokens(["<pad0>", "<pad1>"])
    larger.save(str(tmp_path / "tokenizer.json"))
    model = samples.tiny_model(tmp_path / "tokenizer.json", folder=tmp_path)
    llm = llama(store(), model=model, tokenizer=tokcache.wrap(tiny()))
    assert llm.create_completion("Hello", **GREEDY)


@pytest.mark.parametrize("special", [False, True])
def test_a_change_of_the_wrapped_tokenizer_is_seen(special: bool) -> None:
    wrapped = tokcache.wrap(tiny())
    llm = llama(tokenizer=wrapped)
    string = "The IMPORT System<|im_end|>"
    before = llm.tokenize(string.encode(), False, special)
    wrapped.normalizer = Lowercase()
    after = llm.tokenize(string.encode(), False, special)
    assert after != before
    assert after == llama(tokenizer=wrapped).tokenize(string.encode(), False, special)
    copy = llm.tokenizer_._as_text
    llm.tokenize(b"Another", False, special)
    assert llm.tokenizer_._as_text is copy
