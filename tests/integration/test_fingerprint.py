"""The fingerprint: each of its fields, changed alone, makes another one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.models import llama_cpp
from tokcache import samples
from tokcache.llama import fingerprint as module
from tokcache.llama.fingerprint import LoadedFiles, describe, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

    Change = Callable[[Any], object]


def loaded() -> Any:
    """Return the attributes of a Llama that count, with llama.cpp's default structures."""
    return SimpleNamespace(
        context_params=llama_cpp.llama_context_default_params(),
        model_params=llama_cpp.llama_model_default_params(),
        metadata={"general.architecture": "llama"},
        kv_overrides=None,
        lora_scale=1.0,
        tensor_split=None,
    )


@pytest.fixture(scope="module")
def files() -> LoadedFiles:
    found = LoadedFiles.at(str(samples.tiny_model()))
    assert found is not None
    return found


def changed(name: str) -> Change:
    """Return a function that gives one of the context's settings another value."""

    def change(llm: Any) -> None:
        value = getattr(llm.context_params, name)
        setattr(llm.context_params, name, (not value) if isinstance(value, bool) else value + 1)
        assert getattr(llm.context_params, name) != value

    return change


@pytest.mark.parametrize("block_tokens", [None, 256])
@pytest.mark.parametrize("name", module._CONTEXT)
def test_each_setting_of_the_context_makes_another_fingerprint(
    name: str, block_tokens: int | None, files: LoadedFiles
) -> None:
    llm = loaded()
    before = fingerprint(llm, files, block_tokens)
    assert fingerprint(loaded(), files, block_tokens) == before
    changed(name)(llm)
    assert fingerprint(llm, files, block_tokens) != before


@pytest.mark.parametrize("name", module._REPRODUCIBLE)
def test_batches_and_threads_count_in_reproducible_mode_alone(
    name: str, files: LoadedFiles
) -> None:
    llm = loaded()
    before = [fingerprint(llm, files, block_tokens) for block_tokens in (None, 256)]
    changed(name)(llm)
    after = [fingerprint(llm, files, block_tokens) for block_tokens in (None, 256)]
    assert after[0] == before[0]
    assert after[1] != before[1]


OTHERS: dict[str, Change] = {
    "an override": lambda llm: setattr(llm, "kv_overrides", {"llama.rope.freq_base": 5.0}),
    "the architecture": lambda llm: llm.metadata.update({"general.architecture": "qwen2"}),
    "offloaded layers": lambda llm: setattr(llm.model_params, "n_gpu_layers", 7),
    "the way of splitting": lambda llm: setattr(llm.model_params, "split_mode", 2),
    "the main GPU": lambda llm: setattr(llm.model_params, "main_gpu", 1),
    "the shares of the GPUs": lambda llm: setattr(llm, "tensor_split", [0.5, 0.5]),
}


@pytest.mark.parametrize("change", OTHERS)
def test_each_setting_of_the_model_makes_another_fingerprint(
    change: str, files: LoadedFiles
) -> None:
    llm = loaded()
    before = fingerprint(llm, files, None)
    OTHERS[change](llm)
    assert fingerprint(llm, files, None) != before


def test_the_mode_and_its_block_length_make_other_fingerprints(files: LoadedFiles) -> None:
    made = {fingerprint(loaded(), files, block_tokens) for block_tokens in (None, 128, 256)}
    assert len(made) == 3


def test_files_make_other_fingerprints(files: LoadedFiles) -> None:
    lora = samples.tiny_lora(samples.tiny_model())
    with_lora = LoadedFiles.at(str(samples.tiny_model()), lora)
    other_lora = LoadedFiles.at(
        str(samples.tiny_model()), samples.tiny_lora(samples.tiny_model(), seed=2)
    )
    other = LoadedFiles.at(str(samples.tiny_model(seed=1)))
    assert with_lora is not None
    assert other_lora is not None
    assert other is not None
    scaled = loaded()
    scaled.lora_scale = 0.5
    made = {fingerprint(loaded(), each, None) for each in (files, with_lora, other_lora, other)}
    made.add(fingerprint(scaled, with_lora, None))
    assert len(made) == 5
    assert fingerprint(scaled, files, None) == fingerprint(loaded(), files, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("__version__", "0.0.0"),
        ("llama_print_system_info", lambda: b"another CPU"),
        ("LLAMA_STATE_SEQ_VERSION", 99),
        ("LLAMA_SESSION_VERSION", 99),
    ],
)
def test_another_build_of_llama_cpp_makes_another_fingerprint(
    name: str, value: Any, files: LoadedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(loaded(), files, None)
    monkeypatch.setattr(llama_cpp, name, value)
    module._SYSTEM.reset()
    assert fingerprint(loaded(), files, None) != before
    module._SYSTEM.reset()


def test_threads_that_ask_at_once_get_the_same_fingerprint(files: LoadedFiles) -> None:
    module._SYSTEM.reset()  # llama.cpp's own answer must not be asked for at once
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: fingerprint(loaded(), files, None), range(200))
    assert len(set(found)) == 1


def test_the_settings_are_those_of_llama_cpp(files: LoadedFiles) -> None:
    described = describe(loaded(), files, 256)
    settings = {**described["context"], **described["batches"]}
    assert {name for name, value in settings.items() if value is None} == set()
    known = {name for name, *_ in llama_cpp.llama_context_params._fields_}
    # Without influence on the numbers: callbacks, timings, samplers, room for other sequences.
    other = {
        "ctx_other",
        "n_outputs_max",
        "n_outputs_max_per_seq",
        "abort_callback",
        "abort_callback_data",
        "cb_eval",
        "cb_eval_user_data",
        "no_perf",
        "sampler",
        "samplers",
        "n_samplers",
        "defrag_thold",
    }
    assert known - set(settings) - other == set()
