"""A client for OpenAI-compatible chat endpoints: time-outs that hold, retries, nothing else.

Only `POST BASE/chat/completions` with one answer is used, which every such server has.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from untwine.config import JudgeConfig
from untwine.errors import ConfigError

Message = Mapping[str, str]

LONGEST = 1 << 20  # bytes of an answer that are read
ANSWER_TOKENS = 1024  # enough for a model that thinks before it answers
_PAUSE_S = 0.25  # before the second try; twice as long before each further one
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}  # may be well at the next try
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


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
        """ConfigError when the address is none, or no model is named."""
        parts = urllib.parse.urlsplit(config.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"gcd.judge.url {config.url!r} is no address; use one such as "
                "http://localhost:8000/v1"
            )
        if not config.model:
            raise ConfigError("gcd.judge.url needs gcd.judge.model, the server's name of the model")
        self._config = config
        self._address = config.url.rstrip("/") + "/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get(config.key_variable, ""):
            self._headers["Authorization"] = f"Bearer {key}"
        # a server on this machine is never behind a proxy
        proxies: dict[str, str] | None = {} if parts.hostname in _LOOPBACK else None
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(proxies), _NoRedirects()
        )

    def ask(self, messages: Sequence[Message]) -> Completion:
        """The answer to a chat. EndpointError when there is none after all tries."""
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
        }
        if self._config.logprobs:
            body |= {"logprobs": True, "top_logprobs": 5}
        for number in range(self._config.retries + 1):
            try:
                return _completion(self._post(json.dumps(body).encode()))
            except _PassingError as error:
                reason = str(error)
                if number < self._config.retries:
                    time.sleep(min(_PAUSE_S * 2**number, self._config.timeout_s))
        raise EndpointError(reason)

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self._address, body, self._headers, method="POST")
        limit = self._config.timeout_s
        end = time.monotonic() + limit
        try:
            with self._opener.open(request, timeout=limit) as answer:
                found = bytearray()
                while part := answer.read1(1 << 16):
                    found += part
                    if time.monotonic() > end:
                        raise _PassingError(f"no answer within {limit:g} seconds")
                    if len(found) > LONGEST:
                        raise EndpointError(f"an answer of more than {LONGEST} bytes")
                return bytes(found)
        except urllib.error.HTTPError as error:
            error.close()
            what = f"status {error.code}"
            raise (_PassingError if error.code in _PASSING else EndpointError)(what) from None
        except TimeoutError:
            raise _PassingError(f"no answer within {limit:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None)
            if isinstance(reason, TimeoutError):
                raise _PassingError(f"no answer within {limit:g} seconds") from None
            raise _PassingError(f"not reachable ({reason or type(error).__name__})") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key goes to the address in the recipe and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _PassingError(Exception):
    """A failure that may pass."""


def _completion(body: bytes) -> Completion:
    """EndpointError when the body is not what the protocol says."""
    try:
        tree = json.loads(body)
        choice = tree["choices"][0]
        text = choice["message"]["content"]
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
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
    return {token: x for token, x in found.items() if math.isfinite(x) and x <= 0.0}
