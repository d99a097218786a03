"""The settings of `tokcache serve`: from a TOML file, the environment and flags, in that order."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tokcache._disk_budget import require_disk_size
from tokcache._validate import (
    require_bool,
    require_int,
    require_seconds,
    require_size,
    without_password,
)
from tokcache.errors import InvalidConfig, MissingFile
from tokcache.gateway.api.rules import RULES

_PREFIX = "TOKCACHE_SERVE_"
_MAX_PORT = 65_535
_MAX_SLOTS = 256
_TLS = ("tls_certfile", "tls_keyfile")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_URL = re.compile(r"[!-~]+")  # no space, line end or other character that a request line can't hold


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamConfig:
    """A running llama-server; `slot_folder` is its --slot-save-path as this process reaches it.

    `tokenizer` is its model's GGUF, or the model's own tokenizer.json: token counts come from the
    cache where it proves equal to the server's.
    """

    url: str
    slot_folder: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        _require_texts(self, "slot_folder", "tokenizer")
        try:
            is_plain = isinstance(self.url, str) and _URL.fullmatch(self.url)
            parts = urlsplit(self.url) if is_plain else None
            is_server = parts is not None and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a wrong port, or brackets around no address
            parts, is_server = None, False
        if parts is None or not is_server or parts.scheme not in ("http", "https"):
            raise InvalidConfig(
                f"{without_password(self.url)} is not a llama-server's URL; write one such as "
                "http://127.0.0.1:8080"
            )
        if parts.query or parts.fragment or parts.username:
            raise InvalidConfig(
                f"{without_password(self.url)}: a llama-server's URL has no user, query or fragment"
            )
        if self.tokenizer and not Path(self.tokenizer).is_file():
            raise MissingFile(
                f"there is no file {self.tokenizer} (the tokenizer of {self.url}); name a GGUF or a"
                " tokenizer.json"
            )
        if self.slot_folder and not Path(self.slot_folder).is_dir():
            raise MissingFile(
                f"there is no folder {self.slot_folder} (slot_folder of {self.url}); name the one "
                "that its --slot-save-path is, as this machine sees it"
            )
        object.__setattr__(self, "url", self.url.rstrip("/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantConfig:
    """A tenant: `key_sha256` is the digest of its API key, `scope` (by default its name) its own.

    `is_admin` lets the key read /metrics and the page, which show figures of all tenants.

    Units: 0 means no limit.
    """

    name: str
    key_sha256: str = ""
    scope: str | None = None
    max_in_flight: int = 0
    tokens_per_minute: int = 0
    is_admin: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidConfig("a tenant needs a name")
        _require_texts(self, "key_sha256", "scope")
        if self.key_sha256 and not _DIGEST.fullmatch(self.key_sha256):
            raise InvalidConfig(
                f"tenant {self.name}: key_sha256 must be 64 hexadecimal digits; run"
                " `tokcache serve --new-key`"
            )
        if self.scope == "":
            raise InvalidConfig(f"tenant {self.name}: scope must not be empty; leave it out")
        if self.key_sha256 and self.scope is None:
            object.__setattr__(self, "scope", self.name)
        require_int("max_in_flight", self.max_in_flight, minimum=0)
        require_int("tokens_per_minute", self.tokens_per_minute, minimum=0)
        require_bool("is_admin", self.is_admin)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """How `tokcache serve` runs; see docs/guides/gateway.md.

    Either `model` (a llama-server is started for it) or `upstreams` (running ones).

    Units:  `n_ctx` tokens per slot; `max_bytes` of all saved files, or a share of the disk they are
            on, such as "10%" or "50% free"; `side_tokens`: a prompt shorter
            than that is a side request unless it continues a conversation.
    Errors: InvalidConfig names the setting.
    """

    model: str | None = None
    upstreams: tuple[UpstreamConfig, ...] = ()
    llama_server: str | None = None
    server_args: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    n_slots: int = 4
    n_ctx: int = 8192
    n_threads: int = 0
    folder: str | None = None
    max_bytes: int | str = "8G"
    min_save_tokens: int = 64
    side_tokens: int = 512
    max_queue: int = 64
    queue_timeout_s: float = 120.0
    max_body_bytes: int | str = "32M"
    body_timeout_s: float = 30.0
    read_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    start_timeout_s: float = 300.0
    rules: tuple[str, ...] = ()
    warm_folder: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    tls_certfile: str | None = None
    tls_keyfile: str | None = None
    tenants: tuple[TenantConfig, ...] = ()

    def __post_init__(self) -> None:
        _require_texts(self, "model", "llama_server", "host", "folder", "warm_folder", *_TLS)
        if bool(self.model) == bool(self.upstreams):
            raise InvalidConfig(
                "give either MODEL.gguf or --upstream URL, not both and not neither"
            )
        if self.model and not Path(self.model).is_file():
            raise MissingFile(f"there is no model file {self.model}; pass the path of a GGUF")
        if self.llama_server and not Path(self.llama_server).is_file():
            raise MissingFile(f"there is no llama-server at {self.llama_server}")
        _require_effect(self)
        if len({each.url for each in self.upstreams}) != len(self.upstreams):
            raise InvalidConfig("two upstreams have the same URL")
        self._require_numbers()
        unknown = sorted(set(self.rules) - RULES.keys())
        if unknown:
            raise InvalidConfig(f"rules: {unknown[0]!r} is unknown; known are {', '.join(RULES)}")
        if self.warm_folder and not Path(self.warm_folder).is_dir():
            raise MissingFile(f"there is no folder {self.warm_folder} (warm_folder)")
        if bool(self.tls_certfile) != bool(self.tls_keyfile):
            raise InvalidConfig("TLS needs both tls_certfile and tls_keyfile")
        for name in _TLS:
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise MissingFile(f"there is no file {path} ({name})")
        names = [each.name for each in self.tenants]
        keys = [each.key_sha256 for each in self.tenants]
        if len(set(names)) < len(names) or len(set(keys)) < len(keys) or not all(keys):
            raise InvalidConfig("each tenant needs a name and a key_sha256 that no other has")

    @property
    def upstream_folder(self) -> Path | None:
        """A folder in which running servers save their slots; None if a server is started."""
        folder = self.upstreams[0].slot_folder if self.upstreams else None
        return None if folder is None else Path(folder)

    def _require_numbers(self) -> None:
        require_int("port", self.port, 0, _MAX_PORT)
        require_int("n_slots", self.n_slots, 1, _MAX_SLOTS)
        for name in ("n_ctx", "min_save_tokens", "max_queue"):
            require_int(name, getattr(self, name), minimum=1)
        for name in ("n_threads", "side_tokens"):
            require_int(name, getattr(self, name), minimum=0)
        object.__setattr__(self, "max_bytes", require_disk_size("max_bytes", self.max_bytes))
        if isinstance(self.max_bytes, str) and self.upstreams:
            if None in {each.slot_folder for each in self.upstreams}:
                raise InvalidConfig(
                    f"max_bytes = {self.max_bytes!r} is a share of the disk of the saved slots, "
                    "and an upstream has no slot_folder; name it, or give max_bytes in bytes"
                )
            if len({Path(each.slot_folder or "").stat().st_dev for each in self.upstreams}) > 1:
                raise InvalidConfig(
                    f"max_bytes = {self.max_bytes!r} is a share of one disk, and the slot_folders "
                    "of the upstreams are on several; give max_bytes in bytes"
                )
        n_bytes = require_size("max_body_bytes", self.max_body_bytes)
        object.__setattr__(self, "max_body_bytes", n_bytes)
        for field in dataclasses.fields(self):
            if field.name.endswith("_s"):
                require_seconds(field.name, getattr(self, field.name))


def _require_texts(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not isinstance(value, str):
            raise InvalidConfig(f"{name} must be a text, not {value!r}")


def _require_effect(config: GatewayConfig) -> None:
    if config.llama_server and not config.model:
        raise InvalidConfig(
            "llama_server has no effect with upstreams, which run already; remove it"
        )
    if config.server_args and not config.llama_server:
        raise InvalidConfig(
            "server_args has no effect without llama_server, the program that takes them; name that"
            " too"
        )


def load(
    path: str | os.PathLike[str] | None,
    flags: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> GatewayConfig:
    """Return the settings of a file, overridden by the environment, then by flags that are set.

    A variable TOKCACHE_SERVE_PORT sets `port`; lists are separated by commas. A flag for a model
    replaces the upstreams of the file and the environment, and the other way round.

    Errors: InvalidConfig for unknown settings and wrong values; MissingFile.
    """
    settings = _read(path) if path is not None else {}
    fields = {each.name: each for each in dataclasses.fields(GatewayConfig)}
    for name, value in (os.environ if environment is None else environment).items():
        if name.startswith(_PREFIX):
            settings[name.removeprefix(_PREFIX).lower()] = _parsed(
                name, value, fields.get(name.removeprefix(_PREFIX).lower())
            )
    given = {name: value for name, value in flags.items() if value is not None}
    for name, other in (("model", "upstreams"), ("upstreams", "model")):
        if name in given and other not in given:
            settings.pop(other, None)  # the flag says which of the two to serve
    settings |= given
    unknown = sorted(settings.keys() - fields.keys())
    if unknown:
        raise InvalidConfig(
            f"unknown setting {unknown[0]!r}; known are {', '.join(sorted(fields))}"
        )
    settings["upstreams"] = _made(UpstreamConfig, "upstreams", settings.get("upstreams", ()))
    settings["tenants"] = _made(TenantConfig, "tenants", settings.get("tenants", ()))
    for name in ("server_args", "rules", "allowed_origins", "allowed_hosts"):
        value = settings.get(name, ())
        is_list = isinstance(value, list | tuple)
        if not is_list or not all(isinstance(each, str) for each in value):
            raise InvalidConfig(f"{name} must be a list of texts")
        settings[name] = tuple(value)
    return GatewayConfig(**settings)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFile(f"there is no configuration file {os.fspath(path)}") from None
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InvalidConfig(f"{os.fspath(path)} can't be read as TOML: {error}") from None


def _parsed(name: str, value: str, field: dataclasses.Field[Any] | None) -> Any:
    if field is None or field.name == "tenants":
        names = ", ".join(sorted(field.name for field in dataclasses.fields(GatewayConfig)))
        raise InvalidConfig(
            f"the environment variable {name} names no setting; after {_PREFIX} comes one of"
            f" {names} in upper case"
        )
    if field.name == "upstreams":
        return [{"url": each.strip()} for each in value.split(",") if each.strip()]
    if str(field.type).startswith("tuple"):
        return [each.strip() for each in value.split(",") if each.strip()]
    kind = {"int": int, "float": float}.get(str(field.type), str)
    try:
        return kind(value)
    except ValueError:
        raise InvalidConfig(f"{name} must be a number, not {value!r}") from None


def _made(kind: type[Any], name: str, found: Any) -> tuple[Any, ...]:
    known = {each.name for each in dataclasses.fields(kind)}
    made = []
    if not isinstance(found, list | tuple):
        raise InvalidConfig(f"{name} must be a list of tables, written [[{name}]]")
    for each in found:
        if isinstance(each, str) and kind is UpstreamConfig:
            made.append(UpstreamConfig(url=each))
            continue
        unknown = sorted(set(each) - known) if isinstance(each, dict) else ["?"]
        if unknown:
            raise InvalidConfig(f"{name} has the unknown member {unknown[0]!r}; known: {known}")
        try:
            made.append(kind(**each))
        except TypeError as error:
            raise InvalidConfig(f"{name}: {error}") from None
    return tuple(made)
