"""The command `tokcache serve`: an endpoint that keeps prefixes in front of llama-servers."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokcache.cli._common import errors_in_one_line
from tokcache.errors import MissingExtra

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokcache.gateway.config import GatewayConfig


def serve(
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL.gguf]", help="Start a llama-server for it.")
    ] = None,
    *,
    upstream: Annotated[
        list[str] | None,
        typer.Option(help="Stand in front of a running llama-server; may be repeated."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of settings; see docs/guides/gateway.md.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000].")] = None,
    slots: Annotated[int | None, typer.Option(help="Slots of the started server [4].")] = None,
    ctx: Annotated[int | None, typer.Option(help="Tokens per slot [8192].")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the started server.")] = None,
    llama_server: Annotated[
        Path | None, typer.Option(help="The llama-server program, instead of xllamacpp's.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for saved slots and their list.")
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Budget of the saved slots, such as 20G, 10% or '50% free' [8G]."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings, print them and stop.")
    ] = False,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Print an API key and its digest, and stop.")
    ] = False,
) -> None:
    """Serve a model under an OpenAI and Anthropic URL without prefilling a prefix twice.

    Paste http://127.0.0.1:8000/v1 into an OpenAI client (OPENAI_BASE_URL), or http://127.0.0.1:8000
    into an Anthropic client (ANTHROPIC_BASE_URL). The page at http://127.0.0.1:8000/ shows the
    reuse.
    """
    with errors_in_one_line():
        if new_key:
            from tokcache.gateway import tenants  # noqa: PLC0415 (imports no extra)

            key, digest = tenants.new_key()
            typer.echo(f"key (give it to the client): {key}")
            typer.echo(f'key_sha256 = "{digest}"')
            return
        flags: dict[str, Any] = {
            "model": str(model) if model else None,
            "upstreams": [{"url": each} for each in upstream] if upstream else None,
            "host": host,
            "port": port,
            "n_slots": slots,
            "n_ctx": ctx,
            "n_threads": threads,
            "llama_server": str(llama_server) if llama_server else None,
            "folder": str(folder) if folder else None,
            "max_bytes": max_bytes,
        }
        settings = _load(config, flags)
        if check:
            _print_settings(settings)
            return
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(settings))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's event loop, a fifth faster here; it is not made for Windows."""
    try:
        import uvloop  # noqa: PLC0415 (an extra)
    except ImportError:
        return None
    make: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return make


def _load(path: Path | None, flags: dict[str, Any]) -> GatewayConfig:
    try:
        import httptools  # noqa: F401, PLC0415 (an extra)
        import starlette  # noqa: F401, PLC0415 (an extra)
        import uvicorn  # noqa: F401, PLC0415 (an extra)
    except ImportError as error:
        raise MissingExtra(
            f"`tokcache serve` needs {error.name}: pip install 'tokcache[gateway]'"
        ) from None
    from tokcache.gateway.config import load  # noqa: PLC0415

    return load(path, flags)


def _print_settings(settings: GatewayConfig) -> None:
    from tokcache.gateway.servers.process import ManagedServer  # noqa: PLC0415

    told = dataclasses.asdict(settings)
    for tenant in told["tenants"]:
        tenant["key_sha256"] = f"{tenant['key_sha256'][:8]}…"
    typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    if settings.llama_server:
        folder = Path(settings.folder or ".") / "slots"
        typer.echo("would run: " + " ".join(ManagedServer(settings, folder).command()))
    elif settings.model:
        typer.echo(f"would start xllamacpp's llama-server with {settings.n_slots} slots")
    for each in settings.upstreams:
        typer.echo(f"would stand in front of {each.url}")


async def _run(settings: GatewayConfig) -> None:
    from tokcache.gateway.app import make_app  # noqa: PLC0415
    from tokcache.gateway.listener import bind, server  # noqa: PLC0415
    from tokcache.gateway.service import Service  # noqa: PLC0415

    # Before the model is loaded, which can take minutes.
    sockets = bind(settings.host, settings.port)
    service = Service(settings)
    loop = asyncio.get_running_loop()
    starting = loop.create_task(service.start())
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, starting.cancel)
    try:
        try:
            await starting
        except asyncio.CancelledError:
            return
        listening = server(make_app(service), service, settings)
        # uvicorn raises a signal again once it has stopped; the saving comes after that.
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, lambda: None)
        _print_urls(settings, int(sockets[0].getsockname()[1]))
        # All that was loaded stays; a collection that walks it would hold up every stream.
        gc.freeze()
        await listening.serve(sockets)
    finally:
        await service.stop()
        for each_socket in sockets:
            each_socket.close()


def _print_urls(settings: GatewayConfig, port: int) -> None:
    scheme = "https" if settings.tls_certfile else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"{scheme}://{host}:{port}"
    key = "any text" if not settings.tenants else "a key whose digest is configured"
    typer.echo(f"OpenAI clients:    OPENAI_BASE_URL={url}/v1   OPENAI_API_KEY={key}")
    typer.echo(f"Anthropic clients: ANTHROPIC_BASE_URL={url}   ANTHROPIC_API_KEY={key}")
    typer.echo(f"Page: {url}/   Metrics: {url}/metrics")
