"""`tokcache serve` as a person runs it: its settings, its first lines, its end, its next start."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import os
import select
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

import pytest
from typer.testing import CliRunner

from tests.gateway.gateways import SYSTEM, httpx
from tokcache import samples
from tokcache.cli import app
from tokcache.errors import InvalidConfig, MissingFile
from tokcache.gateway.app import make_app
from tokcache.gateway.config import GatewayConfig, UpstreamConfig, load
from tokcache.gateway.service import Service

if TYPE_CHECKING:
    from pathlib import Path

URL = "http://127.0.0.1:9999"


def test_flags_override_the_environment_and_that_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(
        f'port = 1\nn_slots = 2\nmax_bytes = "1G"\n[[upstreams]]\nurl = "{URL}"\n'
        '[[tenants]]\nname = "x"\nkey_sha256 = "' + "0" * 64 + '"\n'
    )
    environment = {"TOKCACHE_SERVE_PORT": "2", "TOKCACHE_SERVE_N_SLOTS": "3", "HOME": "/x"}
    found = load(path, {"port": 4, "host": None}, environment)
    assert (found.port, found.n_slots, found.max_bytes) == (4, 3, 1 << 30)
    assert found.upstreams == (UpstreamConfig(url=URL),)
    assert found.tenants[0].scope == "x"
    listed = load(None, {}, {"TOKCACHE_SERVE_UPSTREAMS": f"{URL},http://localhost:1"})
    assert len(listed.upstreams) == 2


WRONG: list[dict[str, Any]] = [
    {}, {"model": __file__, "upstreams": [URL]}, {"upstreams": ["ftp://x"]},
    {"upstreams": [{"url": URL, "tokenizer": "/no/such.gguf"}]},
    {"upstreams": ["http://u:p@x"]}, {"upstreams": [URL, f"{URL}/"]}, {"upstreams": 5},
    {"upstreams": [{"uri": URL}]}, {"upstreams": [URL], "port": 70_000},
    {"upstreams": [URL], "no_such": 1}, {"upstreams": [URL], "n_slots": 0},
    {"upstreams": [URL], "max_bytes": "much"}, {"upstreams": [URL], "drain_timeout_s": -1},
    {"upstreams": [URL], "tenants": [{"name": "x"}]}, {"upstreams": [URL], "tls_keyfile": "x"},
    {"upstreams": [URL], "tenants": [{"name": "x", "key_sha256": "short"}]},
    {"upstreams": [URL], "allowed_origins": "http://x"}, {"model": "/no/such.gguf"},
]  # fmt: skip


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_settings_are_named(flags: dict[str, Any]) -> None:
    with pytest.raises((InvalidConfig, MissingFile)) as caught:
        load(None, flags, {})
    assert str(caught.value)


@pytest.mark.parametrize("text", ["port = ", "\x00", "[[upstreams]]\nurl = 3"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(InvalidConfig):
        load(path, {}, {})
    with pytest.raises(MissingFile):
        load(tmp_path / "none.toml", {}, {})


def test_check_prints_the_settings_and_no_key() -> None:
    found = CliRunner().invoke(app, ["serve", "--upstream", URL, "--check"])
    assert found.exit_code == 0
    assert f"would stand in front of {URL}" in found.stdout
    found = CliRunner().invoke(app, ["serve", "--check"])
    assert found.exit_code == 2
    assert "--upstream" in found.stderr
    found = CliRunner().invoke(app, ["serve", "/no/such.gguf"])
    assert found.exit_code == 2
    assert "/no/such.gguf" in found.stderr


def test_help_says_what_to_paste_into_a_client() -> None:
    told = " ".join(CliRunner().invoke(app, ["serve", "--help"]).stdout.split())
    assert "OPENAI_BASE_URL" in told
    assert "ANTHROPIC_BASE_URL" in told


def test_new_key_prints_a_key_and_its_digest() -> None:
    lines = CliRunner().invoke(app, ["serve", "--new-key"]).stdout.splitlines()
    assert lines[0].split()[-1].startswith("tc-")
    assert lines[1].startswith('key_sha256 = "')


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Command:
    """A running `tokcache serve`."""

    def __init__(self, *arguments: str, port: int, trusted: ssl.SSLContext | None = None) -> None:
        self.url = f"{'https' if trusted else 'http'}://127.0.0.1:{port}"
        command = [sys.executable, "-m", "tokcache", "serve", *arguments, "--port", str(port)]
        self.process = subprocess.Popen(  # noqa: S603 (our own code)
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        assert ready, "it printed nothing"
        self.first_line = self.process.stdout.readline()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{self.url}/health", verify=trusted or True, trust_env=False)
            except httpx.ConnectError:
                time.sleep(0.05)
            else:
                break

    def chat(self, n_messages: int) -> Any:
        messages = [{"role": "system", "content": SYSTEM}]
        messages += [{"role": "user", "content": f"number {n}"} for n in range(n_messages)]
        body = {"messages": messages, "max_tokens": 4}
        answer = httpx.post(
            f"{self.url}/v1/chat/completions", json=body, timeout=60, trust_env=False
        )
        return answer.json()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, errors
        return errors


@pytest.mark.parametrize("is_program", [False, True])
def test_a_cached_prompt_is_there_after_a_restart(tmp_path: Path, is_program: bool) -> None:
    folder = tmp_path / "own"
    arguments = [str(samples.tiny_model()), "--folder", str(folder), "--slots", "2",
                 "--ctx", "2048", "--threads", "1"]  # fmt: skip
    if is_program:
        arguments += ["--llama-server", str(_program(tmp_path))]
    port = free_port()
    with Command(*arguments, port=port) as command:
        assert f"OPENAI_BASE_URL={command.url}/v1" in command.first_line
        assert command.chat(1)["tokcache"]["cached_tokens"] == 0
        assert command.stop() == ""
    assert stat.S_IMODE((folder / "files.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert len(list((folder / "slots").glob("*.bin"))) == 1
    with Command(*arguments, port=port) as again:
        told = again.chat(2)["tokcache"]
        assert told["plan"] == "file"
        assert told["cached_tokens"] > 200
        again.stop()


# A llama-server program for the test: reads the flags and starts xllamacpp's.
_PROGRAM = """#!{python}
import sys, threading
import xllamacpp
words = dict(zip(sys.argv[1:], sys.argv[2:]))
params = xllamacpp.CommonParams()
params.model.path, params.hostnames = words["--model"], [words["--host"]]
params.port, params.n_ctx = int(words["--port"]), int(words["--ctx-size"])
params.n_parallel, params.kv_unified = int(words["--parallel"]), False
params.slot_save_path, params.endpoint_slots = words["--slot-save-path"], True
params.cache_ram_mib, params.cache_idle_slots = int(words["--cache-ram"]), False
params.fit_params, params.ui, params.cpuparams.n_threads = False, False, 1
server = xllamacpp.Server(params)
threading.Event().wait()
"""


def _program(folder: Path) -> Path:
    path = folder / "llama-server"
    path.write_text(_PROGRAM.format(python=sys.executable))
    path.chmod(0o700)
    return path


def test_a_model_that_is_no_gguf_ends_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"no gguf" * 100)
    done = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-m", "tokcache", "serve", str(path), "--folder", str(tmp_path / "own")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"NO_COLOR": "1"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("tokcache: ")
    assert "Traceback" not in done.stderr


def test_a_port_in_use_ends_with_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(  # noqa: S603 (our own code)
            [sys.executable, "-m", "tokcache", "serve", "--upstream", URL, "--port", str(port),
             "--folder", str(tmp_path)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "is it in use?" in done.stderr
    assert "Traceback" not in done.stderr


def test_tls_settings_reach_the_listening_socket(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write_certificate(certificate, key)
    config = tmp_path / "serve.toml"
    config.write_text(f'tls_certfile = "{certificate}"\ntls_keyfile = "{key}"\n'
                      f'folder = "{tmp_path / "own"}"\n[[upstreams]]\nurl = "{URL}"\n')  # fmt: skip
    port = free_port()
    trusted = ssl.create_default_context(cafile=str(certificate))
    with Command("--config", str(config), port=port, trusted=trusted) as served:
        assert f"https://127.0.0.1:{port}/v1" in served.first_line
        answer = httpx.get(f"{served.url}/health", verify=trusted, trust_env=False)
        assert answer.status_code == 503  # nothing listens at the upstream
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)


def write_certificate(certificate: Path, key: Path) -> None:
    """Write a certificate of 127.0.0.1 that signs itself."""
    x509 = pytest.importorskip("cryptography.x509", reason="needs tokcache[crypto]")
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415 (an extra)
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 (an extra)

    made = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(made.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(made, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    pem = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key.write_bytes(made.private_bytes(serialization.Encoding.PEM, *pem))


def test_cors_is_closed_by_default_and_open_to_the_named_origins_only() -> None:
    asked = {"origin": "http://app.example", "access-control-request-method": "POST"}

    def allowed(*origins: str, **headers: str) -> str | None:
        service = Service(GatewayConfig(upstreams=(UpstreamConfig(url=URL),),
                                        allowed_origins=origins))  # fmt: skip
        transport = httpx.ASGITransport(make_app(service))

        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as it:
                return await it.options("/v1/chat/completions", headers={**asked, **headers})

        found: str | None = asyncio.run(ask()).headers.get("access-control-allow-origin")
        return found

    assert allowed() is None
    assert allowed("http://app.example") == "http://app.example"
    assert allowed("http://app.example", origin="http://other.example") is None


def test_allowed_hosts_are_compared_without_case() -> None:
    upstreams = (UpstreamConfig(url=URL),)
    service = Service(GatewayConfig(upstreams=upstreams, allowed_hosts=("Gateway.Example",)))

    async def ask(host: str) -> int:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return int((await client.get("/v1/models")).status_code)

    assert asyncio.run(ask("gateway.EXAMPLE")) == 200
    assert asyncio.run(ask("gateway.example.evil")) == 403


def test_defaults_are_safe() -> None:
    config = GatewayConfig(upstreams=(UpstreamConfig(url=URL),))
    assert config.host == "127.0.0.1"
    assert not config.allowed_origins


def test_a_taken_port_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    slow = tmp_path / "llama-server"
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\nsleep 60\n")
    slow.chmod(0o700)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(  # noqa: S603 (our own code)
            [sys.executable, "-m", "tokcache", "serve", str(samples.tiny_model()),
             "--llama-server", str(slow), "--port", str(taken.getsockname()[1]),
             "--folder", str(tmp_path / "own")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "is it in use?" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "started").exists()


def test_a_signal_while_the_model_is_loaded_ends_the_llama_server_too(tmp_path: Path) -> None:
    slow, pid_file = tmp_path / "llama-server", tmp_path / "pid"
    slow.write_text(f"#!/bin/sh\necho $$ > {pid_file}\nexec sleep 60\n")
    slow.chmod(0o700)
    with subprocess.Popen(  # noqa: S603 (our own code)
        [sys.executable, "-m", "tokcache", "serve", str(samples.tiny_model()), "--llama-server",
         str(slow), "--port", str(free_port()), "--folder", str(tmp_path / "own")],
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 30
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_a_program_that_can_not_be_started_is_named(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("no program")
    found = CliRunner().invoke(
        app, ["serve", str(samples.tiny_model()), "--llama-server", str(program),
              "--folder", str(tmp_path / "own"), "--port", str(free_port())]
    )  # fmt: skip
    assert found.exit_code == 2
    assert found.stderr.startswith(f"tokcache: {program} can't be started")


def test_settings_without_effect_are_refused() -> None:
    model = str(samples.tiny_model())
    for flags in (
        {"model": model, "server_args": ["--flash-attn"]},
        {"upstreams": [URL], "llama_server": sys.executable},
    ):
        with pytest.raises(InvalidConfig, match="no effect"):
            load(None, flags, {})


def test_a_flag_replaces_the_model_or_the_upstreams_of_the_file(tmp_path: Path) -> None:
    path, model = tmp_path / "serve.toml", str(samples.tiny_model())
    path.write_text(f'model = "{model}"\n')
    found = load(path, {"upstreams": [{"url": URL}]}, {})
    assert (found.model, found.upstreams) == (None, (UpstreamConfig(url=URL),))
    path.write_text(f'[[upstreams]]\nurl = "{URL}"\n')
    found = load(path, {"model": model}, {})
    assert (found.model, found.upstreams) == (model, ())


def test_lists_of_the_environment_may_have_spaces_and_wrong_names_are_helped() -> None:
    flags = {"upstreams": [URL]}
    found = load(None, flags, {"TOKCACHE_SERVE_RULES": "move_clock, blank_nonce"})
    assert found.rules == ("move_clock", "blank_nonce")
    with pytest.raises(InvalidConfig, match="n_slots"):
        load(None, flags, {"TOKCACHE_SERVE_SLOTS": "3"})
