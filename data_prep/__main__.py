"""`python -m data_prep STAGE ...`: parses arguments and calls one function.

Every stage is a module with `add_arguments(parser) -> None` (arguments with units, an example in
`parser.epilog`) and `run(args) -> int` (the exit code). Only the stage asked for is imported, so that
`--help` is quick.
Exit codes: 0 done, 2 bad input or configuration, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType

# name: (module, what it does). `shards` is the folder's format, which readers import; `pack` is the stage.
STAGES = {
    "fetch": ("data_prep.fetch", "download the demo corpora, a Wikipedia dump or Project Gutenberg books"),
    "wikipedia": ("data_prep.wikipedia", "MediaWiki export dumps to documents"),
    "books": (
        "data_prep.books",
        "Project Gutenberg files, folders of text, JSON lines and Parquet to documents",
    ),
    "documents": ("data_prep.documents", "clean, drop duplicates, split into train and validation"),
    "tokenizer": ("data_prep.tokenizer", "train a SentencePiece tokenizer, or take a given one"),
    "shards": ("data_prep.pack", "documents to fixed-length token sequences in tar shards"),
    "pcfg": (
        "data_prep.pcfg",
        "random sentences of a context-free grammar to shards, with their parse spans",
    ),
    "verify": ("data_prep.verify", "check every part of a shards folder against its index"),
}


def build_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The command line; only the stage `wanted` has its own arguments (the others stay unimported)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="Raw text to training shards, one stage at a time."
    )
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, (path, summary) in STAGES.items():
        stage = stages.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == wanted:
            module = importlib.import_module(path)
            module.add_arguments(stage)
            stage.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage and return its exit code; errors a user can mend are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted = next((word for word in arguments if not word.startswith("-")), None)
    args = build_parser(wanted).parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, previous)


def _exit_on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
