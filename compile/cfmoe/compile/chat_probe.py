"""Which plain conversation a chat template is: found by rendering short chats, and believed only after longer ones came out the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cfmoe.artifact.chat import ChatTemplate, read_template
from cfmoe.artifact.chat_format import DATE_DIRECTIVES, DATE_MARK, MOST_TEXT, ChatFormat, SystemFormat, is_date_format
from cfmoe.compile.checkpoint import read_json
from cfmoe.errors import CFMoEError

# Words that no template writes itself.
_SYSTEM, _USER, _ANSWER, _SECOND, _REPLY, _THIRD = "sYs7q", "uSr1w", "aNs2e", "uSr3r", "aNs4t", "uSr5y"
_THINKING_END = "</think>"
_TRIMS = ("none", "newlines", "all")
_MESSAGES = (
    "What is a b-tree?",
    " two spaces around ",
    "\n\nlines\n\n  indented\n",
    "\tÜnï códe ✓ 漢字 👩\u200d🚀 e\u0301\u2009",
    "<b>&amp;</b> 'quotes' \"and\" {{ braces }} {% if %} C:\\n",
    "one two three four five six seven eight nine ten " * 40,
    "[INST] user: assistant:\n### Human:",
)


class NoPlainConversation(CFMoEError):
    """The template does more than the manifest's `chat` can say; the message is the reason."""


def checkpoint_chat(model: Path, eos_token_ids: Sequence[int], vocab_size: int) -> tuple[ChatFormat | None, str]:
    """The plain conversation of checkpoint directory `model`; else None and why it has none, "" where it brings no template."""
    try:
        template = read_template(model)
        if template is None:
            return None, ""
        return derive_chat(template, _added_tokens(model / "tokenizer.json", vocab_size), eos_token_ids), ""
    except CFMoEError as error:
        return None, str(error)


def _added_tokens(tokenizer: Path, vocab_size: int) -> dict[str, int]:
    """Ids of tokens that are found in a text as they stand, special ones and others."""
    rows = read_json(tokenizer).get("added_tokens")
    tokens = {}
    for row in rows if isinstance(rows, list) else []:
        text, number = (row.get("content"), row.get("id")) if isinstance(row, dict) else (None, None)
        if isinstance(text, str) and text and isinstance(number, int) and 0 <= number < vocab_size:
            tokens[text] = number
    return tokens


def derive_chat(template: ChatTemplate, added_tokens: dict[str, int], eos_token_ids: Sequence[int] = ()) -> ChatFormat:
    """The conversation that gives `template`'s words for every chat of a person and a model, to the character.

    `added_tokens` maps the tokenizer's added tokens to their ids. Raises NoPlainConversation with the reason where there is none, and
    CFMoEError where jinja2 is missing.
    """
    probe = _Probe(template)
    found = _texts(probe)
    found = replace(found, system=_system(probe, found))
    found = _changes(probe, found)
    found = replace(found, date_format=probe.date_format)
    _check_texts(found, added_tokens)
    _verify(probe, found)
    return _stops(found, added_tokens, eos_token_ids)


class _Probe:
    """Renders chats with `DATE_MARK` for a date, and remembers in which form the template wanted it."""

    def __init__(self, template: ChatTemplate) -> None:
        self._render = template.renderer(self._now)
        self.date_format = ""

    def __call__(self, messages: Sequence[str], system: str | None = None) -> str:
        roles = itertools.cycle(("user", "assistant"))
        chat = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
        if system is not None:
            chat.insert(0, {"role": "system", "content": system})
        return self._render(chat)

    def or_none(self, messages: Sequence[str], system: str | None) -> str | None:
        try:
            return self(messages, system)
        except CFMoEError:
            return None

    def _now(self, form: str) -> str:
        if not is_date_format(form):
            raise NoPlainConversation(f"the template writes a time as {form!r}; known are dates of % and one of {DATE_DIRECTIVES}")
        if self.date_format not in ("", form):
            raise NoPlainConversation(f"the template writes dates in two forms, {self.date_format!r} and {form!r}")
        self.date_format = form
        return DATE_MARK


