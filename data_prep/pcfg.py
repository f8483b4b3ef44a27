"""The pcfg stage: random sentences of a grammar as shards, with their parse spans beside them.

A sample is `<s> sentence </s>` and padding. A shard is a function of the grammar, the seed, the split and its
number, so that processes make shards in any order; a run that is killed goes on after its last whole shard.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from data_prep.encoding import HUGGINGFACE_NAME, INFO_NAME
from data_prep.files import remove_temporary_files, whole_file, write_json
from data_prep.grammars import NAMES, ROOT_LEVEL, TERMINALS, Grammar, load_grammar
from data_prep.journal import Journal
from data_prep.parallel import default_workers, ordered_map
from data_prep.progress import progress
from data_prep.sentences import Sampler, Sentences
from data_prep.shards import Shard, ShardIndex, Split, TokenizerInfo, shard_name, write_shard
from data_prep.spans import write_spans
from data_prep.tar_records import RecordLayout

SPLITS = ("train", "validation")
SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
FIRST_WORD = len(SPECIALS) - TERMINALS[0]  # id of terminal 1, less 1
_BATCH = 4096  # sentences that grow together
_PARSED_BACK = 4  # sentences a shard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m data_prep pcfg`."""
    parser.add_argument("grammar", metavar="GRAMMAR", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--levels",
        type=int,
        default=ROOT_LEVEL,
        metavar="N",
        help=f"levels of rules: {ROOT_LEVEL} begins at the root, 3 makes sentences of about 20 words "
        f"(default {ROOT_LEVEL})",
    )
    parser.add_argument("--train", type=int, default=100_000, metavar="N", help="sentences (default 100000)")
    parser.add_argument("--validation", type=int, default=4096, metavar="N", help="sentences (default 4096)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0 or more (default 0)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens; sentences that do not fit are drawn again (default: all but one in 10000 fit)",
    )
    parser.add_argument(
        "--shard-megabytes",
        type=int,
        default=64,
        metavar="MB",
        help="size of a shard, 10^6 bytes (default 64)",
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), metavar="N", help="processes (default: all cores)"
    )
    parser.epilog = (
        "example:\n  python -m data_prep pcfg cfg3b --train 4096000 --out work/cfg3b\n"
        "Any number of --workers gives the same bytes. After an interruption the same command goes on."
    )


@dataclass(frozen=True)
class ShardTask:
    """All that decides one shard."""

    grammar: Grammar
    seed: int
    split: str
    number: int
    first_sample: int
    samples: int
    layout: RecordLayout
    info: TokenizerInfo
    out: Path


