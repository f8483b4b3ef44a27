"""MediaWiki markup to plain text.

A linear pass cuts what is to go (comments, tables, templates, references, files, categories, HTML tags);
then mwparserfromhell resolves what is left (links, entities), line by line. For speed, and for safety: on
whole pages the parser takes quadratic time and gigabytes on some soups (its issues 190, 206, 286, 364).
"""

import re
from collections.abc import Iterable, Iterator

import mwparserfromhell

MAX_UNCLOSED_BRACKETS = 2000  # a page with more is not prose, and the parser's time grows with their square
MAX_CHARACTERS = 4 << 20  # of markup; MediaWiki itself takes 2 MB
MAX_PARSED_CHARACTERS = 8000  # at once; longer lines are parsed in pieces, for the same reason

DISAMBIGUATION_TEMPLATES = (
    "disambig", "disambiguation", "disambiguation page", "disamb", "dab", "hndis", "geodis",
    "numberdis", "letter-numbercombdisambig", "letter-number combination disambiguation", "mathdab",
    "schooldis", "roaddis", "hospitaldis", "callsigndis", "airport disambiguation",
    "human name disambiguation", "place name disambiguation", "species latin name disambiguation",
    "taxonomy disambiguation", "wp disambig", "begriffsklärung", "bks", "homonymie", "desambiguación",
    "desambig", "desambiguação", "disambigua", "dp", "doorverwijspagina", "ujednoznacznienie",
    "förgrening", "неоднозначность", "багатозначність", "曖昧さ回避", "aimai", "消歧义", "消歧義",
    "동음이의", "توضيح", "ابهام‌زدایی", "anlam ayrımı", "trang định hướng", "rozcestník", "egyértelmű",
    "täsmennyssivu", "flertydig", "pekerside", "αποσαφήνιση", "פירושונים", "disambiguasi",
)  # fmt: skip

