"""A SentencePiece model as Hugging Face files with the same ids; the special tokens of either kind."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPACE = "\u2581"
MODEL_NAME = "tokenizer.model"
# numbers of SentencePiece's protocol buffers
UNIGRAM, _BPE = 1, 2
NORMAL, _UNKNOWN, CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_NAMED = (_UNKNOWN, CONTROL, _USER_DEFINED)
_NAMES = {
    "pad": ("<pad>", "[PAD]", "<|padding|>", "<|pad|>"),
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<s>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "[SEP]", "<|endoftext|>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
}


def parse_model(model: bytes, source: str = MODEL_NAME) -> Any:
    """The ModelProto of a serialised SentencePiece model; ValueError names `source` when it is not one."""
    protocol: Any = sentencepiece_model_pb2  # its classes are made at import, unseen by type checkers
    proto = protocol.ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError has moved between modules
        raise ValueError(f"{source} is not a SentencePiece model ({error})") from None
    if not proto.pieces:
        raise ValueError(f"{source} is not a SentencePiece model: it has no pieces")
    return proto


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens; None where there is none (pad and eos are always there)."""

    pad_id: int
    unk_id: int | None
    bos_id: int
    eos_id: int
    mask_id: int | None


def resolve_special(
    found: dict[str, int | None], byte_fallback: bool, pad_token_id: int | None, spare: dict[str, int]
) -> SpecialTokens:
    """Fill in what a given tokenizer does not declare, or say what is missing (ValueError).

    No bos: eos marks both ends. No pad: unk where byte fallback means that text never gives it, else
    `pad_token_id`. `spare`: special tokens by name that may be proposed for padding.
    """
    eos_id = found["eos"]
    if eos_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token; documents could not be told apart")
    pad_id = pad_token_id if pad_token_id is not None else found["pad"]
    if pad_id is None and byte_fallback:
        pad_id = found["unk"]
    if pad_id is None:
        raise ValueError(f"the tokenizer has no padding token; {_padding_advice(found, spare)}")
    if pad_id == eos_id:
        raise ValueError(
            f"the padding token (id {pad_id}) is also the end-of-sequence token: padding would pass for the end of "
            f"documents; {_padding_advice(found, spare)}"
        )
    bos_id = eos_id if found["bos"] is None else found["bos"]
    return SpecialTokens(pad_id, found["unk"], bos_id, eos_id, found["mask"])


def _padding_advice(found: dict[str, int | None], spare: dict[str, int]) -> str:
    names = [name for name, number in spare.items() if number not in found.values()]
    if names:
        return f"name another one with --pad-token, such as {' or '.join(map(repr, names[:3]))}"
    return (
        "name a token that your text never holds with --pad-token, or add one to the tokenizer "
        "(`add_special_tokens({'pad_token': '<|pad|>'})`, then `save_pretrained`) and give that folder to --from"
    )


def sentencepiece_special(proto: Any) -> dict[str, int | None]:
    """Special ids that a SentencePiece model declares, or that its control symbols' names give away."""
    spec = proto.trainer_spec
    names = {piece.piece: number for number, piece in enumerate(proto.pieces) if piece.type in _NAMED}
    declared = {"pad": spec.pad_id, "unk": spec.unk_id, "bos": spec.bos_id, "eos": spec.eos_id, "mask": -1}
    return {key: value if value >= 0 else _by_name(key, names) for key, value in declared.items()}


def huggingface_special(folder: Path, vocabulary: dict[str, int]) -> dict[str, int | None]:
    """Special ids that a Hugging Face folder declares; a BERT's [CLS] and [SEP] count as bos and eos."""
    declared: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            declared.update(json.loads((folder / name).read_text(encoding="utf-8")))
    instead = {"bos": "cls_token", "eos": "sep_token"}
    found = {}
    for key in _NAMES:
        token = declared.get(f"{key}_token") or declared.get(instead.get(key, ""))
        content = token.get("content") if isinstance(token, dict) else token
        found[key] = vocabulary.get(content) if content else _by_name(key, vocabulary)
    return found


def _by_name(key: str, names: dict[str, int]) -> int | None:
    return next((names[name] for name in _NAMES[key] if name in names), None)


def to_huggingface(proto: Any) -> Tokenizer:
    """The `tokenizers` twin of a SentencePiece unigram or BPE model; ValueError for other kinds."""
    kind = proto.trainer_spec.model_type
    if kind not in (UNIGRAM, _BPE):
        raise ValueError(f"a SentencePiece model of kind {kind}; only unigram (1) and BPE (2) are known here")
    tokenizer = Tokenizer(_unigram(proto) if kind == UNIGRAM else _bpe(proto))
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    isolated = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    words = pre_tokenizers.Split(SPACE, "merged_with_next")
    if isolated:
        choice = Regex("|".join(map(_escaped, sorted(isolated, key=len, reverse=True))))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(choice, "isolated"), words])
    else:
        tokenizer.pre_tokenizer = words
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(_added_tokens(proto))
    _prepend_bos(tokenizer, sentencepiece_special(proto)["bos"])
    return tokenizer


def _escaped(text: str) -> str:
    return "".join(f"\\x{{{ord(char):x}}}" for char in text)


def _unigram(proto: Any) -> models.Unigram:
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(
        vocabulary, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback
    )


def _bpe(proto: Any) -> models.BPE:
    """Merges in the order in which SentencePiece prefers them: by the score of what they make."""
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {piece.piece: number for number, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    merges: list[tuple[str, str]] = []
    for whole in sorted(normal, key=lambda piece: -proto.pieces[normal[piece]].score):
        halves = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        known = [pair for pair in halves if pair[0] in normal and pair[1] in normal]
        merges += sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    fallback = proto.trainer_spec.byte_fallback
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _added_tokens(proto: Any) -> list[AddedToken]:
    """Control symbols; "<mask>" takes a space before it along, as the piece it replaces has one."""
    pieces = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, CONTROL)]
    return [AddedToken(piece, normalized=False, special=True, lstrip=piece == "<mask>") for piece in pieces]


def _prepend_bos(tokenizer: Tokenizer, bos_id: int | None) -> None:
    """`tokenizer(text)` begins with bos, as packed documents do; it ends open, so that a prompt can go on."""
    if bos_id is None:
        return
    bos = tokenizer.id_to_token(bos_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def huggingface_config(proto: Any, special: SpecialTokens) -> dict[str, Any]:
    """`tokenizer_config.json` beside the `tokenizer.json` of `to_huggingface`."""
    tokens: dict[str, Any] = {}
    for key in _NAMES:
        number = getattr(special, f"{key}_id")
        if number is not None:
            tokens[f"{key}_token"] = proto.pieces[number].piece
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}


def is_separable(proto: Any) -> bool:
    """Whether every word (with the space before it) and every newline can be encoded on its own.

    True for the models trained here. Then words can be remembered, and texts cut anywhere before a space.
    """
    spec = proto.normalizer_spec
    changes = spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces
    if changes or proto.trainer_spec.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        return False
    newline = any(piece.piece == "\n" and piece.type == _USER_DEFINED for piece in proto.pieces)
    return newline and not any(SPACE in piece.piece[1:] for piece in proto.pieces if piece.type != _BYTE)
