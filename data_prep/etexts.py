"""Plain-text books: find the encoding, cut Project Gutenberg's licence, join hard-wrapped lines."""

import codecs
import re
from statistics import quantiles

import charset_normalizer

SAMPLE_BYTES = 1 << 18  # of a file shown to the encoding detector
PROSE_FILL = 0.75  # a prose paragraph's full lines reach this share of the wrap width
LONGEST_WRAP = 100  # characters; files with longer lines are not hard-wrapped
SHORTEST_WRAP = 50

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DECLARED = re.compile(rb"^Character set encoding:\s*([\w.-]+)", re.MULTILINE | re.IGNORECASE)
_START = re.compile(
    r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*(?:\n[^\n]+)*?\*\*\*[ \t]*$"
    r"|^\*END\*? ?THE SMALL PRINT![^\n]*$"
    r"|^\*?\*?\*? ?These [Ee](?:texts|books) (?:are|were) prepared by [^\n]*volunteers[^\n]*$",
    re.MULTILINE | re.IGNORECASE,
)
_END = re.compile(r"^\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG", re.MULTILINE | re.IGNORECASE)
# what older files end with, and those of some years have just before the mark
_OLD_END = re.compile(
    r"^[ \t]*End of (?:the |this )?Project Gutenberg(?:'s|\u2019s)?\b", re.MULTILINE | re.IGNORECASE
)
_CREDIT = re.compile(
    r"\A\s*(?:Produced|E-?text prepared|Transcribed|This eBook was produced) by[^\n]*(?:\n[^\n]+)*"
)
_TITLE = re.compile(r"^Title:[ \t]*([^\n]+(?:\n[ \t]+[^\n]+)*)", re.MULTILINE)
_NUMBER = re.compile(r"\[e(?:book|text) #(\d+)\]", re.IGNORECASE)
_UPPER_START = re.compile(r"[\W_]*[A-Z\u00c0-\u00de]")


class NotText(ValueError):
    """The bytes are no text in any known encoding."""


def decode(content: bytes) -> tuple[str, str]:
    """(text, encoding). UTF-8 if it is valid, else what the file declares or what its letters suggest.

    Raises NotText for binary content.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return _decoded(content, encoding), encoding
    if b"\0" in content:
        raise NotText("it holds NUL bytes")
    try:
        return content.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        encoding = _declared(content) or _detected(content)
        return _decoded(content, encoding), encoding


def _decoded(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise NotText(f"it is not {encoding}: {error.reason} at byte {error.start}") from error


def _declared(content: bytes) -> str | None:
    found = _DECLARED.search(content[:4096])
    try:
        name = codecs.lookup(found[1].decode("ascii")).name if found else "utf-8"
    except LookupError:
        return None
    if name in ("utf-8", "ascii"):
        return None
    return "cp1252" if name == "iso8859-1" and not _undefined_in_cp1252(content) else name


def _undefined_in_cp1252(content: bytes) -> bool:
    return any(byte in content for byte in (b"\x81", b"\x8d", b"\x8f", b"\x90", b"\x9d"))


def _detected(content: bytes) -> str:
    # lines that are not ASCII say most about the encoding; a book's first 256 kB may hold none
    telling = b"\n".join(line for line in content.splitlines() if not line.isascii())[:SAMPLE_BYTES]
    best = charset_normalizer.from_bytes(telling).best()
    if best is None:
        raise NotText("no known encoding fits")
    return best.encoding


def gutenberg_parts(text: str) -> tuple[str, str, str] | None:
    """(number or "", title or "", text without licence) of a Project Gutenberg file; None for other files."""
    starts = list(_START.finditer(text[:60_000]))
    begin = starts[-1].end() if starts else 0
    end = _end(text, begin if starts else len(text) // 2)
    if not starts and end is None:
        return None
    head = text[:begin] if starts else text[:2000]
    number, title = _NUMBER.search(head), _TITLE.search(head)
    body = _CREDIT.sub("", text[begin:end])
    return number[1] if number else "", " ".join(title[1].split()) if title else "", body.strip("\n")


def _end(text: str, begin: int) -> int | None:
    """Where the licence behind a book begins: at the mark, or at the older line if no mark follows."""
    mark = _END.search(text, begin)
    old_lines = [line.start() for line in _OLD_END.finditer(text, begin, mark.start() if mark else len(text))]
    if mark is None:
        return old_lines[0] if old_lines else None
    is_last = bool(old_lines) and "\n\n" not in text[old_lines[-1] : mark.start()].rstrip()
    return old_lines[-1] if is_last else mark.start()


def unwrapped(text: str) -> str:
    """Join hard-wrapped lines of prose paragraphs; verse, lists and files with long lines stay as they are.

    A paragraph is prose when its lines but the last fill the width the file is wrapped at, none of them is
    indented beyond the first, and not nearly all begin with a capital, as lines of verse do.
    """
    lines = text.split("\n")
    width = _wrap_width(lines)
    if width is None:
        return text
    paragraphs = re.split(r"\n(?:[ \t]*\n)+", text)
    return "\n\n".join(_joined(paragraph, width) for paragraph in paragraphs)


def _wrap_width(lines: list[str]) -> int | None:
    lengths = [len(line.rstrip()) for line in lines if line.strip()]
    if len(lengths) < 4:
        return None
    *_, upper, top = (quantiles(lengths, n=100)[percent] for percent in (89, 97))
    return round(upper) if SHORTEST_WRAP <= upper and top <= LONGEST_WRAP else None


def _joined(paragraph: str, width: int) -> str:
    lines = [line.rstrip() for line in paragraph.split("\n")]
    if len(lines) < 2 or not _is_prose(lines, width):
        return paragraph
    return " ".join(line.strip() for line in lines)


def _is_prose(lines: list[str], width: int) -> bool:
    full = lines[:-1]
    if any(line[:1] in " \t" for line in lines[1:]):
        return False
    if sum(len(line) for line in full) < PROSE_FILL * width * len(full):
        return False
    capitals = sum(_UPPER_START.match(line) is not None for line in lines[1:])
    return len(lines) < 4 or capitals <= 0.8 * len(lines[1:])
