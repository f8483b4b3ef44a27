"""The tokenizer stage: train a SentencePiece model on documents, or take a given tokenizer.

The folder it writes holds `tokenizer.model` (SentencePiece) and Hugging Face files with the same ids, or the
files of a given Hugging Face tokenizer, and, written last, `tokenizer_info.json`: kind, special ids, sha256
of each file. A tokenizer's identity is the sha256 of `tokenizer.model`, or of `tokenizer.json` if there is no
SentencePiece model.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers

from data_prep.encoding import (
    HUGGINGFACE_NAME,
    INFO_NAME,
    Tokenizer,
    load_tokenizer,
    open_tokenizer,
)
from data_prep.files import read_json, remove_temporary_files, sha256_of, sole_writer, whole_file, write_json
from data_prep.parts import load_index
from data_prep.shards import TokenizerInfo
from data_prep.tokenizer_files import (
    CONTROL,
    MODEL_NAME,
    huggingface_config,
    huggingface_special,
    parse_model,
    resolve_special,
    sentencepiece_special,
    to_huggingface,
)
from data_prep.tokenizer_train import MODEL_TYPES, sample_documents, train_model

SCHEMA = 1
CONFIG_NAME = "tokenizer_config.json"
# what a Hugging Face tokenizer folder may hold besides tokenizer.json; model weights beside it stay where
# they are
_ALSO_COPIED = (
    CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_PROBE = 'The  cat\'s "hat", 1234.5 (a-b);\n\n= Heading =\n Ünïcödé, 日本語 😀 été\t--- ---- x_y aaaaaaa https://a.b/c?d=e'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m data_prep tokenizer`."""
    parser.add_argument(
        "documents", nargs="*", metavar="DOCUMENTS_DIR", help="folders made by the documents stage"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--vocab-size", type=int, default=8192, metavar="N", help="pieces in all (default 8192)"
    )
    parser.add_argument(
        "--model", choices=MODEL_TYPES, default="unigram", help="kind of model (default unigram)"
    )
    parser.add_argument(
        "--sample-megabytes",
        type=float,
        default=200,
        metavar="MB",
        help="train on at most this much text (default 200)",
    )
    parser.add_argument(
        "--from",
        dest="given",
        metavar="PATH",
        help="take this SentencePiece .model file or Hugging Face folder instead",
    )
    parser.add_argument(
        "--pad-token",
        metavar="TOKEN",
        help="with --from: pads sequences, for a tokenizer that has no padding token",
    )
    parser.epilog = (
        "example:\n  python -m data_prep tokenizer work/documents --out work/tokenizer --vocab-size 8192\n"
        "  python -m data_prep tokenizer --from pythia-160m --out work/tokenizer\n"
        "AutoTokenizer opens the folder. It puts <s> before a text and nothing after it, as documents begin\n"
        "in the shards; lm-eval leaves <s> out unless told add_bos_token=True."
    )


def run(args: argparse.Namespace) -> int:
    """Train or take the tokenizer; ValueError says what is wrong with the arguments or the input."""
    out = Path(args.out)
    settings = _settings(args)
    with sole_writer(out):
        if _is_finished(out, settings):
            print(f"tokenizer: {out} is complete", file=sys.stderr)
            return 0
        made = _made(args)
        _write(out, made, settings)
    print(f"tokenizer: {made.info.vocab_size} pieces, sha256 {made.info.sha256} in {out}", file=sys.stderr)
    return 0


def _made(args: argparse.Namespace) -> "_Made":
    if args.given:
        return _from_given(Path(args.given), args.pad_token)
    sample = sample_documents([Path(folder) for folder in args.documents], int(args.sample_megabytes * 1e6))
    return _from_sentencepiece(train_model(sample, args.vocab_size, args.model), MODEL_NAME, None)


