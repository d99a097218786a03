"""The gateway's connection to a llama-server: whole answers, and an error for any other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from tests.gateway.gateways import upstream  # noqa: F401 (skips without the extras)
from tokcache.errors import InvalidAnswer, ServerRefused, ServerTimeout, ServerUnreachable
from tokcache.gateway.servers.exchange import Address

T = TypeVar("T")
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def served(
    sent: list[bytes], use: Callable[[Address], Coroutine[Any, Any, T]], *, closes: bool = True
) -> tuple[T, bytes]:
    """Answer one request with byte strings, each in a packet of its own; return the request too."""
    asked = bytearray()
    is_over = threading.Event()

    def answer() -> None:
        link, _ = listener.accept()
        with link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not asked.endswith(b"{}"):
                asked.extend(link.recv(4096))
            with contextlib.suppress(OSError):  # the client closed it first
                for each in sent:
                    link.sendall(each)
                    time.sleep(0.002)
            if not closes:
                is_over.wait(10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        address = Address(f"http://127.0.0.1:{listener.getsockname()[1]}/base", read_timeout_s=0.3)
        try:
            found = asyncio.run(use(address))
        finally:
            is_over.set()
            thread.join()
    return found, bytes(asked)


async def whole(address: Address) -> tuple[int, bytes]:
    exchange = await address.send("POST", "/v1/x", b"{}")
    try:
        content = b""
        while chunk := await exchange.read():
            content += chunk
        return exchange.status, content
    finally:
        exchange.close()


def test_an_answer_in_any_packets_is_read_whole_and_the_request_is_one_request() -> None:
    answer = HEAD + b"3\r\nabc\r\n" + b"2\r\nde\r\n" + b"0\r\n\r\n"
    for size in (1, 7, len(answer)):
        cut = [answer[at : at + size] for at in range(0, len(answer), size)]
        found, asked = served(cut, whole)
        assert found == (200, b"abcde")
    head, _, body = asked.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /base/v1/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nContent-Length: 2" in head
    assert body == b"{}"


def test_interim_answers_and_bytes_after_the_end_are_not_part_of_the_answer() -> None:
    final = b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno"
    after = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"
    found, _ = served([b"HTTP/1.1 103 Early\r\n\r\n", final + after], whole)
    assert found == (404, b"no")


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ([], ServerUnreachable),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"], ServerUnreachable),
        ([HEAD + b"3\r\nabc\r\n"], ServerUnreachable),
        ([b"HTTP/1.1 200 OK\r\n\r\nno length"], ServerUnreachable),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], InvalidAnswer),
        ([HEAD + b"zz\r\nabc\r\n"], InvalidAnswer),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"],
         InvalidAnswer),
        ([b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc"],
         InvalidAnswer),
        ([b"HTTP/1.1 200 OK\r\n"] + [b"x: " + b"y" * 9_000 + b"\r\n"] * 9, InvalidAnswer),
    ],
    ids=["nothing", "short", "no end", "no length", "ssh", "bad chunk", "smuggled", "upgrade",
         "endless head"],
)  # fmt: skip
def test_anything_but_a_whole_answer_is_an_error(sent: list[bytes], error: type[Exception]) -> None:
    with pytest.raises(error):
        served(sent, whole)


def test_a_silent_server_times_out_at_any_point() -> None:
    for sent in ([], [HEAD], [HEAD + b"3\r\nabc\r\n"]):
        with pytest.raises(ServerTimeout):
            served(sent, whole, closes=False)


def test_nothing_listens() -> None:
    with pytest.raises(ServerRefused):
        asyncio.run(whole(Address("http://127.0.0.1:1", read_timeout_s=1)))


def test_a_slow_reader_holds_the_server_back() -> None:
    n_bytes = 20 << 20

    async def use(address: Address) -> tuple[int, int]:
        exchange = await address.send("POST", "/", b"{}")
        await asyncio.sleep(0.2)
        n_held, n_read = exchange._n_waiting, 0
        while found := await exchange.read():
            n_read += len(found)
        exchange.close()
        return n_held, n_read

    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    (n_held, n_read), _ = served([HEAD, *[chunk] * (n_bytes >> 20), b"0\r\n\r\n"], use)
    assert 0 < n_held < 2 << 20
    assert n_read == n_bytes


def test_closing_ends_the_connection_and_a_waiting_read() -> None:
    async def use(address: Address) -> None:
        exchange = await address.send("POST", "/", b"{}")
        reading = asyncio.ensure_future(exchange.read())
        await asyncio.sleep(0)
        exchange.close()
        with pytest.raises(ServerUnreachable):
            await reading

    served([HEAD], use, closes=False)
