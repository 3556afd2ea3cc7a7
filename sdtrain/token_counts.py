"""How many chunks a prompt takes, by the fast exact count where the tokenizer is CLIP's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from sdprep.clip_tokens import TOKENS_PER_CHUNK, VOCABULARY, count_tokens, num_chunks
from sdtrain.text import COMMA_BACKTRACK_TOKENS, Split, tokenize

_SAME = ("added_tokens", "normalizer", "pre_tokenizer")


def chunk_counter(tokenizer: Any, max_chunks: int, split: Split) -> Callable[[str], int]:
    """The function from a prompt to its number of chunks, at most `max_chunks`.

    Counting takes some microseconds, tokenising some hundred, and a run counts 65,536 prompts
    before its first step. Cuts at commas depend on where they are, so those are tokenised.
    """
    if split == "hard" and is_clip(tokenizer):
        return lambda prompt: num_chunks(count_tokens(prompt), max_chunks)
    return lambda prompt: len(tokenize(tokenizer, prompt, max_chunks, split).ids)


def cut_counter(tokenizer: Any, max_chunks: int, split: Split) -> Callable[[str], int]:
    """The function from a prompt to its number of tokens beyond the last chunk that is kept."""
    if not is_clip(tokenizer):
        return lambda prompt: tokenize(tokenizer, prompt, max_chunks, split).num_dropped
    most = max_chunks * TOKENS_PER_CHUNK
    if split == "hard":
        return lambda prompt: max(0, count_tokens(prompt) - most)
    surely = most - (max_chunks - 1) * (COMMA_BACKTRACK_TOKENS - 1)  # however the commas lie

    def cut(prompt: str) -> int:
        if count_tokens(prompt) <= surely:
            return 0
        return tokenize(tokenizer, prompt, max_chunks, split).num_dropped

    return cut


def is_clip(tokenizer: Any) -> bool:
    """Whether a tokenizer cuts every text as the vocabulary that ships with the project."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    ours, theirs = _shipped(), json.loads(backend.to_str())
    is_same = all(theirs.get(key) == ours[key] for key in _SAME)
    model = theirs.get("model", {})
    keys = ("type", "vocab", "merges", "end_of_word_suffix", "unk_token")
    return is_same and all(model.get(key) == ours["model"][key] for key in keys)


def _shipped() -> dict[str, Any]:
    from transformers import CLIPTokenizer

    made: Any = CLIPTokenizer.from_pretrained(str(VOCABULARY))
    found = json.loads(made.backend_tokenizer.to_str())
    assert isinstance(found, dict)
    return found
