"""A pretend llama-server, for behaviour that a real one does not show."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

PROPS = {
    "total_slots": 2,
    "default_generation_settings": {"n_ctx": 1024},
    "model_path": "",
    "media_marker": "one",
}
SLOTS = [{"id": n, "n_ctx": 1024, "is_processing": False} for n in range(2)]


def answer(n_prompt: int, n_cached: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "content": " it",
        "tokens": [5],
        "stop": True,
        "stop_type": "limit",
        "tokens_evaluated": n_prompt,
        "tokens_predicted": 1,
        "tokens_cached": n_prompt,
        "timings": {"cache_n": n_cached, "prompt_n": n_prompt - n_cached, "predicted_ms": 0.1},
        **changes,
    }


class Pretender:
    """Gives the answers that a test sets, and counts the requests."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: Counter[str] = Counter()
        self.bodies: list[Any] = []
        self.logprob = -0.5
        self.headers: dict[str, str] = {}
        self.drip_s = 0.0
        self.say: dict[str, Any] = {
            "/props": PROPS,
            "/slots": SLOTS,
            "/v1/models": {"data": [{"meta": {}}]},
            "/lora-adapters": [],
            "/completion": self.complete,
            "save": self.save,
            "restore": self.restore,
            "erase": {},
        }
        self._saved: dict[str, int] = {}
        self._held: dict[str, int] = {}

    def complete(self, body: dict[str, Any]) -> Any:
        n_prompt = len(body["prompt"])
        held = self._held.get(str(body.get("id_slot")), 0) if body["cache_prompt"] else 0
        self._held[str(body.get("id_slot"))] = n_prompt
        said = answer(n_prompt, min(held, n_prompt - 1))
        if body.get("n_probs"):
            top = [{"id": 5, "logprob": self.logprob}]
            said["completion_probabilities"] = [{"top_logprobs": top}]
        return said

    def save(self, body: dict[str, Any], slot: str) -> Any:
        n_held = self._saved[body["filename"]] = self._held.get(slot, 0)
        return {"n_saved": n_held, "n_written": 100 * n_held}

    def restore(self, body: dict[str, Any], slot: str) -> Any:
        n_held = self._held[slot] = self._saved[body["filename"]]
        return {"n_restored": n_held, "n_read": 100 * n_held}

    def reply(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        path, _, action = handler.path.partition("?action=")
        name = action or path
        self.asked[name] += 1
        self.bodies.append(body)
        said = self.say.get(name, (404, {"error": {"message": "File Not Found"}}))
        if callable(said):
            said = said(body, path.rpartition("/")[2]) if action else said(body)
        status, said = said if isinstance(said, tuple) else (200, said)
        if said is None:  # close the connection without an answer
            handler.close_connection = True
            return
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        for header in self.headers.items():
            handler.send_header(*header)
        handler.end_headers()
        with contextlib.suppress(ConnectionError):  # the client closed the connection
            step = 1 if self.drip_s else len(content) or 1
            for start in range(0, len(content), step):
                time.sleep(self.drip_s)
                handler.wfile.write(content[start : start + step])


@contextlib.contextmanager
def pretend(pretender: Pretender, context: ssl.SSLContext | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            pretender.reply(self, None)

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            pretender.reply(self, json.loads(content))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            scheme = "https" if context else "http"
            yield f"{scheme}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
