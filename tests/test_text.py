"""Cutting prompts into chunks; encoding them is tested with the families."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdtrain.text import join_chunks, split_tokens, tokenize
from sdtrain.token_counts import chunk_counter, cut_counter, is_clip
from tests.tiny import load_tiny

BOS, EOS, COMMA = 49406, 49407, 267
CAT = [320, 1125, 539, 320, 2368]


@pytest.fixture(scope="session")
def tokenizers(tiny_model: Callable[[str], Path]) -> dict[str, Any]:
    return load_tiny(tiny_model("sdxl")).folder.tokenizers


@pytest.mark.parametrize(("name", "pad"), [("tokenizer", EOS), ("tokenizer_2", 0)])
def test_a_short_prompt_is_wrapped_and_padded(
    tokenizers: dict[str, Any], name: str, pad: int
) -> None:
    chunks = tokenize(tokenizers[name], "a photo of a cat", 3)
    assert chunks.ids.tolist() == [[BOS, *CAT, EOS, *[pad] * 70]]
    assert chunks.num_dropped == 0
    assert tokenize(tokenizers[name], "", 3).ids.tolist() == [[BOS, EOS, *[pad] * 75]]


@pytest.mark.parametrize(
    ("num_tokens", "num_chunks", "num_dropped"),
    [(0, 1, 0), (1, 1, 0), (75, 1, 0), (76, 2, 0), (150, 2, 0), (225, 3, 0), (226, 3, 1)],
)
def test_chunks_at_their_limits(
    tokenizers: dict[str, Any], num_tokens: int, num_chunks: int, num_dropped: int
) -> None:
    chunks = tokenize(tokenizers["tokenizer_2"], " ".join(["cat"] * num_tokens), 3)
    assert chunks.ids.shape == (num_chunks, 77)
    assert chunks.num_dropped == num_dropped
    for row in chunks.ids.tolist():
        assert row[0] == BOS
        end = row.index(EOS)
        assert set(row[1:end]) <= {2368}
        assert set(row[end + 1 :]) <= {0}
    kept = int((chunks.ids == 2368).sum())
    assert kept == num_tokens - num_dropped


def test_exclamation_marks_are_words_for_every_encoder(tiny_model: Callable[[str], Path]) -> None:
    """The second tokenizer of SDXL pads with "!"; a prompt's own are read by both encoders."""
    family = load_tiny(tiny_model("sdxl"))
    (first,), (second,) = (family._tokenize(name, "wow!!! a!") for name in family.encoders)
    assert first[:6].tolist() == second[:6].tolist() == [BOS, 2781, 995, 320, 256, EOS]
    assert (first[6:] == EOS).all()
    assert (second[6:] == 0).all()
    for prompt in ("cat " * 74 + "!!!", "!!!! " * 100):  # the encoders would differ in their chunks
        with torch.no_grad():
            states = family.encode_prompts([prompt]).groups[0][1]
        assert states.shape[1] == 77 * family.num_chunks(prompt)


