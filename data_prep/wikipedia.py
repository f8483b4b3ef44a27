"""Wikipedia dumps to documents: articles only, as plain text, every page accounted for."""

import argparse
import re
from functools import partial
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

from mwparserfromhell.parser import ParserError

from data_prep.dumps import Block, Site, block_pages, blocks
from data_prep.files import sole_writer
from data_prep.parallel import default_workers
from data_prep.parts import Batch, Document, Stage, convert, describe_inputs, encode_document, summary
from data_prep.wikitext import TooComplex, is_disambiguation, plain_text

RULES = 2  # raise when the same dump would give other documents: folders of older rules are refused
EXAMPLE = """example:
  python -m data_prep wikipedia enwiki-20261101-pages-articles-multistream.xml.bz2 --out work/wikipedia

Reads .xml, .xml.bz2 (one stream or many; many are read in parallel) and .xml.gz, of any size, as a stream.
Kept: pages of the article namespace that are neither redirects nor disambiguation pages.
Interrupted, the same command goes on; the documents are the same bytes for any number of workers.
"""

_NAMESPACE = re.compile(rb"<ns>\s*(-?\d+)\s*</ns>")
# MediaWiki's magic word in the languages of the larger Wikipedias; newer exports say <redirect> besides
REDIRECT_WORDS = (
    "REDIRECT", "WEITERLEITUNG", "REDIRECTION", "REDIRECCIÓN", "REDIRECCIÓ", "REDIRECIONAMENTO", "RINVIA",
    "RINVIO", "RIMANDO", "DOORVERWIJZING", "PATRZ", "PRZEKIERUJ", "TAM", "OMDIRIGERING", "OHJAUS",
    "UUDELLEENOHJAUS", "ПЕРЕНАПРАВЛЕНИЕ", "ПЕРЕНАПР", "ПЕРЕНАПРАВЛЕННЯ", "ПЕРЕСПРЯМУВАННЯ", "ПРЕНАСОЧВАНЕ",
    "ВИЖ", "ПРЕУСМЕРИ", "PREUSMJERI", "PREUSMERITEV", "PRESMERUJ", "PŘESMĚRUJ", "ÁTIRÁNYÍTÁS",
    "REDIRECTEAZA", "SUUNA", "PERADRESAVIMAS", "BIRZUZENDU", "YÖNLENDİRME", "YÖNLENDİR", "ΑΝΑΚΑΤΕΥΘΥΝΣΗ",
    "ALIH", "LENCONG", "ĐỔI", "הפניה", "تحويل", "تغییرمسیر", "تغییر_مسیر", "転送", "リダイレクト", "重定向",
    "넘겨주기", "เปลี่ยนทาง", "अनुप्रेषित", "পুনর্নির্দেশ",
)  # fmt: skip
_OLD_REDIRECT = re.compile(rf"\s*#\s*(?:{'|'.join(REDIRECT_WORDS)})\s*:?\s*\[\[", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m data_prep wikipedia`."""
    parser.epilog = EXAMPLE
    parser.add_argument(
        "dumps", nargs="+", type=Path, metavar="DUMP", help="MediaWiki export, in reading order"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the documents")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), help="processes (default: cores, %(default)s)"
    )
    parser.add_argument(
        "--disambiguation-template",
        action="append",
        default=[],
        metavar="NAME",
        help="one more template that marks a disambiguation page in your language; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Convert the dumps; returns 0. Raises ValueError or OSError for dumps that cannot be read."""
    stage = Stage(
        name="wikipedia",
        out=args.out,
        inputs=describe_inputs(args.dumps),
        settings={"rules": RULES, "disambiguation_templates": sorted(args.disambiguation_template)},
        command=" ".join(["python -m data_prep wikipedia", *(path.name for path in args.dumps)]),
    )
    total_bytes = sum(path.stat().st_size for path in args.dumps)
    extract = partial(extract_block, templates=tuple(args.disambiguation_template))
    tasks = chain.from_iterable(map(blocks, args.dumps))
    with sole_writer(args.out):
        print(summary(convert(stage, tasks, extract, args.workers, total_bytes)))
    return 0


def extract_block(block: Block, templates: tuple[str, ...] = ()) -> Batch:
    """The articles of a block as documents, and the reasons of the other pages."""
    batch = Batch(input_bytes=block.input_bytes)
    dropped_namespaces = _dropped_namespaces(block.site)
    lines = []
    for page in block_pages(block):
        batch.seen += 1
        found = extract_page(page, block.site, dropped_namespaces, templates)
        if isinstance(found, str):
            batch.dropped[found] += 1
        else:
            lines.append(encode_document(found))
    batch.kept["wikipedia"] = b"".join(lines), len(lines)
    return batch


def extract_page(
    page: bytes, site: Site, dropped_namespaces: frozenset[str], templates: tuple[str, ...] = ()
) -> Document | str:
    """One page's document, or the reason it is dropped for. The cheapest tests come first."""
    head = page.partition(b"<revision>")[0]
    namespace = _NAMESPACE.search(head)
    if namespace and int(namespace[1]) != 0:
        return "not_article"
    if b"<redirect" in head:
        return "redirect"
    try:
        root = ElementTree.fromstring(page)
    except ElementTree.ParseError:
        return "broken_xml"
    title = root.findtext("title") or ""
    if not namespace and _has_namespace(title, site):
        return "not_article"
    revision = next(reversed(root.findall("revision")), root)
    if (revision.findtext("model") or "wikitext") != "wikitext":
        return "not_wikitext"
    markup = revision.findtext("text") or ""
    return _drop_reason(title, markup, templates) or _article(root, site, title, markup, dropped_namespaces)


def _drop_reason(title: str, markup: str, templates: tuple[str, ...]) -> str | None:
    if not markup.strip():
        return "no_text"
    if _OLD_REDIRECT.match(markup):
        return "redirect"
    if is_disambiguation(title, markup, templates):
        return "disambiguation"
    return None


def _article(
    root: ElementTree.Element, site: Site, title: str, markup: str, dropped_namespaces: frozenset[str]
) -> Document | str:
    try:
        text = plain_text(markup, dropped_namespaces)
    except TooComplex:
        return "too_complex"
    except (ParserError, RecursionError):
        return "parser_failed"
    if not text:
        return "no_text"
    return {"id": f"{site.name}:{root.findtext('id')}", "source": site.name, "title": title, "text": text}


def _has_namespace(title: str, site: Site) -> bool:
    """For schemas before 0.6, which give no <ns>."""
    prefix, colon, _ = title.partition(":")
    return bool(colon) and prefix in site.namespaces.values()


def _dropped_namespaces(site: Site) -> frozenset[str]:
    local = (site.namespaces.get(number, "") for number in (-2, 6, 14))
    return frozenset({"file", "image", "media", "category", *(name.lower() for name in local if name)})
