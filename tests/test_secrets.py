"""Keys and passwords are in no name, error, log line, metric, page or file of the project's own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import tokcache
from tests.state.engine import Engine
from tokcache import DiskTier, PrefixStateCache, RedisTier
from tokcache.errors import InvalidConfig, ServerError, TokcacheError
from tokcache.gateway.config import UpstreamConfig
from tokcache.gateway.folder import Folder
from tokcache.llama.server import AsyncLlamaServer, LlamaServer
from tokcache.observe.page import page
from tokcache.samples import tiny_tokenizer

PASSWORD, API_KEY = "geheim-password", "geheim-api-key"
HMAC_KEY, ENCRYPTION_KEY = b"geheim-hmac-key-" * 2, b"geheim-encryption-key-of-32-byte"
WORD = "geheim"
# Nothing listens on port 9, so that every request fails and says why.
URL = f"http://user:{PASSWORD}@127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG)
    yield
    told = [f"{each.getMessage()} {each.exc_text}" for each in caplog.records]
    assert not any(WORD in each for each in told)


def check(*told: object) -> None:
    for each in told:
        assert WORD not in str(each)
        assert WORD not in repr(each)
        assert HMAC_KEY.hex() not in str(each)


def test_a_llama_server_shows_neither_its_key_nor_a_password_of_its_url() -> None:
    with LlamaServer(URL, api_key=API_KEY, timeout_s=5, retries=0) as server:
        with pytest.raises(ServerError) as caught:
            server.completion([1, 2, 3], n_predict=1)
        check(server, caught.value, caught.value.__cause__)
        assert "127.0.0.1:9" in str(caught.value)
        exchange = server._connection._exchange
        assert exchange.client_settings["auth"] == ("user", PASSWORD)  # it is sent
        assert exchange.client_settings["base_url"] == exchange.url == "http://127.0.0.1:9/v1"
    check(AsyncLlamaServer(URL, api_key=API_KEY))


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://user:{PASSWORD}@127.0.0.1",
        f"http://user:{PASSWORD}@127.0.0.1:99999999",
        f"http://user:{PASSWORD}/x@127.0.0.1:port",
        f"http://user:x@{PASSWORD}@",
    ],
)
@pytest.mark.parametrize("owner", [LlamaServer, UpstreamConfig])
def test_an_invalid_url_is_refused_without_showing_its_password(owner: Any, url: str) -> None:
    with pytest.raises(InvalidConfig, match="URL") as caught:
        owner(url=url)
    check(caught.value, caught.value.__cause__)


def test_a_gateway_refuses_the_user_of_a_url_without_showing_it() -> None:
    with pytest.raises(InvalidConfig, match="has no user") as caught:
        UpstreamConfig(url=f"http://user:{PASSWORD}@127.0.0.1")
    check(caught.value)


def test_tiers_show_no_keys(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"hmac_key": HMAC_KEY, "encryption_key": ENCRYPTION_KEY}
    disk = DiskTier(tmp_path / "states", **keys)
    redis = RedisTier(f"redis://user:{PASSWORD}@127.0.0.1:9/0", timeout_s=0.2, **keys)
    states = PrefixStateCache(disk=disk, redis=redis, block_tokens=4)
    Engine().save(states, list(range(20)))
    assert states.flush()
    with pytest.raises(TokcacheError) as caught:
        redis.check()
    prometheus = pytest.importorskip("tokcache.observe.prometheus")
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    prometheus.Collector(registry).add("m", states)
    metrics = client.generate_latest(registry).decode()
    assert "tokcache" in metrics
    check(disk, redis, states, states.stats(), states.namespace(b"m"), caught.value, metrics)
    check(page(None, states.stats()))
    files = [file for file in (tmp_path / "states").rglob("*") if file.is_file()]
    assert files
    for file in files:
        assert WORD not in str(file)
        assert WORD.encode() not in file.read_bytes()
    states.close()


def test_a_cache_file_holds_neither_its_key_nor_the_secrets_of_the_caches(tmp_path: Path) -> None:
    wrapped = tokcache.wrap(Tokenizer.from_file(str(tiny_tokenizer())))
    wrapped.token_ids("some text " * 200, scope="a")
    report = wrapped.cache_dump(tmp_path / "file", key=HMAC_KEY)
    check(report, wrapped, wrapped.cache_stats())
    content = (tmp_path / "file").read_bytes()
    assert HMAC_KEY not in content
    l1 = wrapped._tokcache.l1
    assert l1 is not None
    assert l1._secret not in content
    assert l1._secret.hex() not in repr(wrapped)


def test_a_gateways_key_is_in_its_own_file_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.open("test")
    try:
        assert len(folder.key) >= 16
        assert folder.key.hex() not in f"{folder!r} {folder.owner}"
        holders = [file for file in tmp_path.rglob("*") if file.is_file()]
        with_key = [file for file in holders if folder.key in file.read_bytes()]
        assert with_key == [tmp_path / "key"]
        assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    finally:
        folder.close()
