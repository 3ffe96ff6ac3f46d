"""The plain conversation of the manifest's `chat`: which texts stand around messages, and the same words as the checkpoint's template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from cfmoe.artifact.fields import Fields

# What Python's str.strip takes away, which is what templates trim with; the apps have the same list.
WHITESPACE = "".join(map(chr, (*range(9, 14), *range(28, 33), 133, 160, 5760, *range(8192, 8203), 8232, 8233, 8239, 8287, 12288)))
# Stands in texts where the template writes today's date; for private use, so that no template writes it itself.
DATE_MARK = "\ue000"
# The directives of strftime that a date format may have.
DATE_DIRECTIVES = "YmdBbjA"
MOST_TEXT = 16 << 10  # characters
MOST_STOPS = 64
_MOST_STOP = 256  # characters
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_TRIMS = ("none", "newlines", "all")


@dataclass(frozen=True)
class SystemFormat:
    """`before` and `after` stand around the system's text, and `after` ends where the first message begins.

    `default` is the text that the template itself takes where none is given, "" for none; `empty` stands before the first message
    where the text is empty.
    """

    before: str
    after: str
    empty: str
    default: str
    trim: bool


@dataclass(frozen=True)
class ChatFormat:
    """Where all texts stand: begin | user | replied | answer | next | user | reply, and the new answer follows.

    `trim_user` and `trim_answer`: whitespace around such a message goes. Of an answer in the past what stands up to the last
    `thinking_end` goes ("": nothing), then its first line ends or whitespace as `thinking_trim` says. `date_format` is what
    `DATE_MARK` in the texts stands for.
    """

    begin: str
    reply: str
    replied: str
    next: str
    system: SystemFormat | None
    trim_user: bool
    trim_answer: bool
    thinking_end: str
    thinking_trim: str
    date_format: str
    stop_token_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]

    def render(self, messages: Sequence[str], system: str | None = None, today: date | None = None) -> str:
        """A conversation: user, answer, user, …, an odd number of messages, ready for the next answer.

        `system` None leaves it to the template. `today` None leaves `DATE_MARK` where it stands.
        """
        out = [self._head(system)]
        for number, message in enumerate(messages):
            if number % 2 == 0:
                out.append(message.strip(WHITESPACE) if self.trim_user else message)
                out.append(self.reply if number == len(messages) - 1 else self.replied)
            else:
                out += [self.past(message), self.next]
        text = "".join(out)
        return text if today is None else text.replace(DATE_MARK, format_date(today, self.date_format))

    def past(self, answer: str) -> str:
        """What stays of an answer once it lies in the past."""
        if self.thinking_end and self.thinking_end in answer:
            answer = answer.rpartition(self.thinking_end)[2]
            answer = answer.lstrip({"none": "", "newlines": "\n", "all": WHITESPACE}[self.thinking_trim])
        return answer.strip(WHITESPACE) if self.trim_answer else answer

    def _head(self, system: str | None) -> str:
        if system is None or self.system is None:
            return self.begin
        if not system:
            return self.system.empty
        return self.system.before + (system.strip(WHITESPACE) if self.system.trim else system) + self.system.after

    def record(self) -> dict[str, Any]:
        """As the manifest has it."""
        value = asdict(self)
        return value | {"stop_token_ids": list(self.stop_token_ids), "stop_strings": list(self.stop_strings)}


def format_date(day: date, form: str) -> str:
    """strftime with English names on every machine."""
    values = {
        "Y": f"{day.year:04}",
        "m": f"{day.month:02}",
        "d": f"{day.day:02}",
        "B": _MONTHS[day.month - 1],
        "b": _MONTHS[day.month - 1][:3],
        "j": f"{day.timetuple().tm_yday:03}",
        "A": _DAYS[day.weekday()],
    }
    parts = form.split("%")
    return parts[0] + "".join(values[part[0]] + part[1:] for part in parts[1:])


def is_date_format(form: str) -> bool:
    """Whether `format_date` knows every directive."""
    return len(form) <= 64 and all(part[:1] and part[0] in DATE_DIRECTIVES for part in form.split("%")[1:])


def parse_chat(fields: Fields, vocab_size: int) -> ChatFormat:
    """The manifest's `chat`, every field checked. Raises CFMoEError."""
    date_format = _text(fields, "date_format", 64)
    if not is_date_format(date_format):
        raise fields.wrong("date_format", f"is {date_format!r}, which has directives other than % and one of {DATE_DIRECTIVES}")
    stops = fields.text_list("stop_strings")
    if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= _MOST_STOP for stop in stops):
        raise fields.wrong("stop_strings", f"holds more than {MOST_STOPS} texts, or one that is empty or over {_MOST_STOP} characters long")
    ids = fields.integer_list("stop_token_ids", 0, vocab_size - 1)
    if len(ids) > MOST_STOPS:
        raise fields.wrong("stop_token_ids", f"holds {len(ids)} tokens, more than {MOST_STOPS}")
    return ChatFormat(
        begin=_text(fields, "begin"),
        reply=_text(fields, "reply"),
        replied=_text(fields, "replied"),
        next=_text(fields, "next"),
        system=None if fields.value("system") is None else _parse_system(fields.object("system")),
        trim_user=fields.boolean("trim_user"),
        trim_answer=fields.boolean("trim_answer"),
        thinking_end=_text(fields, "thinking_end", _MOST_STOP),
        thinking_trim=fields.choice("thinking_trim", _TRIMS),
        date_format=date_format,
        stop_token_ids=tuple(ids),
        stop_strings=tuple(stops),
    )


def _parse_system(fields: Fields) -> SystemFormat:
    texts = {name: _text(fields, name) for name in ("before", "after", "empty", "default")}
    return SystemFormat(**texts, trim=fields.boolean("trim"))


def _text(fields: Fields, name: str, most: int = MOST_TEXT) -> str:
    text = fields.text(name)
    if len(text) > most:
        raise fields.wrong(name, f"has {len(text)} characters, more than {most}")
    return text