def run(args: argparse.Namespace) -> int:
    """Make the shards, or go on making them; ValueError says what is wrong with the arguments."""
    grammar = load_grammar(args.grammar, args.levels)
    _check(args, grammar)
    length = args.sequence_length or fitting_length(grammar)
    out, files, info = Path(args.out), *word_tokenizer()
    layout = RecordLayout(length, info.dtype)
    settings = _settings(args, grammar, length)
    out.mkdir(parents=True, exist_ok=True)
    with Journal(out, settings, SPLITS) as journal:
        if journal.is_finished:
            print(f"pcfg: {out} is complete", file=sys.stderr)
            return 0
        remove_temporary_files(out)
        _write_tokenizer(out / "tokenizer", files, info)
        per_shard = max(1, args.shard_megabytes * 10**6 // layout.record_bytes)
        sizes = {"train": args.train, "validation": args.validation}
        tasks = [
            ShardTask(grammar, args.seed, split, first // per_shard, first, min(per_shard, sizes[split] - first),
                      layout, info, out)
            for split in SPLITS
            for first in range(0, sizes[split], per_shard)
        ]  # fmt: skip
        _make(tasks, journal, args.workers)
        index = _index(args, grammar, layout, info, settings, journal)
        index.save(out)
    parts = [
        f"{name}: {split.samples} sentences, {split.tokens} tokens" for name, split in index.splits.items()
    ]
    print(f"pcfg: {'; '.join(parts)} in {out}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace, grammar: Grammar) -> None:
    smallest = {"--train": (args.train, 1), "--validation": (args.validation, 1), "--seed": (args.seed, 0)}
    smallest |= {"--shard-megabytes": (args.shard_megabytes, 1)}
    for option, (value, low) in smallest.items():
        if value < low:
            raise ValueError(f"{option} {value}: at least {low} expected")
    if args.sequence_length is not None and share_that_fits(grammar, args.sequence_length) < 0.5:
        raise ValueError(
            f"--sequence-length {args.sequence_length}: more than half of the sentences of {grammar.name} with "
            f"{grammar.levels} levels are longer; {fitting_length(grammar)} takes all but one in 10000"
        )


def share_that_fits(grammar: Grammar, length: int) -> float:
    """Share of the sentences that fit a sequence of `length` tokens with `<s>` and `</s>`; exact."""
    return float(grammar.length_chances[: max(0, length - 1)].sum())


def fitting_length(grammar: Grammar) -> int:
    """Smallest multiple of 8 that takes all but one sentence in 10000."""
    return next(n for n in range(8, grammar.longest + 10, 8) if share_that_fits(grammar, n) >= 0.9999)


def _settings(args: argparse.Namespace, grammar: Grammar, length: int) -> dict[str, Any]:
    keys = ("train", "validation", "seed", "shard_megabytes")
    names = {"grammar": grammar.name, "levels": grammar.levels, "sequence_length": length}
    return names | {key: getattr(args, key) for key in keys}


def _make(tasks: list[ShardTask], journal: Journal, workers: int) -> None:
    done = {split: len(journal.shards[split]) for split in SPLITS}
    todo = [task for task in tasks if task.number >= done[task.split]]
    total = sum(task.samples for task in tasks)
    with progress("pcfg", total, " sentences", total - sum(task.samples for task in todo)) as advance:
        for shard in ordered_map(make_shard, todo, min(workers, len(todo) or 1)):
            journal.add(shard)
            advance(shard.samples)


def make_shard(task: ShardTask) -> Shard:
    """Draw a shard's sentences, write their spans, then the tar. The first few are parsed back."""
    key = (task.seed, SPLITS.index(task.split), task.number)
    length = task.layout.sequence_length
    tokens_NL = np.full((task.samples, length), task.info.pad_id, task.layout.numpy_dtype)
    spans_NL = np.zeros((task.samples, length), "<u2")
    row = 0
    for sentences in _batches(Sampler(task.grammar, *key), task.samples, length - 2):
        if row == 0:
            _parse_back(task.grammar, sentences)
        rows = slice(row, row + len(sentences.lengths))
        lay_out(sentences, tokens_NL[rows], spans_NL[rows], task.info)
        row = rows.stop
    write_spans(task.out / shard_name(task.split, task.number), spans_NL)
    return write_shard(
        task.out,
        task.split,
        task.number,
        tokens_NL,
        first_sample=task.first_sample,
        pad_id=task.info.pad_id,
        layout=task.layout,
    )


def _batches(sampler: Sampler, number: int, longest: int) -> Iterator[Sentences]:
    while number > 0:
        fitting = sampler.draw(_BATCH).at_most(longest).first(number)
        number -= len(fitting.lengths)
        yield fitting


def lay_out(sentences: Sentences, tokens_NL: np.ndarray, spans_NL: np.ndarray, info: TokenizerInfo) -> None:
    """Fill in `<s> words </s>`, a sentence a row, and the span codes of the words."""
    places = np.arange(tokens_NL.shape[1])
    is_word = (places >= 1) & (places <= sentences.lengths[:, None])
    tokens_NL[:, 0] = info.bos_id
    tokens_NL[is_word] = sentences.words + FIRST_WORD
    tokens_NL[np.arange(len(tokens_NL)), sentences.lengths + 1] = info.eos_id
    spans_NL[is_word] = sentences.spans


def _parse_back(grammar: Grammar, sentences: Sentences) -> None:
    ends = np.cumsum(sentences.lengths)
    for end, length in zip(ends[:_PARSED_BACK], sentences.lengths, strict=False):
        if not grammar.derives(sentences.words[end - length : end].tolist()):
            raise AssertionError(
                f"{grammar.name}: the sampler made a sentence that its grammar does not derive"
            )


def word_tokenizer() -> tuple[dict[str, bytes], TokenizerInfo]:
    """(files, identity) of the Hugging Face tokenizer of the words 1, 2, 3, with the control tokens of text."""
    words = {name: number for number, name in enumerate((*SPECIALS, *map(str, TERMINALS)))}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(SPECIALS))
    names = {
        f"{key}_token": name for key, name in zip(("pad", "unk", "bos", "eos", "mask"), SPECIALS, strict=True)
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    content = made.to_str(pretty=True).encode()
    info = TokenizerInfo(hashlib.sha256(content).hexdigest(), len(words), *(words[name] for name in SPECIALS))
    return {HUGGINGFACE_NAME: content, "tokenizer_config.json": json.dumps(config, indent=1).encode()}, info


def _write_tokenizer(folder: Path, files: dict[str, bytes], info: TokenizerInfo) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        with whole_file(folder / name) as file:
            file.write(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    described = {"schema": 1, "kind": "huggingface", "tokenizer": asdict(info), "settings": {"from": "pcfg"}}
    write_json(folder / INFO_NAME, {**described, "files": hashes})


def _index(
    args: argparse.Namespace,
    grammar: Grammar,
    layout: RecordLayout,
    info: TokenizerInfo,
    settings: dict[str, Any],
    journal: Journal,
) -> ShardIndex:
    splits = {split: Split.of(shards) for split, shards in journal.shards.items()}
    kept = sum(split.samples for split in splits.values())
    return ShardIndex(
        sequence_length=layout.sequence_length,
        dtype=info.dtype,
        tokenizer=info,
        splits=splits,
        documents={"in": kept, "kept": kept, "dropped": {}},
        command=f"python -m data_prep pcfg {grammar.name} --levels {grammar.levels} --train {args.train} "
        f"--validation {args.validation} --seed {args.seed} --sequence-length {layout.sequence_length} "
        f"--shard-megabytes {args.shard_megabytes} --out {args.out}",
        settings=settings,
    )
