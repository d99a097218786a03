from __future__ import annotations

import logging
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import tokcache.llama
from tests.integration.models import (
    BLOCK,
    GREEDY,
    SETTINGS,
    llama,
    llama_cpp,
    plain,
    store,
    text,
)
from tokcache import samples
from tokcache.errors import (
    FileChanged,
    InvalidConfig,
    InvalidModel,
    InvalidScope,
    InvalidText,
    InvalidTokens,
    MissingExtra,
    MissingFile,
)
from tokcache.llama.fingerprint import LoadedFiles
from tokcache.llama.reasons import REASONS, explained

LONG = "The import system of Python: " * 12


def test_a_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path, str(tmp_path), "a\0b"):
        with pytest.raises(MissingFile, match="no model file"):
            llama(model=path)
    with pytest.raises(MissingFile, match="it is a folder"):
        llama(model=tmp_path)
    with pytest.raises(MissingFile, match="no model file; pass"):
        tokcache.llama.Llama("")
    wrong_kinds: list[Any] = [None, 5, b"model.gguf", ["model.gguf"]]
    for wrong in wrong_kinds:
        with pytest.raises(InvalidModel, match="path of a GGUF file"):
            tokcache.llama.Llama(wrong)


@pytest.mark.parametrize("kept", [0, 3, 4, 100, 5000, 0.5, 0.99])
def test_a_damaged_model_is_a_clear_error(tmp_path: Path, kept: float) -> None:
    whole = samples.tiny_model().read_bytes()
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(InvalidModel):
        llama(model=path)


def test_another_files_model_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"{}" * 100)
    with pytest.raises(InvalidModel, match="convert"):
        llama(model=path)


def test_a_scope_is_a_str_or_none() -> None:
    with pytest.raises(InvalidScope, match="scope"):
        llama(scope=7)


def test_without_llama_cpp_the_message_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tokcache\[llama\]'"):
        _ = tokcache.llama.Llama
    with pytest.raises(AttributeError):
        _ = tokcache.llama.Nothing


def test_importing_the_package_imports_no_llama_cpp() -> None:
    code = "import sys, tokcache, tokcache.llama; sys.exit('llama_cpp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def test_a_pickle_has_the_settings_and_no_cache() -> None:
    llm = llama(store(), reproducible=True, scope="a")
    copy = pickle.loads(pickle.dumps(llm))  # noqa: S301 (our own)
    assert (copy.scope, copy.reproducible, copy.prefix_cache) == ("a", True, None)
    answers = [text(one.create_completion("Hello", **GREEDY)) for one in (llm, copy)]
    assert answers[0] == answers[1]


def test_settings_of_llama_cpp_pass_through() -> None:
    llm = llama(n_ctx=512, seed=5)
    assert llm.n_ctx() == 512
    assert llm.n_batch == SETTINGS["n_batch"]


def test_a_lora_that_llama_cpp_would_leave_out_silently_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "lora.gguf"
    with pytest.raises(MissingFile, match="no LoRA file"):
        llama(lora_path=str(path))
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InvalidModel, match="LoRA"):
        llama(lora_path=str(path))


def test_two_llamas_share_a_cache_and_their_scopes_never_meet() -> None:
    cache = store()
    one, two = llama(cache, scope="a"), llama(cache, scope="b")
    prompt = "The import system of Python: " * 12
    one.create_completion(prompt, **GREEDY)
    two.create_completion(prompt, **GREEDY)
    assert two.last_reuse.n_restored == 0
    third = llama(cache, scope="b")
    third.create_completion(prompt, **GREEDY)
    assert third.last_reuse.n_restored > 0
    cache.clear(scope="b")
    fourth = llama(cache, scope="b")
    fourth.create_completion(prompt, **GREEDY)
    assert fourth.last_reuse.n_restored == 0


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_model_file_that_was_replaced_after_the_load_is_never_anothers_key(
    tmp_path: Path, reproducible: bool
) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    shutil.copy(samples.tiny_model(), path)
    shutil.copy(samples.tiny_model(), other)
    cache = store()
    early = llama(cache, model=path, reproducible=reproducible)
    other.replace(path)
    early.create_completion(LONG, **GREEDY)
    assert cache.stats().n_entries == 0
    assert cache.stats().refusals == {"model_file_changed": 1}
    late = llama(cache, model=path, reproducible=reproducible)
    for _ in range(2):
        late.reset()
        late.create_completion(LONG, **GREEDY)
    assert late.last_reuse.n_restored > 0