def _cut(text: str, words: Sequence[str]) -> list[str]:
    """What stands around `words`, each of which must be there once, in order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise NoPlainConversation("the template leaves out, changes or repeats messages")
        parts.append(before)
    return [*parts, text]


def _texts(probe: _Probe) -> ChatFormat:
    begin, reply = _cut(probe([_USER]), [_USER])
    first, replied, turn, last = _cut(probe([_USER, _ANSWER, _SECOND]), [_USER, _ANSWER, _SECOND])
    if (first, last) != (begin, reply):
        raise NoPlainConversation("the template writes other texts around a message when more messages follow")
    return ChatFormat(begin, reply, replied, turn, None, False, False, "", "none", "", (), ())


def _system(probe: _Probe, found: ChatFormat) -> SystemFormat | None:
    """None where the template refuses system messages, ignores them, or puts them elsewhere than in front."""
    text = probe.or_none([_USER], _SYSTEM)
    if text is None or text.count(_SYSTEM) != 1:
        return None
    try:
        before, after, reply = _cut(text, [_SYSTEM, _USER])
    except NoPlainConversation:
        return None
    if reply != found.reply:
        return None
    default = ""
    if len(found.begin) > len(before) + len(after) and found.begin.startswith(before) and found.begin.endswith(after):
        default = found.begin[len(before) : len(found.begin) - len(after)]
    without = probe.or_none([_USER], "")
    empty = found.begin if without is None else _cut(without, [_USER])[0]
    return SystemFormat(before, after, empty, default, False)


def _changes(probe: _Probe, found: ChatFormat) -> ChatFormat:
    """What the template does to the messages themselves: the first of the known changes that explains its words."""
    spaced = " \n{}\t\n "

    def first(what: str, wanted: str, candidates: Iterable[ChatFormat], messages: list[str], system: str | None = None) -> ChatFormat:
        for candidate in candidates:
            if candidate.render(messages, system) == wanted:
                return candidate
        raise NoPlainConversation(f"the template changes {what} in a way that is not known")

    messages = [spaced.format(_USER)]
    found = first("what a person says", probe(messages), [replace(found, trim_user=trim) for trim in (False, True)], messages)
    messages = [_USER, spaced.format(_ANSWER), _SECOND]
    found = first("an answer", probe(messages), [replace(found, trim_answer=trim) for trim in (False, True)], messages)
    # An answer that shows its thoughts first, with nothing, a line or blanks behind them.
    messages = [_USER, f"<think>\n{_ANSWER}\n{_THINKING_END}\n\n \n{_REPLY}", _SECOND]
    thoughts = [found, *(replace(found, thinking_end=_THINKING_END, thinking_trim=trim) for trim in _TRIMS)]
    found = first("an answer that shows its thoughts", probe(messages), thoughts, messages)
    if found.system is not None:
        trims = [replace(found, system=replace(found.system, trim=trim)) for trim in (False, True)]
        system = spaced.format(_SYSTEM)
        text = probe.or_none([_USER], system)
        if text is None:
            return replace(found, system=None)
        found = first("the system's text", text, trims, [_USER], system)
    return found


def _check_texts(found: ChatFormat, added_tokens: dict[str, int]) -> None:
    texts = [found.begin, found.reply, found.replied, found.next]
    if found.system is not None:
        texts += [found.system.before, found.system.after, found.system.empty]
    if max(map(len, texts)) > MOST_TEXT:
        raise NoPlainConversation(f"the template writes more than {MOST_TEXT} characters around a message")
    if not found.date_format and any(DATE_MARK in text for text in texts):
        raise NoPlainConversation(f"the template writes U+{ord(DATE_MARK):04X}, which stands for dates here")
    if not (found.begin + found.reply + found.next).strip():
        raise NoPlainConversation("the template puts nothing around messages")
    # What is in a past answer's place from the beginning, and not in the new one's, is the model's to write.
    if found.replied.startswith(found.reply):
        own = found.replied[len(found.reply) :]
        for token in added_tokens:
            if token in own:
                raise NoPlainConversation(
                    f"before its answer the model has to write {own.strip()!r}, which holds the special token {token}"
                )


def _verify(probe: _Probe, found: ChatFormat) -> None:
    for messages, system in _chats():
        if system is not None and found.system is None:
            continue
        if probe(messages, system) != found.render(messages, system):
            what = f"a chat of {len(messages)} messages" + (" with a system message" if system is not None else "")
            raise NoPlainConversation(f"the texts around messages are not always the same: {what} comes out otherwise")


def _chats() -> Iterable[tuple[list[str], str | None]]:
    """Chats of one to nine messages: plain ones, with every odd message in every place, with thoughts, each with and without system."""
    plain = [_USER, _ANSWER, _SECOND, _REPLY, _THIRD, "a6", "u7", "a8", "u9"]
    for system in (None, _SYSTEM, "", _MESSAGES[1], _MESSAGES[2], _MESSAGES[3]):
        for count in (1, 3, 5, 9):
            yield plain[:count], system
    for number, odd in enumerate(_MESSAGES):
        others = itertools.cycle(_MESSAGES[number:] + _MESSAGES[:number])
        yield [odd], None
        yield [odd], odd
        yield list(itertools.islice(others, 5)), None
        yield list(itertools.islice(others, 7)), _SYSTEM
    thoughts = (f"<think>\nso\n{_THINKING_END}\n\n{_ANSWER}", f"so{_THINKING_END} {_ANSWER}\n", f"<think>x{_THINKING_END}y{_THINKING_END}z")
    for one, two in itertools.product(thoughts, repeat=2):
        yield [_USER, one, _SECOND, two, _THIRD], None


def _stops(found: ChatFormat, added_tokens: dict[str, int], eos_token_ids: Sequence[int]) -> ChatFormat:
    """An answer ends at the model's end tokens, and where the template goes on behind it: at a token if it begins with one."""
    ids = list(eos_token_ids)
    turn = found.next.lstrip()
    first = max((token for token in added_tokens if turn.startswith(token)), key=len, default=None)
    if first is not None:
        ids.append(added_tokens[first])
    strings = (turn.rstrip(),) if first is None and 0 < len(turn.rstrip()) <= 256 else ()
    return replace(found, stop_token_ids=tuple(dict.fromkeys(ids)), stop_strings=strings)