DROPPED_TAGS = (
    "ref", "references", "gallery", "math", "chem", "ce", "timeline", "syntaxhighlight", "source",
    "imagemap", "score", "templatedata", "templatestyles", "graph", "mapframe", "maplink", "hiero",
    "inputbox", "categorytree", "section", "indicator", "style", "script", "table", "includeonly",
    "pagelist", "pagequality",
)  # fmt: skip

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_LITERAL = re.compile(r"<(/?)(?:nowiki|pre)\b([^<>]*)>", re.IGNORECASE)
_BRACES = re.compile(r"\{\{+|\}\}+|^[ :*#;]*\{\||^[ \t]*\|\}(?!\})", re.MULTILINE)
_DROPPED = re.compile(rf"<(/?)(?:{'|'.join(DROPPED_TAGS)})\b([^<>]*)>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_BREAK = re.compile(r"<(?:br|/p|/div|/li|/tr|hr)\b[^<>]*>", re.IGNORECASE)
_LINK_EDGE = re.compile(r"\[\[|\]\]")
_INTERWIKI = re.compile(r"\[\[[a-z]{2,3}(?:-[a-z]+)*:[^\[\]|]*\]\][ \t]*(?=\n|\Z)")
_SHOWN_LINK = re.compile(r"\[\[[ \t]*:[ \t]*")  # [[:Category:X]] links to what [[Category:X]] would belong to
_SWITCH = re.compile(r"__[A-Z]+__")
_EXTERNAL_LINK = re.compile(r"\[(?:[a-z]+:)?//[^\s\[\]]+[ \t]*([^\[\]\n]*)\]")
_HIDDEN = re.compile("\ue000(\\d+)\ue001")
_LIST_MARK = re.compile(r"[*#:;]+[ \t]*")
_BOLD_ITALIC = re.compile(r"'{2,5}")
_NEEDS_PARSER = re.compile(r"\[|&[#A-Za-z]")
_LEFT_HOLES = re.compile(r"\( ?[,;]? ?\)|\[ ?\]")
_DANGLING = re.compile(r"(?: ?[,;]){1,3} ?\)")
_SPACES = re.compile(r"[ \t\u00a0]{2,}")
_SPACE_BEFORE = re.compile(r" ([,.;:)](?:\s|$))")
_TEMPLATE_NAME = re.compile(r"\{\{([^{}|\n]{1,80})")


class TooComplex(ValueError):
    """The page is so long, or has so many unclosed brackets, that parsing it could take minutes."""


def is_disambiguation(title: str, markup: str, more_templates: Iterable[str] = ()) -> bool:
    """Whether the page only lists other pages: by its title, a magic word or a template near its ends."""
    if "(disambiguation)" in title or "__DISAMBIG__" in markup:
        return True
    known = {*DISAMBIGUATION_TEMPLATES, *(name.lower() for name in more_templates)}
    ends = markup if len(markup) <= 20_000 else markup[:10_000] + "\n" + markup[-10_000:]
    return any(name.replace("_", " ").strip().lower() in known for name in _TEMPLATE_NAME.findall(ends))


def plain_text(markup: str, dropped_namespaces: Iterable[str] = ("file", "image", "category")) -> str:
    """The prose of a page: a line per paragraph, list item or heading; empty sections are left out.

    `dropped_namespaces`: lower-case names whose links vanish with all they hold. Raises TooComplex.
    """
    if len(markup) > MAX_CHARACTERS:
        raise TooComplex(f"{len(markup)} characters of markup, at most {MAX_CHARACTERS} are parsed")
    literals: list[str] = []
    text = _COMMENT.sub("", markup)
    text = _hide_literals(text.replace("\ue000", ""), literals)
    text = _without_spans(text, _brace_spans(text))
    text = _without_spans(text, _dropped_tag_spans(text))
    text = _TAG.sub("", _BREAK.sub("\n", text))
    text = _INTERWIKI.sub("", text)
    text = _without_spans(text, _link_spans(text, frozenset(dropped_namespaces)))
    text = _SHOWN_LINK.sub("[[", text)
    text = _EXTERNAL_LINK.sub(r"\1", _SWITCH.sub("", text.replace("{{", "").replace("}}", "")))
    _refuse_tangles(text)
    lines = _without_empty_sections(_parsed_line(line) for line in text.split("\n"))
    return _show_literals("\n".join(lines), literals).strip()


def _hide_literals(text: str, literals: list[str]) -> str:
    """Swap <nowiki> and <pre> bodies for numbered marks, so that no later step reads markup in them."""
    pieces, position, opened = [], 0, None
    for match in _LITERAL.finditer(text):
        if opened is None and not match[1]:
            pieces.append(text[position : match.start()])
            position = match.end()
            opened = None if match[2].endswith("/") else match
        elif opened is not None and match[1]:
            pieces.append(f"\ue000{len(literals)}\ue001")
            literals.append(text[opened.end() : match.start()])
            position, opened = match.end(), None
    return "".join(pieces) + text[position:]


def _show_literals(text: str, literals: list[str]) -> str:
    return _HIDDEN.sub(lambda match: literals[int(match[1])], text) if literals else text


def _without_spans(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """`text` without the given spans; spans are by end, a later one may hold earlier ones."""
    outermost: list[tuple[int, int]] = []
    for start, end in spans:
        while outermost and outermost[-1][0] >= start:
            outermost.pop()
        outermost.append((start, end))
    pieces, position = [], 0
    for start, end in outermost:
        pieces.append(text[position:start])
        position = end
    pieces.append(text[position:])
    return "".join(pieces)


def _brace_spans(text: str) -> Iterator[tuple[int, int]]:
    """Spans of templates {{ }} (parameters {{{ }}} too) and tables {| |}; unclosed ones give none."""
    open_braces: list[tuple[int, int]] = []  # (position, how many braces of the run are still open)
    open_tables: list[tuple[int, int]] = []  # (position, how many templates were open there)
    for match in _BRACES.finditer(text):
        token = match[0]
        if token.endswith("{|"):
            open_tables.append((match.start(), len(open_braces)))
        elif token.endswith("|}"):
            if open_tables:
                start, depth = open_tables.pop()
                del open_braces[depth:]
                yield start, match.end()
        elif token[0] == "{":
            open_braces.append((match.start(), len(token)))
        else:
            yield from _close_braces(open_braces, match.start(), len(token))


def _close_braces(
    open_braces: list[tuple[int, int]], position: int, closing: int
) -> Iterator[tuple[int, int]]:
    while closing >= 2 and open_braces:
        start, opened = open_braces.pop()
        used = min(opened, closing, 3)
        if opened - used == 1 or closing - used == 1:  # {{{{x}}}} is two templates, not {{{ and a stray brace
            used = 2
        closing, position = closing - used, position + used
        if opened - used >= 2:
            open_braces.append((start, opened - used))
        yield start + opened - used, position


def _dropped_tag_spans(text: str) -> Iterator[tuple[int, int]]:
    """Spans of references, galleries, formulas and the like, tags and content."""
    opened: list[tuple[int, str]] = []
    for match in _DROPPED.finditer(text):
        name = match[0].strip("</>").split(None, 1)[0].rstrip("/").lower()
        if match[2].endswith("/"):
            yield match.span()
        elif not match[1]:
            opened.append((match.start(), name))
        elif opened and any(name == other for _, other in opened[-8:]):
            while True:
                start, other = opened.pop()
                if other == name:
                    break
            yield start, match.end()


def _link_spans(text: str, dropped: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Spans of [[File:...]], [[Category:...]] and their like, whatever links their captions hold."""
    opened: list[int] = []
    for match in _LINK_EDGE.finditer(text):
        if match[0] == "[[":
            opened.append(match.start())
        elif opened:
            start = opened.pop()
            namespace, colon, _ = text[start + 2 : start + 66].partition(":")
            if colon and namespace.strip().replace("_", " ").lower() in dropped:
                yield start, match.end()


def _refuse_tangles(text: str) -> None:
    unclosed = sum(abs(line.count("[") - line.count("]")) for line in text.split("\n") if "[" in line)
    if unclosed > MAX_UNCLOSED_BRACKETS:
        raise TooComplex(f"{unclosed} unclosed brackets, at most {MAX_UNCLOSED_BRACKETS} are parsed")


def _parsed_line(line: str) -> tuple[int, str]:
    """(heading level or 0, plain text) of one line of markup."""
    level = 0
    if line.startswith("="):
        level, line = _heading(line.rstrip())
    elif line.startswith(("*", "#", ":", ";")):
        line = _LIST_MARK.sub("", line, count=1)
    elif line.startswith("----"):
        line = line.lstrip("-")
    line = _BOLD_ITALIC.sub(lambda quotes: "'" * (len(quotes[0]) == 4), line)
    if _NEEDS_PARSER.search(line):
        line = "".join(_without_inline_markup(piece) for piece in _pieces(line))
    line = _SPACES.sub(" ", line)
    if "(" in line or "[" in line:  # what a cut template leaves: "()", "(Greek; )"
        line = _DANGLING.sub(")", _LEFT_HOLES.sub("", line))
    return level, _SPACE_BEFORE.sub(r"\1", line).strip()


def _pieces(line: str) -> list[str]:
    """The line in pieces that the parser takes, cut after spaces where there are any."""
    pieces = []
    while len(line) > MAX_PARSED_CHARACTERS:
        cut = line.rfind(" ", 0, MAX_PARSED_CHARACTERS) + 1 or MAX_PARSED_CHARACTERS
        pieces.append(line[:cut])
        line = line[cut:]
    return [*pieces, line]


def _without_inline_markup(line: str) -> str:
    # tags and quotes are gone by now; a "<" left over is literal, but the parser would look far for its end
    parsed = mwparserfromhell.parse(line.replace("<", "&lt;"))
    return str(parsed.strip_code(normalize=True, collapse=False))


def _heading(line: str) -> tuple[int, str]:
    """(level, title) of `== title ==`; (0, line) when it is no heading."""
    left, right = (len(line) - len(stripped) for stripped in (line.lstrip("="), line.rstrip("=")))
    level = min(left, right, 6)
    title = line[level : len(line) - level].strip()
    return (level, title) if level and title.strip("= ") else (0, line)


def _without_empty_sections(lines: Iterable[tuple[int, str]]) -> list[str]:
    """Lines without the headings that nothing stands under, and without runs of empty lines."""
    kept: list[str] = []
    headings: list[tuple[int, str]] = []
    for level, line in lines:
        if level:
            while headings and headings[-1][0] >= level:
                headings.pop()
            headings.append((level, line))
        elif line:
            for _, heading in headings:
                kept += ["", heading, ""]
            headings = []
            kept.append(line)
        elif kept and kept[-1]:
            kept.append("")
    return [line for i, line in enumerate(kept) if line or (i and kept[i - 1])]
