"""Prompts of any length for CLIP-style encoders: chunks of 75 tokens, each wrapped to 77.

Each chunk is encoded on its own and the results are put one after the other, as A1111, ComfyUI
and others do. The pooled vector is that of the first chunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdprep.seeding import digest

CONTENT_TOKENS = 75
CHUNK_TOKENS = 77
COMMA = ",</w>"
COMMA_BACKTRACK_TOKENS = 20

Split = Literal["hard", "comma"]
Convention = Literal["n77", "n75+2"]


@dataclass(frozen=True)
class Chunks:
    """One prompt as the encoder gets it.

    Args:
        ids: (n, 77) int64; BOS, content, EOS, padding.
        num_dropped: tokens beyond the last chunk that is allowed.
    """

    ids: Tensor
    num_dropped: int


@dataclass(frozen=True)
class ChunkText:
    """One chunk of a prompt as people read it.

    Args:
        tokens: what each content token stands for in the prompt, with the blanks before it; a
            letter of several tokens stands in the first of them.
        num_padding: tokens behind EOS.
        is_read: whether the encoders get it; what lies beyond the last chunk they do not.
    """

    tokens: list[str]
    num_padding: int
    is_read: bool = True


def lay_out(tokenizer: Any, prompt: str, max_chunks: int, split: Split = "hard") -> list[ChunkText]:
    """The same cuts as `tokenize`, in words; what is cut off is one more entry at the end."""
    can_place = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(
        prompt, add_special_tokens=False, verbose=False, return_offsets_mapping=can_place
    )
    ids = found["input_ids"]
    if can_place:
        ends = [0, *(end for _, end in found["offset_mapping"])]
        words = [prompt[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    else:
        words = [w.replace("</w>", " ") for w in tokenizer.convert_ids_to_tokens(ids)]
    comma = tokenizer.convert_tokens_to_ids(COMMA) if split == "comma" else None
    chunks, start = [], 0
    for content in split_tokens(ids, comma)[:max_chunks]:
        end = start + len(content)
        chunks.append(ChunkText(words[start:end], CONTENT_TOKENS - len(content)))
        start = end
    return [*chunks, *([ChunkText(words[start:], 0, is_read=False)] if words[start:] else [])]


def tokenize(
    tokenizer: Any, prompt: str, max_chunks: int, split: Split = "hard", marks: Any = None
) -> Chunks:
    """Cut a prompt into wrapped chunks.

    Args:
        tokenizer: CLIP's; says what the content is.
        prompt: rendered text; the empty string gives one chunk of BOS and EOS.
        max_chunks: chunks kept; what is cut off is counted.
        split: `hard` cuts after 75 tokens; `comma` goes back to the last comma within 20 tokens.
        marks: the tokenizer whose BOS, EOS and padding wrap it (some pad with 0); None: the same.
    """
    marks = tokenizer if marks is None else marks
    # Without its length warning: prompts longer than 77 tokens are what this function is for.
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    comma = tokenizer.convert_tokens_to_ids(COMMA) if split == "comma" else None
    contents = split_tokens(ids, comma)
    kept = contents[:max_chunks]
    wrapped = torch.full((len(kept), CHUNK_TOKENS), marks.pad_token_id, dtype=torch.int64)
    for row, content in enumerate(kept):
        tokens = [marks.bos_token_id, *content, marks.eos_token_id]
        wrapped[row, : len(tokens)] = torch.tensor(tokens)
    return Chunks(wrapped, sum(len(content) for content in contents[max_chunks:]))


def split_tokens(ids: Sequence[int], comma: int | None = None) -> list[list[int]]:
    """Cut token ids into pieces of at most 75, one piece at least.

    Args:
        ids: content tokens, without BOS and EOS.
        comma: if given, a cut that would part a phrase goes back behind the last comma, unless
            that is more than 20 tokens away.
    """
    pieces, start = [], 0
    while len(ids) - start > CONTENT_TOKENS:
        end = start + CONTENT_TOKENS
        if comma is not None and ids[end] != comma:
            near = range(end - 1, end - 1 - COMMA_BACKTRACK_TOKENS, -1)
            end = next((position + 1 for position in near if ids[position] == comma), end)
        pieces.append(list(ids[start:end]))
        start = end
    return [*pieces, list(ids[start:])]


def encode_chunks(encoder: nn.Module, ids: Tensor, layer: int, *, final_norm: bool) -> Any:
    """Run a CLIP text encoder, with gradients only if it trains.

    Args:
        encoder: CLIPTextModel or CLIPTextModelWithProjection.
        ids: (N, 77) int64, on any device.
        layer: hidden state to read, counted from the end: -1 is the last layer's output.
        final_norm: whether the encoder's last LayerNorm is applied to it.

    Returns:
        hidden (N, 77, D), and the projected pooled vector (N, P) or None.
    """
    trains = any(parameter.requires_grad for parameter in encoder.parameters())
    device = next(encoder.parameters()).device
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        output = encoder(ids.to(device, non_blocking=True), output_hidden_states=True)
        if final_norm and layer == -1:  # the encoder has normalised that one itself
            return output.last_hidden_state, getattr(output, "text_embeds", None)
        hidden = output.hidden_states[layer]
        if final_norm:
            norm = last_norm(encoder)
            assert norm is not None, "every CLIP text encoder has one"
            hidden = norm(hidden)
    return hidden, getattr(output, "text_embeds", None)


def last_norm(encoder: nn.Module) -> nn.Module | None:
    """A text encoder's last LayerNorm, wherever the installed transformers keeps it."""
    ends = ((name.rpartition(".")[2], module) for name, module in encoder.named_modules())
    return next((module for end, module in ends if end == "final_layer_norm"), None)