@dataclass(frozen=True)
class _Made:
    kind: str
    info: TokenizerInfo
    files: dict[str, bytes]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the bytes written; also tells a finished folder from another one."""
    if bool(args.given) == bool(args.documents):
        raise ValueError("give either folders of documents to train on, or --from PATH")
    if args.given:
        path = Path(args.given)
        known = [file for file in (path / HUGGINGFACE_NAME, path / MODEL_NAME, path) if file.is_file()]
        if not known:
            raise ValueError(
                f"--from {path}: neither a SentencePiece model nor a folder with {HUGGINGFACE_NAME}"
            )
        return {"from": sha256_of(known[0]), "pad_token": args.pad_token}
    if args.pad_token:
        raise ValueError("--pad-token goes with --from; a trained tokenizer has <pad>")
    parts = [part["sha256"] for folder in args.documents for part in load_index(Path(folder))["parts"]]
    documents = hashlib.sha256("".join(sorted(parts)).encode()).hexdigest()
    chosen = {"vocab_size": args.vocab_size, "model": args.model, "sample_megabytes": args.sample_megabytes}
    return {"documents": documents, **chosen}


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    if not (out / INFO_NAME).is_file():
        return False
    found = read_json(out / INFO_NAME)["settings"]
    differing = [key for key in {**found, **settings} if found.get(key) != settings.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{out} holds another tokenizer: its {key} is {found.get(key)!r}, now {settings.get(key)!r}; "
            "give another folder to --out, or delete this one"
        )
    load_tokenizer(out)
    return True


def _from_given(path: Path, pad_token: str | None) -> _Made:
    if (path / HUGGINGFACE_NAME).is_file() and not _is_ours(path):
        return _from_huggingface(path, pad_token)
    model = path / MODEL_NAME if path.is_dir() else path
    if not model.is_file():
        raise ValueError(f"{path} has neither {HUGGINGFACE_NAME} nor {MODEL_NAME}")
    return _from_sentencepiece(model.read_bytes(), str(model), pad_token)


def _is_ours(path: Path) -> bool:
    return (path / INFO_NAME).is_file() and read_json(path / INFO_NAME)["kind"] == "sentencepiece"


def _from_sentencepiece(model: bytes, source: str, pad_token: str | None) -> _Made:
    proto = parse_model(model, source)
    names = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    fallback = proto.trainer_spec.byte_fallback
    spare = {piece.piece: n for n, piece in enumerate(proto.pieces) if piece.type == CONTROL}
    special = resolve_special(sentencepiece_special(proto), fallback, _pad_token_id(pad_token, names), spare)
    info = TokenizerInfo(hashlib.sha256(model).hexdigest(), len(proto.pieces), **asdict(special))
    twin = to_huggingface(proto)
    config = json.dumps(huggingface_config(proto, special), indent=1) + "\n"
    files = {
        MODEL_NAME: model,
        HUGGINGFACE_NAME: twin.to_str(pretty=True).encode(),
        CONFIG_NAME: config.encode(),
    }
    return _Made("sentencepiece", info, files)


def _from_huggingface(path: Path, pad_token: str | None) -> _Made:
    content = (path / HUGGINGFACE_NAME).read_bytes()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path / HUGGINGFACE_NAME} is not a tokenizer ({error})") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    spare = {token.content: number for number, token in added.items() if token.special}
    fallback = bool(json.loads(content)["model"].get("byte_fallback"))
    special = resolve_special(
        huggingface_special(path, vocabulary), fallback, _pad_token_id(pad_token, vocabulary), spare
    )
    info = TokenizerInfo(hashlib.sha256(content).hexdigest(), max(vocabulary.values()) + 1, **asdict(special))
    files = {name: (path / name).read_bytes() for name in _ALSO_COPIED if (path / name).is_file()}
    return _Made("huggingface", info, {HUGGINGFACE_NAME: content, **files})


def _pad_token_id(pad_token: str | None, vocabulary: dict[str, int]) -> int | None:
    if pad_token is not None and pad_token not in vocabulary:
        raise ValueError(f"--pad-token {pad_token!r} is not in the vocabulary of the given tokenizer")
    return None if pad_token is None else vocabulary[pad_token]


def _write(out: Path, made: _Made, settings: dict[str, Any]) -> None:
    remove_temporary_files(out)
    for name, content in made.files.items():
        with whole_file(out / name) as file:
            file.write(content)
    _check_twins(open_tokenizer(out, made.kind, made.info), out)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in made.files.items()}
    described = {"kind": made.kind, "tokenizer": asdict(made.info), "settings": settings, "files": hashes}
    write_json(out / INFO_NAME, {"schema": SCHEMA, **described})


def _check_twins(tokenizer: Tokenizer, out: Path) -> None:
    """A given SentencePiece model may do what its Hugging Face twin here cannot: then say so, now."""
    twin = open_tokenizer(out, "huggingface", tokenizer.info)
    for line in [_PROBE, *_PROBE.split("\n")]:
        if twin.encode(line).tolist() != tokenizer.encode(line).tolist():
            raise ValueError(
                f"the Hugging Face files of this SentencePiece model give other ids for {line!r}; "
                "give the model's Hugging Face folder (with tokenizer.json) to --from instead"
            )
