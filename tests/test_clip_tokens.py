"""Token counts equal transformers' CLIPTokenizer, on real prompts and on any text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.clip_tokens import VOCABULARY, clean_text, count_tokens, num_chunks, token_ids


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(VOCABULARY)


@pytest.fixture(scope="module")
def expected(clip):
    return lambda text: len(clip.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def test_the_known_sentence():
    assert token_ids("a photo of a cat") == [320, 1125, 539, 320, 2368]


def test_counts_equal_transformers_on_real_texts(shared_data, expected):
    folder = shared_data("texts")
    texts = [
        json.loads(line)["prompt"]
        for line in (folder / "diffusiondb_prompts.jsonl").open(encoding="utf-8")
    ]
    for line in (folder / "iiw_long_captions.jsonl").open(encoding="utf-8"):
        texts += [value for value in json.loads(line).values() if isinstance(value, str)]
    for line in (folder / "coco_captions.jsonl").open(encoding="utf-8"):
        texts += json.loads(line)["captions"][:2]
    assert len(texts) > 9000
    wrong = [text for text in texts if count_tokens(text) != expected(text)]
    assert wrong == []
    cleaned = [clean_text(text) for text in texts]
    assert [text for text in cleaned if count_tokens(text) != expected(text)] == []
    assert sum(a != b for a, b in zip(texts, cleaned, strict=True)) > 10


def test_counts_equal_transformers_on_every_danbooru_tag_spelling(shared_data, expected):
    lines = (shared_data("tags") / "danbooru.csv").read_text("utf-8").splitlines()[::40]
    text = ", ".join(lines[:2000])
    assert count_tokens(text) == expected(text)
    assert [line for line in lines if count_tokens(line) != expected(line)] == []


odd = st.sampled_from(
    ["<|endoftext|>", "<|startoftext|>", "<|", "|>", "'s", "'", ",", ", ", " ", "\x1c", "\x0b"]
    + ["\u2028", "\xa0", "\x85", "e\u0301", "\u0301", "İ", "ﬁ", "１", "一", "Σ", "ß", "😀", "_"]
    + ["don't", "A", "12", ":)", "\t", "\x00", "\u200b", "²", "ⅷ"]
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=30), st.lists(odd, max_size=12).map("".join)))
def test_counts_equal_transformers_on_any_text(expected, text):
    assert count_tokens(text) == expected(text) == len(token_ids(text))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(odd, max_size=12).map("".join)))
def test_cleaning_is_idempotent_and_leaves_no_mark(text):
    once = clean_text(text)
    assert clean_text(once) == once or "&" in once  # "&amp;amp;amp;lt;" unfolds layer by layer
    assert "<|endoftext|>" not in once.lower()
    assert once == once.strip()
    assert "  " not in once


def test_cleaning_makes_quotes_entities_and_wide_forms_plain():
    assert (
        clean_text("it\u2019s \u201cred\u201d &amp; blue &quot;x&quot;") == 'it\'s "red" & blue "x"'
    )
    assert clean_text("ﬁre ＡＢ\u3000c\r\nd\te") == "fire AB c d e"
    assert clean_text("a<|endoftext|>b <|<|EndOfText|>endoftext|>") == "a b <| endoftext|>"
    assert count_tokens(clean_text("\u2018a\u2019")) == count_tokens("'a'")
    assert clean_text("bad \ud800 half") == "bad \ufffd half"


def test_num_chunks_at_the_edges():
    assert [num_chunks(n) for n in (0, 1, 75, 76, 150, 151, 225, 226, 999)] == [
        1, 1, 1, 2, 2, 3, 3, 3, 3,
    ]  # fmt: skip
    assert num_chunks(300, 4) == 4