def test_a_lora_that_was_replaced_counts_as_another_file(tmp_path: Path) -> None:
    lora = tmp_path / "lora.gguf"
    lora.write_bytes(b"GGUF")
    files = LoadedFiles.at(str(samples.tiny_model()), lora)
    assert files is not None
    assert files.lora is not None
    files.lora.digest()
    lora.write_bytes(b"GGUF, another")
    with pytest.raises(FileChanged, match="replaced"):
        files.lora.digest()


def test_a_relative_path_outlives_a_change_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(samples.tiny_model(), tmp_path / "model.gguf")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    cache = store()
    llm = llama(cache, model="model.gguf")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for _ in range(2):
        llm.reset()
        llm.create_completion(LONG, **GREEDY)
    assert llm.last_reuse.n_restored > 0
    assert cache.stats().refusals == {}


def test_a_model_file_that_was_deleted_costs_the_cache_and_no_request(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(samples.tiny_model(), path)
    cache = store()
    llm = llama(cache, model=path)
    path.unlink()
    answers = [text(llm.create_completion(LONG, **GREEDY)) for _ in range(2)]
    assert answers == [text(plain().create_completion(LONG, **GREEDY))] * 2
    assert cache.stats().refusals["fingerprint_failed"] >= 1
    assert cache.stats().n_entries == 0


@pytest.mark.parametrize(
    "setting",
    [{"prefix_cache": {}}, {"prefix_cache": "x"}, {"reproducible": "no"}, {"reproducible": None}],
)
def test_a_setting_of_the_wrong_kind_is_a_clear_error_before_the_load(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(setting))):
        tokcache.llama.Llama(tmp_path / "none.gguf", **setting)


def test_settings_that_are_changed_later_are_checked_too() -> None:
    llm = llama(store())
    for name, value in {"reproducible": 1, "prefix_cache": {}, "block_tokens": BLOCK + 1}.items():
        with pytest.raises(InvalidConfig, match=name):
            setattr(llm, name, value)
    with pytest.raises(AttributeError, match="scope"):
        llm.scope = "b"


@pytest.mark.parametrize("token", [1 << 40, -(1 << 40), None, "x", 5.5, [5]])
def test_a_wrong_token_id_is_named(token: Any) -> None:
    for llm in (llama(), llama(tokenizer=Tokenizer.from_file(str(samples.tiny_tokenizer())))):
        found = f"{token:,}" if isinstance(token, int) else type(token).__name__
        with pytest.raises(InvalidTokens, match=rf"not {re.escape(found)} \(at position 1\)"):
            llm.create_completion([5, token, 6], **GREEDY)
        assert llm.create_completion([5, 6], **GREEDY)["usage"]["prompt_tokens"] == 2


