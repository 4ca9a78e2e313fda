"""Answers of an endpoint on disk, so that no question is paid for twice.

One JSON object per line: key, text, words, tokens. Lines are only appended, each in one write, so
several runs may share a file; what a crash tore is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from untwine.errors import ConfigError
from untwine.gcd.sources.endpoint import Completion, Message


class AnswerFile:
    """The answers in one file.

    spent  tokens that they have cost
    fault  why the last answer could not be written, which is then known in this process only
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Completion] = {}
        self.spent = 0
        self.fault = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append("")  # it must take what is going to be paid for
            text = path.read_text(encoding="utf-8", errors="replace")
            if text and not text.endswith("\n"):
                self._append("\n")
        except OSError as error:
            raise ConfigError(
                f"gcd.judge.cache {path} cannot be used ({error.strerror}); name another file"
            ) from error
        for line in text.splitlines():
            self._read(line)

    def get(self, key: str) -> Completion | None:
        return self._known.get(key)

    def put(self, key: str, answer: Completion) -> None:
        self._remember(key, answer)
        line = {"key": key, "text": answer.text, "words": answer.words, "tokens": answer.tokens}
        try:
            self._append(json.dumps(line) + "\n")
        except OSError as error:  # the answer is there all the same, and training goes on
            self.fault = f"{self._path} takes no more answers ({error.strerror})"

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(text)

    def _remember(self, key: str, answer: Completion) -> None:
        if key not in self._known:
            self._known[key] = answer
            self.spent += answer.tokens

    def _read(self, line: str) -> None:
        try:
            tree = json.loads(line)
            words = {str(k): float(v) for k, v in tree["words"].items()}
            answer = Completion(str(tree["text"]), words, int(tree["tokens"]))
            self._remember(str(tree["key"]), answer)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return


def question_key(model: str, messages: Sequence[Message], logprobs: bool) -> str:
    """Equal for equal questions to the same model."""
    tree = [model, [dict(m) for m in messages], logprobs]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
