"""A real HTTP server that plays an OpenAI-compatible endpoint, well or badly."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, "body": body, **dict(self.headers)})
        with contextlib.suppress(OSError):  # the client has gone
            self.server.behaviour(self, body)

    def reply(self, text: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def say(self, content: Any, logprobs: Any = None) -> None:
        choice = {"message": {"role": "assistant", "content": content}, "logprobs": logprobs}
        tree = {"choices": [choice], "usage": {"total_tokens": 10}}
        self.reply(json.dumps(tree).encode())

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour = behaviour
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[Server]:
    with Server(behaviour) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(body: dict[str, Any]) -> str:
    """The action that is asked about."""
    return str(body["messages"][-1]["content"]).partition("Action: ")[2].partition("\n")[0]


def good_north(handler: Handler, body: dict[str, Any]) -> None:
    """Going north is good, all else is bad."""
    handler.say("good" if asked(body) == "go north" else "Bad.")


def mute(handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(1.0)


def trickle(handler: Handler, body: dict[str, Any]) -> None:
    """Each piece comes in time, the whole never does."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def trickle_headers(handler: Handler, body: dict[str, Any]) -> None:
    """The same before the first byte of the answer."""
    handler.send_response(200)
    for number in range(20):
        handler.send_header(f"X-{number}", "wait")
        handler.flush_headers()
        time.sleep(0.1)
    handler.end_headers()
