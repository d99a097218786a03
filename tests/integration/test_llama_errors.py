from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import tokcache.llama
from tests.integration.models import BLOCK, GREEDY, SETTINGS, llama, plain, store, text
from tokcache import samples
from tokcache.errors import (
    InvalidConfig,
    InvalidModel,
    InvalidScope,
    InvalidTokens,
    MissingExtra,
    MissingFile,
)
from tokcache.llama.file_digests import FileChanged
from tokcache.llama.fingerprint import LoadedFiles

LONG = "The import system of Python: " * 12


def test_a_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(MissingFile, match="no model file"):
            llama(model=path)


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


def test_without_llama_cpp_the_message_says_what_to_install(
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


@pytest.mark.parametrize("token", [1 << 40, -(1 << 40), None, "x"])
def test_what_can_be_no_token_id_is_named(token: Any) -> None:
    for llm in (llama(), llama(tokenizer=Tokenizer.from_file(str(samples.tiny_tokenizer())))):
        with pytest.raises(InvalidTokens, match=re.escape(repr(token))):
            llm.create_completion([5, token, 6], **GREEDY)
        assert llm.create_completion([5, 6], **GREEDY)["usage"]["prompt_tokens"] == 2
