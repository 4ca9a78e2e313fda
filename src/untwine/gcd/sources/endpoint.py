"""A client for OpenAI-compatible chat endpoints: time-outs that hold, retries, nothing else.

Only `POST BASE/chat/completions` with one answer is used, which every such server has. Some refuse
a parameter, as models that reason refuse `max_tokens` and `temperature`: it is then left out, or
given under its other name, from the next try on.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from untwine.config import JudgeConfig
from untwine.errors import ConfigError

Message = Mapping[str, str]

LONGEST = 1 << 20  # bytes of an answer that are read
_SAID = 200  # characters of an error's text that are shown
ANSWER_TOKENS = 1024  # enough for a model that thinks before it answers
_PAUSE_S = 0.25  # before the second try; twice as long before each further one
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # may be well at the next try
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_REFUSED = {400, 422}  # a parameter may be the reason
_OTHER_NAME = {"max_tokens": "max_completion_tokens"}
_DISPENSABLE = ("max_completion_tokens", "max_tokens", "temperature", "top_logprobs", "logprobs")


class EndpointError(Exception):
    """No usable answer: `str(error)` says why."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer.

    text      what the model wrote
    words     log-probabilities of candidates for its first token, by their text; empty when the
              server does not tell
    tokens    what it cost, prompt and answer
    """

    text: str
    words: Mapping[str, float]
    tokens: int


class Endpoint:
    """One server and one model on it. Safe to use from several threads."""

    def __init__(self, config: JudgeConfig) -> None:
        """ConfigError when the address is none, no model is named, or the key cannot be sent."""
        host = _host(config.url)
        if not config.model:
            raise ConfigError("gcd.judge.url needs gcd.judge.model, the server's name of the model")
        self._config = config
        self._address = config.url.rstrip("/") + "/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get(config.key_variable, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(
                    f"the key in ${config.key_variable} has characters that cannot be sent; set it "
                    "to the key alone"
                )
            self._headers["Authorization"] = f"Bearer {key}"
        # a server on this machine is never behind a proxy
        self._proxies: dict[str, str] | None = {} if host in _LOOPBACK else None
        self._body: dict[str, Any] = {
            "model": config.model,
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
        }
        if config.logprobs:
            self._body |= {"logprobs": True, "top_logprobs": 5}
        self._changing = threading.Lock()

    def ask(self, messages: Sequence[Message]) -> Completion:
        """The answer to a chat. EndpointError when there is none after all tries."""
        tries = self._config.retries + 1
        while True:
            body = {**self._body, "messages": list(messages)}
            try:
                return _completion(self._post(json.dumps(body).encode()))
            except _RefusedError as error:
                if not self._without_refused(body, str(error)):
                    raise EndpointError(str(error)) from None
            except _PassingError as error:
                tries -= 1
                if not tries:
                    raise EndpointError(str(error)) from None
                done = self._config.retries - tries
                time.sleep(min(_PAUSE_S * 2 ** min(done, 20), self._config.timeout_s))

    def _without_refused(self, sent: Mapping[str, Any], said: str) -> bool:
        """Leave out a parameter that the error names, if one of those that were sent is; True when
        it makes sense to ask again."""
        named = (n for n in _DISPENSABLE if n in sent and re.search(rf"\b{n}\b", said))
        name = next(named, None)
        if name is None:
            return False
        with self._changing:
            body = dict(self._body)  # another thread may have changed it since
            if name in body:
                value = body.pop(name)
                if other := _OTHER_NAME.get(name):
                    body[other] = value
                if name == "logprobs":
                    body.pop("top_logprobs", None)
                self._body = body
        return True

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self._address, body, self._headers, method="POST")
        limit = self._config.timeout_s
        end = time.monotonic() + limit
        late = f"no answer within {limit:g} seconds"
        try:
            with _cut_off_after(limit) as handlers:
                opener = urllib.request.build_opener(
                    urllib.request.ProxyHandler(self._proxies), _NoRedirects(), *handlers
                )
                with opener.open(request, timeout=limit) as answer:
                    found = answer.read(LONGEST + 1)
        except urllib.error.HTTPError as error:
            said = _said(error)
            if error.code in _PASSING:
                raise _PassingError(said) from None
            raise (_RefusedError if error.code in _REFUSED else EndpointError)(said) from None
        except TimeoutError:
            raise _PassingError(late) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None)
            if isinstance(reason, TimeoutError) or time.monotonic() >= end:
                raise _PassingError(late) from None
            raise _PassingError(f"not reachable ({reason or type(error).__name__})") from None
        if time.monotonic() >= end:
            raise _PassingError(late)
        if len(found) > LONGEST:
            raise EndpointError(f"an answer of more than {LONGEST} bytes")
        return bytes(found)


def _host(url: str) -> str:
    """The host of an address. ConfigError when it is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        host.encode("idna")
        _ = parts.port
        if parts.scheme in ("http", "https") and host:
            return host
    except ValueError:
        pass
    raise ConfigError(
        f"gcd.judge.url {url!r} is no address; use one such as http://localhost:8000/v1"
    )


def _said(error: urllib.error.HTTPError) -> str:
    """Status and message of an error page."""
    with error, contextlib.suppress(OSError, http.client.HTTPException):
        text = error.read(LONGEST).decode("utf-8", "replace")
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            text = str(json.loads(text)["error"]["message"])
        if short := shortened(text, _SAID):
            return f"status {error.code}: {short}"
    return f"status {error.code}"


def shortened(text: str, most: int) -> str:
    """A text on one line, with at most so many characters and dots in the place of the rest."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


@contextlib.contextmanager
def _cut_off_after(seconds: float) -> Iterator[tuple[urllib.request.BaseHandler, ...]]:
    """Handlers whose connections end when the time is up, whatever the server is sending then.
    Time-outs of sockets only limit the wait for each piece."""
    sockets: list[socket.socket] = []

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Plain, req)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Secure, req)

    def cut() -> None:
        for one in sockets:
            with contextlib.suppress(OSError):  # it is closed
                socket.socket.shutdown(one, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield PlainHandler(), SecureHandler()
    finally:
        timer.cancel()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key goes to the address in the recipe and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _PassingError(Exception):
    """A failure that may pass."""


class _RefusedError(Exception):
    """The server does not take the question as it is."""


def _completion(body: bytes) -> Completion:
    """EndpointError when the body is not what the protocol says."""
    try:
        tree = json.loads(body)
        choice = tree["choices"][0]
        text = choice["message"]["content"]
        if text is None and tree.get("usage"):
            text = ""  # it thought until it was cut off, which costs as much
        if not isinstance(text, str):
            raise TypeError("no text")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise EndpointError("nonsense instead of a chat completion") from None
    usage = tree.get("usage")
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    if not isinstance(tokens, int) or tokens < 0:
        tokens = len(body) // 4
    return Completion(text, _first_token(choice), tokens)


def _first_token(choice: Mapping[str, Any]) -> dict[str, float]:
    """Log-probabilities of candidates for the first token, where there are any that make sense."""
    try:
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        found = {str(e["token"]).strip().lower(): float(e["logprob"]) for e in reversed(entries)}
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return {}
    return {token: x for token, x in found.items() if math.isfinite(x) and x <= 0.0}