def join_chunks(hidden: Tensor, convention: Convention = "n77") -> Tensor:
    """Put the encoded chunks of one prompt one after the other.

    Args:
        hidden: (n, 77, D).
        convention: `n77` keeps every chunk whole; `n75+2` keeps only the outer BOS and EOS, as
            sd-scripts does. They are equal for one chunk.

    Returns:
        (n·77, D) or (n·75+2, D).
    """
    if convention == "n77":
        return hidden.flatten(0, 1)
    inner = hidden[:, 1:-1].flatten(0, 1)
    return torch.cat([hidden[0, :1], inner, hidden[-1, -1:]])


def empty_like(states: Tensor, empty: Tensor, convention: Convention) -> Tensor:
    """As many chunks of the encoded empty prompt (1, 77, D) as `states` (B, L, D) are made of."""
    length = states.shape[1]
    count = length // CHUNK_TOKENS if convention == "n77" else (length - 2) // CONTENT_TOKENS
    joined = join_chunks(empty.expand(count, -1, -1), convention)
    return joined.repeat(len(states), 1, 1)


@dataclass(frozen=True)
class TextConditioning:
    """Encoded prompts of a batch; prompts of different lengths are never padded to each other.

    Args:
        groups: for each length L: slots in the batch, and their hidden states (b, L, D).
        pooled: (B, P), or None where the architecture has none.
    """

    groups: list[tuple[list[int], Tensor]]
    pooled: Tensor | None = None


def without_text(conditioning: TextConditioning, is_taken: Sequence[bool]) -> TextConditioning:
    """The same with zeros in place of all of the text of some samples.

    Args:
        conditioning: of B samples.
        is_taken: (B) whose text goes.
    """
    if not any(is_taken):
        return conditioning

    def kept(values: Tensor, slots: Sequence[int]) -> Tensor:
        factors = torch.tensor([float(not is_taken[slot]) for slot in slots], dtype=values.dtype)
        shape = (-1, *[1] * (values.dim() - 1))
        return values * factors.view(shape).to(values.device, non_blocking=True)

    groups = [(slots, kept(states, slots)) for slots, states in conditioning.groups]
    pooled = conditioning.pooled
    if pooled is not None:
        pooled = kept(pooled, range(len(pooled)))
    return TextConditioning(groups, pooled)


def group_by_length(hidden: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Stack hidden states (L, D) of equal length; in the order in which lengths first occur."""
    slots: dict[int, list[int]] = {}
    for slot, states in enumerate(hidden):
        slots.setdefault(len(states), []).append(slot)
    return [(group, torch.stack([hidden[slot] for slot in group])) for group in slots.values()]


def split_conditioning(conditioning: TextConditioning) -> list[dict[str, Tensor]]:
    """Each prompt by itself: `hidden` (L, D), and `pooled` (P) where there is one."""
    hidden: dict[int, Tensor] = {}
    for slots, states in conditioning.groups:
        hidden |= dict(zip(slots, states, strict=True))
    entries = [{"hidden": hidden[slot]} for slot in range(len(hidden))]
    if conditioning.pooled is not None:
        for entry, vector in zip(entries, conditioning.pooled, strict=True):
            entry["pooled"] = vector
    return entries


def join_conditioning(entries: Sequence[Mapping[str, Tensor]]) -> TextConditioning:
    """What `split_conditioning` was given."""
    hidden = group_by_length([entry["hidden"] for entry in entries])
    has_pooled = "pooled" in entries[0]
    pooled = torch.stack([entry["pooled"] for entry in entries]) if has_pooled else None
    return TextConditioning(hidden, pooled)


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of vocabulary, merges and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        # What the last call asked for, not what the tokenizer is.
        content = {k: v for k, v in content.items() if k not in ("truncation", "padding")}
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return digest("tokenizer", json.dumps(content, sort_keys=True), *special)
