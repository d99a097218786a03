"""Settings of `tokcache serve` that can't be meant are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokcache.errors import InvalidConfig, MissingFile
from tokcache.gateway.config import load

_KEY = f'key_sha256 = "{"a" * 64}"'
_URL = 'url = "http://127.0.0.1:1"'
# What the file holds besides a model, the error, and a word of its message.
_WITH_MODEL = [
    ("host = 5", InvalidConfig, "host"),
    ('host = ["a"]', InvalidConfig, "host"),
    ("folder = 5", InvalidConfig, "folder"),
    ("warm_folder = true", InvalidConfig, "warm_folder"),
    ("tls_certfile = 1\ntls_keyfile = 2", InvalidConfig, "tls_certfile"),
    ('tls_certfile = "/no"\ntls_keyfile = "/no"', MissingFile, "/no"),
    ("rules = 5", InvalidConfig, "rules"),
    ('rules = "move_clock"', InvalidConfig, "rules"),
    ("allowed_origins = {a = 1}", InvalidConfig, "allowed_origins"),
    (f'[[tenants]]\nname = "x"\n{_KEY}\nscope = 5', InvalidConfig, "scope"),
    (f'[[tenants]]\nname = "x"\n{_KEY}\nscope = ""', InvalidConfig, "scope"),
    ('[[tenants]]\nname = "x"\nkey_sha256 = {}', InvalidConfig, "key_sha256"),
]
_ALONE = [
    ("model = 5", InvalidConfig, "model"),
    ('model = ["x"]', InvalidConfig, "model"),
    ('upstreams = "http://127.0.0.1:1"', InvalidConfig, "upstreams"),
    ("upstreams = [5]", InvalidConfig, "upstreams"),
    (f'[[upstreams]]\n{_URL}\nslot_folder = "/nope"', MissingFile, "/nope"),
    (f"[[upstreams]]\n{_URL}\nslot_folder = 5", InvalidConfig, "slot_folder"),
    (f"[[upstreams]]\n{_URL}\ntokenizer = 5", InvalidConfig, "tokenizer"),
    *(
        (f"[[upstreams]]\nurl = {url}", InvalidConfig, "URL")
        for url in (
            "5",
            '"127.0.0.1:8080"',
            '"http://127.0.0.1:abc"',
            '"http://127.0.0.1:99999"',
            '"http://127.0.0.1:0"',
            '"http://[::1"',
            '"http://"',
            '"http://127.0.0.1:1/\\r\\nX: y"',
            '"http://127.0.0.1:1/\\u00e9"',
            '"http://user@127.0.0.1:1"',
        )
    ),
]


@pytest.mark.parametrize(("text", "error", "word"), [*_WITH_MODEL, *_ALONE])
def test_a_wrong_setting_is_refused_with_its_name(
    text: str, error: type[Exception], word: str, tmp_path: Path
) -> None:
    model, path = tmp_path / "model.gguf", tmp_path / "serve.toml"
    model.write_bytes(b"GGUF")
    needs_model = (text, error, word) in _WITH_MODEL
    path.write_text(f'model = "{model}"\n{text}' if needs_model else text, encoding="utf-8")
    with pytest.raises(error, match=word):
        load(path, {}, {})


def test_an_upstream_with_a_folder_and_a_path_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(f'[[upstreams]]\nurl = "http://127.0.0.1:1/v1/"\nslot_folder = "{tmp_path}"')
    (found,) = load(path, {}, {}).upstreams
    assert (found.url, found.slot_folder) == ("http://127.0.0.1:1/v1", str(tmp_path))