QUOTED = "a prompt that must not be in an error"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        (None, InvalidText, "not NoneType"),
        (5, InvalidText, "not int"),
        (QUOTED.encode(), InvalidText, "not bytes; decode it"),
        ((5, 6), InvalidText, "not tuple"),
        (np.array([5, 6]), InvalidText, "not ndarray"),
        (iter([5]), InvalidText, "not list_iterator"),
        (QUOTED + "\ud800", InvalidText, f"lone surrogate at position {len(QUOTED)}"),
        ([5, QUOTED], InvalidTokens, "not str \\(at position 1\\)"),
        ([QUOTED], InvalidTokens, "not str"),
        ([5.0], InvalidTokens, "not float"),
        (
            [5, 999_999],
            InvalidTokens,
            "token 999,999 at position 1 is not in the model's vocabulary",
        ),
        ([], InvalidTokens, "no tokens"),
        ("", InvalidTokens, "no tokens"),
    ],
)
def test_a_wrong_prompt_is_a_clear_error_where_llama_cpp_has_a_raw_one(
    prompt: Any, error: type[Exception], words: str, stream: bool
) -> None:
    ours, theirs = llama(store()), plain()
    before = text(ours.create_completion(LONG, **GREEDY))

    def ask(llm: Any) -> Any:
        answer = llm.create_completion(prompt, stream=stream, **GREEDY)
        return list(answer) if stream else answer

    theirs.reset()
    with pytest.raises((TypeError, ValueError, AssertionError, RuntimeError)):
        ask(theirs)
    with pytest.raises(error, match=words) as caught:
        ask(ours)
    assert QUOTED not in str(caught.value)
    assert text(ours.create_completion(LONG, **GREEDY)) == before
    ours.close()


def test_prompts_that_llama_cpp_takes_are_taken() -> None:
    ours, theirs = llama(store(), reproducible=True), plain()
    for prompt in ([5, 6], [np.int64(5), np.int32(6)], [True, 6], "Hello", " "):
        theirs.reset()
        answers = [text(one.create_completion(prompt, **GREEDY)) for one in (ours, theirs)]
        assert answers[0] == answers[1]
    ids = tokcache.TokenIds([5, 6, 7])
    answers = [text(ours.create_completion(p, **GREEDY)) for p in (ids, ids.tolist())]
    assert answers[0] == answers[1]
    for tokens in ((5, 6), np.array([5, 6]), iter([5, 6]), b"ab", ids):
        assert next(ours.generate(tokens, temp=0.0)) >= 0
    ours.eval((5, 6))
    ours.eval(np.array([5, 6]))
    ours.close()


def test_other_arguments_of_the_wrong_kind_are_clear_errors() -> None:
    llm, embedding = llama(store()), llama(store(), embedding=True)
    uses: dict[str, tuple[Any, type[Exception]]] = {
        "tokenize str": (lambda: llm.tokenize("x"), InvalidText),
        "tokenize none": (lambda: llm.tokenize(None), InvalidText),
        "generate none": (lambda: llm.generate(None), InvalidTokens),
        "generate str": (lambda: llm.generate("x"), InvalidTokens),
        "eval none": (lambda: llm.eval(None), InvalidTokens),
        "eval str": (lambda: llm.eval("xy"), InvalidTokens),
        "eval float": (lambda: llm.eval([5, 5.5]), InvalidTokens),
        "chat none": (lambda: llm.create_chat_completion(None), InvalidText),
        "chat str": (lambda: llm.create_chat_completion("x"), InvalidText),
        "embed none": (lambda: embedding.embed(None), InvalidText),
        "embed int": (lambda: embedding.create_embedding(5), InvalidText),
        "embed ints": (lambda: embedding.embed([5]), InvalidText),
    }
    for use, error in uses.values():
        with pytest.raises(error, match="not"):
            use()
    assert embedding.embed(("a", "b"))
    assert text(llm.create_completion("Hello", **GREEDY))
    llm.close()
    embedding.close()


# A Llama that will run uncached says so, once, with the cure


UNCACHED: dict[str, dict[str, Any]] = {
    "logits_all": {"logits_all": True},
    "embedding_context": {"embedding": True},
    "draft_model": {"draft_model": lambda ids, **_: ids[:0]},
    "architecture": {"unknown": True},
    "window_smaller_than_block": {
        "model": "gemma3",
        "cache": {"block_tokens": 256},
        "reproducible": True,
    },
    "window_not_aligned": {
        "model": "gemma3",
        "cache": {"block_tokens": 20},
        "reproducible": True,
        "swa_full": False,
        "n_ctx": 2048,
    },
}


