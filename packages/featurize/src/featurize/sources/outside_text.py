"""What becomes of text that comes from outside: file and tar names, captions, labels, JSON. Decided here and nowhere else.

| text | becomes |
|---|---|
| names: keys, class names | as they are; bytes that are not UTF-8 and lone surrogates are escaped, `caf\\xe9.png` |
| tables, lists of classes, captions files, recipes | UTF-8, or a sentence with the line (`read_text`) |
| a caption of one image (`.txt`, JSON) | one line of text; what is not Unicode becomes U+FFFD, with a remark |
| labels | whole numbers from 0 to 2**63 - 1, as 7, "7" or 7.0; a negative one means none |
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

SURROGATE = re.compile("[\ud800-\udfff]")
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,30}(\.0*)?")
LARGEST_LABEL = 2**63 - 1  # stores hold int64
REPLACED = "captions hold what is not Unicode text, which was replaced by U+FFFD"
NO_CAPTION = "captions are empty or are not text, and were passed over"


@dataclass
class Oddities:
    """What was odd in a source: how often, and where first."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, what: str, where: str, times: int = 1) -> None:
        count, first = self.found.get(what, (0, where))
        self.found[what] = (count + times, first)

    @property
    def remarks(self) -> list[str]:
        return [f"{count:,} {what} (first: {first})." for what, (count, first) in self.found.items()]


def printable(name: str) -> str:
    """A name as it is stored and shown. Python stands surrogates in for bytes that are not UTF-8; no file can hold those."""
    if name.isascii():
        return name
    return SURROGATE.sub(lambda match: _escaped(ord(match.group())), name)


def _escaped(code: int) -> str:
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def same_form(name: str) -> str:
    """The name in Unicode's composed form (NFC): macOS writes accents apart from their letters (NFD), tables seldom do."""
    return unicodedata.normalize("NFC", name)


def captions_in(value: object, where: str, odd: Oddities) -> tuple[str, ...]:
    """The captions in a value of a table or of JSON: one, or a list of them, each on one line."""
    return tuple(_captions(value if isinstance(value, list) else [value], where, odd))


def _captions(values: list[object], where: str, odd: Oddities) -> Iterator[str]:
    for value in values:
        text = " ".join(value.split()) if isinstance(value, str) else ""
        if not text:
            odd.add(NO_CAPTION, where)
            continue
        if SURROGATE.search(text):
            odd.add(REPLACED, where)
            text = SURROGATE.sub("\ufffd", text)
        yield text


def caption_in(data: bytes, where: str, odd: Oddities) -> tuple[str, ...]:
    """The caption in a text file of one image; none where it is empty."""
    return captions_in(data.decode("utf-8-sig", "surrogateescape"), where, odd) if data.strip() else ()


def label_of(value: object) -> int | None:
    """A label: a whole number, None for a negative one. Raises ValueError, in words, for anything else."""
    number: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    elif isinstance(value, str) and WHOLE_NUMBER.fullmatch(value.strip()):
        number = int(value.strip().partition(".")[0])
    if number is None:
        raise ValueError("it is not a whole number")
    if number > LARGEST_LABEL:
        raise ValueError("it is larger than an int64")
    return None if number < 0 else number


def parse_json(text: str) -> object:
    """Raises ValueError, in words, for what is not JSON, and for what is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:
        raise ValueError("it is not valid JSON") from None
