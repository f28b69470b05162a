"""Templates: how the messages of a prompt become text. Knows chat templates of tokenizers; knows no token ids.

One template renders the messages for all checkpoints, so that all read the same ids. A template is code of a folder:
transformers runs it in a sandbox, and here it is given one day to know of, so that it renders the same tomorrow.
"""

from __future__ import annotations

import datetime
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from actcache.errors import InputError
from actcache.prompts import Prompt

NONE = "none"
"""The template that adds nothing: of a single message, its content is the text."""

DAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
"""What a template is told that asks for the time: the day that Llama's own templates fall back to."""


# What a template may ask of a date.
_DATE_PARTS = [*"aAbBcdDeFHIjmMpRSTuUVwWxXyYzZ", "-d", "-m", "-H", "-I", "-j", "-M", "-S"]


def _on_the_day() -> str:
    """The beginning of a template that asks for the time: it tells it that of ``DAY``, and adds nothing to its text."""
    parts = "".join(f" | replace('%{part}', '{DAY.strftime('%' + part)}')" for part in _DATE_PARTS)
    return "{%- macro strftime_now(format) -%}{{ format" + parts + " }}{%- endmacro %}\n"


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one checkpoint.

    Attributes:
        label: of the checkpoint.
        text: of the template.
    """

    label: str
    text: str
    _tokenizer: PreTrainedTokenizerBase
    _drops: dict[tuple[str, ...], str | None] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, label: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
        """That of a checkpoint; None where it has none."""
        try:
            text = tokenizer.get_chat_template()
        except ValueError:
            return None
        return cls(label, text, tokenizer)

    @property
    def day(self) -> str:
        """What it is told of the date, where it asks."""
        return f"{DAY:%d %B %Y}"

    @property
    def is_dated(self) -> bool:
        """Whether it asks for the time."""
        return "strftime_now" in self.text

    @property
    def identity(self) -> str:
        """What a fingerprint says of it: the label, the SHA-256 of the text, and the day that it is told."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return f"{self.label} {digest}" + (f" {DAY:%Y-%m-%d}" if self.is_dated else "")

    def render(self, prompt: Prompt) -> str:
        """The text of a prompt's messages, to where the answer begins.

        Raises:
            InputError: the template refuses them, or leaves a part of them out; names the prompt.
        """
        messages = prompt.messages or []
        try:
            text = self._apply(messages)
        except Exception as error:  # the template is a program, and raises what it likes
            said = " ".join(str(error).split())[:200]
            raise InputError(f"{prompt.named}: the template of {self.label} does not render it: {said}") from error
        # A text that two messages have, or that is a part of another, must come so often.
        wanted = Counter(one["content"].strip() for one in messages)
        for content in wanted:
            n = sum(one["content"].count(content) for one in messages)
            if text.count(content) < n:
                role = next(one["role"] for one in messages if one["content"].strip() == content)
                raise InputError(
                    f"{prompt.named}: the template of {self.label} leaves out what its {role} message says, "
                    f"{content[:40]!r}, or changes it; give messages that it renders whole"
                )
        if (dropped := self._dropped(tuple(one["role"] for one in messages))) is not None:
            raise InputError(
                f"{prompt.named}: the template of {self.label} leaves out what a {dropped} message says in a chat like "
                "this; give messages that it renders whole"
            )
        return text

    def _apply(self, messages: Sequence[Mapping[str, str]]) -> str:
        how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        how["chat_template"] = _on_the_day() + self.text if self.is_dated else self.text
        text = self._tokenizer.apply_chat_template([dict(one) for one in messages], **how)
        assert isinstance(text, str)
        return text

    def _dropped(self, roles: tuple[str, ...]) -> str | None:
        """A role whose message the template drops from a chat of these: the words of a short one may stand in the text
        without it."""
        if roles in self._drops:
            return self._drops[roles]
        marks = [f"mark{number:04d}of{len(roles):04d}" for number in range(len(roles))]
        try:
            text = self._apply([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)])
        except Exception:  # it asks more of messages than that
            text = "".join(marks)
        self._drops[roles] = next((r for r, mark in zip(roles, marks, strict=True) if mark not in text), None)
        return self._drops[roles]


@dataclass(frozen=True)
class Rendering:
    """How prompts become texts.

    Attributes:
        template: renders messages: a chat template, ``none``, or None where no template is given.
        add_special_tokens: whether the tokenizer puts before a plain text what it puts before every text, as a BOS;
            before messages, the template does.
    """

    template: ChatTemplate | str | None = None
    add_special_tokens: bool = True

    @property
    def identity(self) -> str | None:
        """What a fingerprint says of the template, if there is one."""
        return self.template.identity if isinstance(self.template, ChatTemplate) else None

    def is_whole(self, prompt: Prompt) -> bool:
        """Whether the text of a prompt has all that stands before it, so that a tokenizer puts nothing there."""
        return prompt.messages is not None and isinstance(self.template, ChatTemplate)

    def text_of(self, prompt: Prompt) -> str:
        """The text of a prompt.

        Raises:
            InputError: it has messages, and there is no template; or see :meth:`ChatTemplate.render`.
        """
        if prompt.messages is None:
            return prompt.text
        if isinstance(self.template, ChatTemplate):
            return self.template.render(prompt)
        if self.template is None:
            raise InputError(
                f"{prompt.named} has messages: say by --template whose chat template renders them, as --template it"
            )
        if len(prompt.messages) > 1:
            raise InputError(
                f"{prompt.named} has {len(prompt.messages)} messages, whose turns plain text does not show: "
                "--template none takes the content of a single one; give a checkpoint's template"
            )
        return prompt.messages[0]["content"]


PLAIN = Rendering()
"""Text is read as it is, and messages are refused."""