@given(st.lists(st.sampled_from([COMMA, 1, 2, 3]), max_size=400))
def test_splitting_keeps_every_token_in_order(ids: list[int]) -> None:
    for comma in (None, COMMA):
        pieces = split_tokens(ids, comma)
        assert [token for piece in pieces for token in piece] == ids
        assert all(len(piece) <= 75 for piece in pieces)
        assert len(pieces) >= 1
        assert all(pieces) or ids == []
    assert len(split_tokens(ids)) == max(1, -(-len(ids) // 75))


def test_comma_split_goes_back_at_most_twenty_tokens() -> None:
    near = [1] * 60 + [COMMA] + [2] * 40
    assert [len(piece) for piece in split_tokens(near, COMMA)] == [61, 40]
    limit = [1] * 55 + [COMMA] + [2] * 40
    assert [len(piece) for piece in split_tokens(limit, COMMA)] == [56, 40]
    far = [1] * 54 + [COMMA] + [2] * 41
    assert [len(piece) for piece in split_tokens(far, COMMA)] == [75, 21]
    just_before = [1] * 60 + [COMMA] + [2] * 14 + [COMMA] + [3] * 5
    assert [len(piece) for piece in split_tokens(just_before, COMMA)] == [75, 6]


@pytest.mark.parametrize(("count", "lengths"), [(1, (77, 77)), (2, (154, 152)), (3, (231, 227))])
def test_conventions_differ_only_in_the_inner_markers(count: int, lengths: tuple[int, int]) -> None:
    hidden = torch.arange(count * 77.0).view(count, 77, 1)
    whole, outer = join_chunks(hidden, "n77"), join_chunks(hidden, "n75+2")
    assert (len(whole), len(outer)) == lengths
    assert whole.flatten().tolist() == list(range(count * 77))
    inner = {77 * k + offset for k in range(count) for offset in (0, 76)} - {0, count * 77 - 1}
    assert set(whole.flatten().tolist()) - set(outer.flatten().tolist()) == inner


def test_chunks_are_encoded_apart_and_pooled_from_the_first(
    tiny_model: Callable[[str], Path],
) -> None:
    family = load_tiny(tiny_model("sdxl"), max_chunks=2)
    first, second = " ".join(["cat"] * 75), " ".join(["dog"] * 20)
    with torch.no_grad():
        both = family.encode_prompts([f"{first} {second}"])
        apart = family.encode_prompts([first, second])
    assert both.groups[0][1].shape == (1, 154, 64)
    torch.testing.assert_close(both.groups[0][1].view(2, 77, 64), apart.groups[0][1])
    torch.testing.assert_close(both.pooled[0], apart.pooled[0])


def test_an_end_marker_written_in_the_prompt_ends_the_pooled_text(
    tiny_model: Callable[[str], Path],
) -> None:
    family = load_tiny(tiny_model("sdxl"))
    with torch.no_grad():
        pooled = family.encode_prompts(["a cat", "a cat<|endoftext|> dog"]).pooled
    torch.testing.assert_close(pooled[0], pooled[1])


@pytest.mark.parametrize("split", ["hard", "comma"])
def test_chunks_are_counted_as_they_are_cut(tokenizers: dict[str, Any], split: Any) -> None:
    texts = [
        "",
        "a cat",
        "Ünïcödé 界 " * 30,
        "cat, " * 75,
        "&amp; <|endoftext|> x" * 9,
        "a b! " * 99,
    ]
    assert is_clip(tokenizers["tokenizer"])
    assert not is_clip(tokenizers["tokenizer_2"])  # takes "!" for padding wherever it stands
    for tokenizer in tokenizers.values():
        cut = [len(tokenize(tokenizer, text, 2, split).ids) for text in texts]
        assert set(cut) == {1, 2}
        assert [chunk_counter(tokenizer, 2, split)(text) for text in texts] == cut


def test_another_tokenizer_is_not_taken_for_clips(tokenizers: dict[str, Any]) -> None:
    other = copy.deepcopy(tokenizers["tokenizer"])
    assert is_clip(other)
    other.backend_tokenizer.normalizer = None
    assert not is_clip(other)
    assert not is_clip(object())


@pytest.mark.parametrize("split", ["hard", "comma"])
@pytest.mark.parametrize("max_chunks", [1, 2, 3])
def test_what_is_cut_is_counted_as_tokenising_counts_it(
    tokenizers: dict[str, Any], split: Any, max_chunks: int
) -> None:
    tokenizer = tokenizers["tokenizer"]
    count = cut_counter(tokenizer, max_chunks, split)
    texts = [", ".join(["a cat on a mat"] * n) + " tail" * (n % 7) for n in range(60)]
    texts += [" ".join(["cat"] * n) for n in (0, 74, 75, 76, 150, 151, 225, 226)]
    expected = [tokenize(tokenizer, text, max_chunks, split).num_dropped for text in texts]
    assert [count(text) for text in texts] == expected
    assert 0 in expected
    assert max(expected) > 0
