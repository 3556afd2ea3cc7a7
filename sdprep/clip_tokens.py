"""CLIP token counts, exact and fast, from the vocabulary that ships with the project.

CLIP's pre-tokeniser never crosses white space and, in ASCII text, cuts at places that a plain
regular expression finds. So counts add up over such pieces, and each piece is tokenised once.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = Path(__file__).parent / "data" / "clip_tokenizer"
TOKENS_PER_CHUNK = 75
"""Content tokens in one window of a CLIP text encoder: 77 less start and end."""

_MARKS = ("<|startoftext|>", "<|endoftext|>")
_MAX_CACHED_PIECES = 500_000  # about 60 MB; misspellings of millions of captions must not pile up

# The pieces of CLIP's pre-tokeniser, for lower-case ASCII. White space is spelled out because
# Python's \s also takes the separators U+001C to U+001F, which CLIP keeps.
_ASCII_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ \t\n\v\f\ra-z0-9]+")

_QUOTES = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f", '"'),
    }
)
_WIDE = re.compile("[\ufb00-\ufb06\uff01-\uffee]+")  # ligatures, full- and half-width forms
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\ufeff\ufffe\uffff]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def clean_text(text: str) -> str:
    """Text as every tokeniser of ours sees it.

    open_clip runs ftfy first and transformers does not, so curly quotes, HTML entities, ligatures
    and full-width forms would become different tokens in different programs. They are made plain
    here, once, before anything counts or encodes. CLIP's own marks (`<|endoftext|>`) are taken out:
    in a caption they would end the prompt early.
    """
    if text.isascii() and text.isprintable() and "&" not in text and "<|" not in text:
        return " ".join(text.split())
    text = html.unescape(html.unescape(text))
    text = _LONE_SURROGATE.sub("\ufffd", _CONTROL.sub("", text)).translate(_QUOTES)
    text = _WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFC", text)
    # A space takes the mark's place, so that what stood around it cannot form another one.
    text = re.sub(r"<\|(startoftext|endoftext)\|>", " ", text, flags=re.IGNORECASE)
    return " ".join(text.split())


def count_tokens(text: str) -> int:
    """How many content tokens CLIP makes of `text`, without start and end.

    Equal to `len(CLIPTokenizer(text, add_special_tokens=False).input_ids)` for any text.
    """
    if text.isascii() and "<|" not in text:
        return sum(map(_COUNTS.__getitem__, _ASCII_PIECES.findall(text.lower())))
    return sum(_word_tokens(word) for word in text.split(" "))


def token_ids(text: str) -> list[int]:
    """The content token ids of `text`, without start and end."""
    ids: list[int] = _tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def num_chunks(tokens: int, max_chunks: int = 3) -> int:
    """Windows of 75 tokens that a prompt takes: at least one, at most `max_chunks`."""
    return min(max(-(-tokens // TOKENS_PER_CHUNK), 1), max_chunks)


def _word_tokens(word: str) -> int:
    """Tokens of one word between spaces; marks are looked for here, for they hold no space."""
    if word.isascii() and "<|" not in word:
        return sum(map(_COUNTS.__getitem__, _ASCII_PIECES.findall(word.lower())))
    return _COUNTS[word]


class _Counts(dict[str, int]):
    """Tokens by piece; a missing piece is tokenised and remembered."""

    def __missing__(self, piece: str) -> int:
        if len(self) >= _MAX_CACHED_PIECES:
            self.clear()
        count = len(_tokenizer().encode(piece, add_special_tokens=False).ids)
        self[piece] = count
        return count


_COUNTS = _Counts()


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    """CLIP's tokeniser out of the shipped files, built as transformers builds it."""
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    files = str(VOCABULARY / "vocab.json"), str(VOCABULARY / "merges.txt")
    model = BPE.from_file(*files, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    marks = "|".join(mark.replace("|", r"\|") for mark in _MARKS)
    pieces = rf"{marks}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
    split = pre_tokenizers.Split(Regex(pieces), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in _MARKS])
    return tokenizer
