"""InternLM2's tokenizer from its SentencePiece file, as a fast tokenizer that transformers of today can load.

The checkpoint brings the tokenizer as code of its own, which is not run here. What it does: text between added tokens goes
to SentencePiece, chunk by chunk; added tokens take ids of pieces that were kept free, or follow behind the last piece;
`<s>` is put in front.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coz.checkpoint import WrongWeights, local_file
from coz.models.internvl_chat import CONTEXT, IMAGE_END, IMAGE_START, NATIVE_TEMPLATE, TURN_END, TURN_START

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece's types of pieces
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
SPACE = "▁"


@dataclass(frozen=True)
class Piece:
    """An entry of a SentencePiece vocabulary; its place in the list is its id."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class Normalization:
    """What SentencePiece does to a chunk before it looks for pieces."""

    dummy_prefix: bool = True
    squeeze_spaces: bool = False
    character_map: bytes = b""


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder in the original layout: `tokenizer.model` and the added tokens beside it.

    Raises:
        WeightsNotFound: there is no `tokenizer.model`.
        WrongWeights: it is no BPE model, or an added token could not get its id.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    file = local_file(folder / "tokenizer.model", what="InternVL's SentencePiece file, tokenizer.model")
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at run time
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise WrongWeights(f"{file} is no SentencePiece model ({error}); fetch it again") from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE or not model.trainer_spec.byte_fallback:
        raise WrongWeights(f"{file} is not a BPE model with bytes to fall back on, as InternLM2's is; use that one")
    spec = model.normalizer_spec
    normalization = Normalization(
        dummy_prefix=spec.add_dummy_prefix,
        squeeze_spaces=spec.remove_extra_whitespaces,
        character_map=spec.precompiled_charsmap,
    )
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in model.pieces]
    return build_tokenizer(pieces, read_added_tokens(folder), normalization=normalization)


def read_added_tokens(folder: Path) -> dict[int, str]:
    """Added tokens by id, out of `tokenizer_config.json` or `added_tokens.json`.

    Raises:
        WrongWeights: neither names the tokens that a chat about pictures needs.
    """
    added: dict[int, str] = {}
    plain, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    if plain.is_file():
        added |= {int(index): token for token, index in json.loads(plain.read_text(encoding="utf-8")).items()}
    if config.is_file():
        entries = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        added |= {int(index): entry["content"] for index, entry in entries.items()}
    missing = [token for token in (TURN_START, TURN_END, IMAGE_START, IMAGE_END, CONTEXT) if token not in added.values()]
    if missing:
        raise WrongWeights(f"{folder}: tokenizer_config.json and added_tokens.json lack {', '.join(missing)}; fetch them again")
    return added


def build_tokenizer(
    pieces: Sequence[Piece], added: Mapping[int, str], *, normalization: Normalization = Normalization()
) -> PreTrainedTokenizerFast:
    """A fast tokenizer that gives the ids of SentencePiece's BPE, chunk by chunk between added tokens.

    Raises:
        WrongWeights: an added token cannot have the id that it must have.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {added.get(index, piece.text): index for index, piece in enumerate(pieces)}
    whole = [piece.text for index, piece in enumerate(pieces) if piece.kind == USER_DEFINED and index not in added]
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(pieces, added),
            unk_token=pieces[0].text,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=bool(whole),
        )
    )
    steps: list[normalizers.Normalizer] = []
    if normalization.character_map:
        steps += [normalizers.Precompiled(normalization.character_map)]
    if normalization.squeeze_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if normalization.dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if whole:  # pieces that are never merged nor cut
        pattern = "|".join(_escaped(text) for text in sorted(whole, key=len, reverse=True))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(decoding + ([decoders.Strip(" ", 1, 0)] if normalization.dummy_prefix else []))

    for index, token in sorted(added.items()):
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if backend.token_to_id(token) != index:
            raise WrongWeights(f"the added token {token} would have id {backend.token_to_id(token)} instead of {index}")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        add_bos_token=True,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=NATIVE_TEMPLATE,
        extra_special_tokens={
            "start_image_token": IMAGE_START,
            "end_image_token": IMAGE_END,
            "context_image_token": CONTEXT,
            # The native processor wants a token for videos. InternVL2.5 has none, and a new one would lie beyond the
            # embeddings, so it gets one that no text holds.
            "video_token": _idle_token(added),
        },
    )


def _merges(pieces: Sequence[Piece], added: Mapping[int, str]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best-scored piece first, which is how SentencePiece merges."""
    ranks = {p.text: (-p.score, i) for i, p in enumerate(pieces) if p.kind == NORMAL and i not in added}
    pairs = [
        (rank, text[:cut], text[cut:])
        for text, rank in ranks.items()
        for cut in range(1, len(text))
        if text[:cut] in ranks and text[cut:] in ranks
    ]
    return [(left, right) for _, left, right in sorted(pairs)]


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if not character.isalnum() and character.isascii() else character for character in text)


def _idle_token(added: Mapping[int, str]) -> str:
    used = {UNK, BOS, EOS, TURN_START, TURN_END, IMAGE_START, IMAGE_END, CONTEXT}
    return next((token for _, token in sorted(added.items()) if token not in used), EOS)


def random_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of this kind without any file: bytes, printable characters, InternVL's special tokens. 360-odd ids."""
    pieces = [Piece(UNK, kind=UNKNOWN), Piece(BOS, kind=CONTROL), Piece(EOS, kind=CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", kind=BYTE) for byte in range(256)]
    pieces += [Piece(character, -1.0) for character in [SPACE, *map(chr, range(33, 127))]]
    special = [UNK, BOS, EOS]
    behind = ["<|plugin|>", TURN_END, TURN_START, IMAGE_START, IMAGE_END, CONTEXT]
    added = dict(enumerate(special)) | {len(pieces) + i: token for i, token in enumerate(behind)}
    return build_tokenizer(pieces, added)