@pytest.mark.parametrize("reason", UNCACHED)
def test_a_llama_that_will_run_uncached_warns_once_with_the_cure(
    reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(UNCACHED[reason])
    cache = store(**settings.pop("cache", {}))
    if "model" in settings:
        settings["model"] = samples.tiny_model(architecture=settings["model"])
    if settings.pop("unknown", False):
        monkeypatch.setattr("tokcache.llama.memory_type.ARCHITECTURES", frozenset())
    with caplog.at_level(logging.DEBUG, "tokcache"):
        llm = llama(cache, **settings)
        if not settings.get("embedding"):
            for _ in range(2):
                llm.create_completion(LONG, **GREEDY)
    (record,) = [each for each in caplog.records if "prefix cache" in each.getMessage()]
    assert record.levelno == logging.WARNING
    assert str(llm.model_path) in record.getMessage()
    assert REASONS[reason].cure in record.getMessage()
    assert REASONS[reason].cure in repr(llm)
    assert cache.stats().n_entries == 0
    llm.close()


def test_a_llama_that_is_cached_or_has_no_cache_does_not_warn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "tokcache"):
        llama(store()).close()
        llm = llama(logits_all=True)
        assert caplog.records == []
        # A cache that is set later is not used either; the log says so once.
        for _ in range(2):
            llm.prefix_cache = store()
        assert len(caplog.records) == 1
        llm.close()


def test_every_reason_has_a_cause_and_a_cure() -> None:
    assert "swa_full=True" in explained("window_not_aligned")
    assert explained("architecture: deepseek2").startswith("architecture: deepseek2 (")
    assert explained("fingerprint_failed") == "fingerprint_failed"


def test_llama_cpps_server_needs_logits_all_switched_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ModelSettings have logits_all=True: Llama then caches no states, and warns."""
    pytest.importorskip("pydantic_settings", reason="needs llama-cpp-python[server]")
    from llama_cpp.server.model import LlamaProxy  # noqa: PLC0415
    from llama_cpp.server.settings import ModelSettings  # noqa: PLC0415

    cache = store()

    def made(**settings: Any) -> Any:
        return tokcache.llama.Llama(settings.pop("model_path"), prefix_cache=cache, **settings)

    monkeypatch.setattr(llama_cpp, "Llama", made)
    for settings, n_warnings in (({}, 1), ({"logits_all": False}, 0)):
        caplog.clear()
        asked = ModelSettings(
            model=str(samples.tiny_model()), n_ctx=1024, verbose=False, **settings
        )
        with caplog.at_level(logging.WARNING, "tokcache"):
            llm = LlamaProxy.load_llama_from_model_settings(asked)
        assert len(caplog.records) == n_warnings
        assert all("--logits_all false" in each.getMessage() for each in caplog.records)
        llm.create_completion(LONG, **GREEDY)
        llm.close()
        assert (cache.stats().n_entries > 0) == (n_warnings == 0)


def test_the_repr_names_model_context_and_settings() -> None:
    llm = llama(store(), reproducible=True, scope="a")
    name = Path(llm.model_path).name
    llm.create_completion([5, 6, 7], **GREEDY)
    assert repr(llm) == (
        f"<Llama {name}: context {llm.n_tokens} of 1,024 tokens, states cached, "
        f"reproducible in blocks of {BLOCK}, scope 'a'>"
    )
    llm.close()
    assert repr(llm) == f"<Llama {name}: closed>"
    assert "states not cached: no prefix_cache" in repr(llama())
    assert repr(tokcache.llama.Llama.__new__(tokcache.llama.Llama)) == "<Llama: not loaded>"


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_with_a_lone_surrogate_is_named_and_not_quoted(stream: bool) -> None:
    llm = llama(store())
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUOTED + "\ud800"},
    ]
    words = rf"messages\[1\]\['content'\] has a lone surrogate at position {len(QUOTED)}"
    with pytest.raises(InvalidText, match=words) as caught:
        llm.create_chat_completion(messages, stream=stream, max_tokens=2)
    assert QUOTED not in str(caught.value)
    llm.close()
