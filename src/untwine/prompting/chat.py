"""The chat template of a model, reduced to what an agent needs: an opening, and the glue between
a reply and the next question.

Appending to a chat by rendering it anew would retokenise what the model sampled. So the tokens
around a reply are learnt once from the template (with marker texts) and afterwards only these and
the new user text are tokenised; sampled ids are carried over untouched.
"""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import TemplateError

from untwine.errors import ModelError

# For models without a chat template.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)

_REMEMBERED = 20_000  # texts whose ids are kept: observations and commands come again and again
_USER, _REPLY, _NEXT = "user-marker-1", "reply-marker-2", "next-marker-3"


class Chat:
    """Token-level view of a tokenizer's chat template.

    end_ids   ids that end a reply (the end-of-turn token, and the model's eos)
    """

    def __init__(self, tokenizer: Any, extra_end_ids: tuple[int, ...] = ()) -> None:
        self.tokenizer = tokenizer
        self._template = None if tokenizer.chat_template else PLAIN_TEMPLATE
        self._encode = functools.lru_cache(_REMEMBERED)(self._tokenised)
        special = _special(tokenizer)
        self._special_tokens = [text for text in special.values() if len(text) > 1]
        self._system_role = self._accepts_system()
        text = self._render(
            [
                {"role": "user", "content": _USER},
                {"role": "assistant", "content": _REPLY},
                {"role": "user", "content": _NEXT},
            ]
        )
        _, found, tail = text.partition(_REPLY)
        before, found_next, after = tail.partition(_NEXT)
        if not found or not found_next:
            raise ModelError(
                "the chat template of this tokenizer drops or rewrites earlier replies, so a "
                "growing chat cannot be built from it; use another template or another model"
            )
        self._before_user, self._after_user = before, after
        turn_end = self._encode(before)[:1]
        ends = {i for i in extra_end_ids if i is not None}
        if tokenizer.eos_token_id is not None:
            ends.add(tokenizer.eos_token_id)
        if turn_end and turn_end[0] in special:
            ends.add(turn_end[0])
        if not ends:
            raise ModelError("this tokenizer names no end-of-sequence token, so replies cannot end")
        self.end_ids = frozenset(ends)
        eos = tokenizer.eos_token_id
        self._end: int = eos if eos is not None else min(ends)

    def opening(self, system: str, user: str) -> tuple[int, ...]:
        """Ids of a chat with one question, ready for the reply."""
        system, user = self._defuse(system), self._defuse(user)
        if self._system_role and system:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        else:
            messages = [{"role": "user", "content": f"{system}\n\n{user}".strip()}]
        return self._encode(self._render(messages))

    def follow_up(self, reply_ids: tuple[int, ...], user: str) -> tuple[int, ...]:
        """Ids between a sampled reply and the next one. The end-of-turn token is added only when
        the reply does not already end with it."""
        glue = self._encode(self._before_user + self._defuse(user) + self._after_user)
        if reply_ids and glue and reply_ids[-1] == glue[0] and glue[0] in self.end_ids:
            glue = glue[1:]
        return glue

    def decode(self, ids: tuple[int, ...]) -> tuple[str, bool]:
        """(text of a reply without its end token, whether it ended)."""
        ended = bool(ids) and ids[-1] in self.end_ids
        body = ids[:-1] if ended else ids
        return str(self.tokenizer.decode(list(body), skip_special_tokens=False)), ended

    def piece(self, token: int) -> str:
        """A token as the tokenizer writes it; ASCII letters and signs stay what they are."""
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def reply_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a whole reply: the text and the end-of-sequence token."""
        return (*self._encode(text), self._end)

    def word_ids(self, word: str) -> tuple[int, ...]:
        """Ids of a word as the first thing in a reply."""
        return self._encode(word)

    def _defuse(self, text: str) -> str:
        """Text of an environment must not open or close turns: control tokens in it are spaced."""
        for token in self._special_tokens:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _accepts_system(self) -> bool:
        messages = [{"role": "system", "content": _NEXT}, {"role": "user", "content": _USER}]
        try:
            return _NEXT in self._render(messages)
        except TemplateError:
            return False

    def _render(self, messages: list[dict[str, str]]) -> str:
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            chat_template=self._template or self.tokenizer.chat_template,
        )
        return str(rendered)

    def _tokenised(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)


def _special(tokenizer: Any) -> dict[int, str]:
    """Control tokens by id: those with a role, and others that the tokenizer marks as special, such
    as what opens the header of a turn."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return dict(named) | {i: token.content for i, token in added.items() if token.special}
