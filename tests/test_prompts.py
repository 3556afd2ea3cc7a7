"""Prompts: independence of every draw, and properties of the text."""

import importlib.util
import json
import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.clip_tokens import count_tokens
from sdprep.prompts import (
    Draws,
    PromptPolicy,
    PromptRecord,
    PromptTag,
    render_prompt,
)
from sdprep.recipe import validate
from sdprep.seeding import uniform
from tests.prompt_cases import ALL, PLAIN, policy, record, row

ROOT = Path(__file__).resolve().parent.parent

# --- keys ---------------------------------------------------------------------------------------


def test_draws_are_the_keyed_uniforms():
    draws = Draws(12, "ab", 3)
    assert draws.uniform("order", "cat") == uniform("prompt", 12, "ab", 3, "order", "cat")
    assert draws.uniform("dropout") == uniform("prompt", 12, "ab", 3, "dropout")
    assert draws.uniforms("order", ["cat", "dög"]) == [
        draws.uniform("order", n) for n in ("cat", "dög")
    ]
    assert draws.uniforms("order", []) == []
    from hashlib import blake2b

    key = "\x1f".join(["prompt", "12", "ab", "3", "style.tag", "dög"]).encode()
    number = int.from_bytes(blake2b(key, digest_size=8).digest(), "big")
    assert draws.uniform("style.tag", "dög") == (number >> 11) * 2.0**-53


def test_order_is_by_draw():
    names = ["cat", "dog", "fox", "owl"]
    found = render_prompt(record(*names), policy(**ALL), 9, 4)
    assert list(found.tags) == sorted(
        names, key=lambda n: uniform("prompt", 9, "a" * 32, 4, "order", n)
    )


def test_agrees_with_the_plain_renderer_of_the_benchmark():
    path = ROOT / "tools" / "bench" / "render_prompts.py"
    spec = importlib.util.spec_from_file_location("bench_render_prompts", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    tags = [f"{colour}_{thing}" for colour in bench.COLOURS for thing in bench.THINGS]
    images = bench.records(tags, 60)
    for image in images:
        for visit in range(3):
            ours = render_prompt(image, PromptPolicy(), 11, visit).text
            assert ours == bench.plain_prompt(image, 11, visit)


names_ = st.lists(
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=12),
    max_size=12,
    unique=True,
)


@settings(max_examples=150, deadline=None)
@given(names_, st.randoms(use_true_random=False), st.integers(0, 99))
def test_input_order_is_irrelevant(names, random, visit):
    aliases = {name: ["x1", "x2"] for name in names}
    how = PromptPolicy().with_aliases(aliases, names)
    shuffled = list(names)
    random.shuffle(shuffled)
    one, two = (PromptRecord.from_row(row(each, score=5)) for each in (names, shuffled))
    if len(one.tags) == len(names):  # else two names are one tag, whose first spelling counts
        assert render_prompt(one, how, 1, visit) == render_prompt(two, how, 1, visit)


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.sampled_from([f"tag_{c}" for c in "abcdefghijkl"]), min_size=2), st.integers(0, 99)
)
def test_adding_a_tag_leaves_the_others_as_they_are(names, visit):
    names = sorted(names)
    how = policy(**ALL, tag_style="mixed", delimiter={"comma_p": 0.0})
    without = render_prompt(record(*names, score=6), how, 1, visit)
    grown = render_prompt(record(*names, "new_one", score=6), how, 1, visit)
    assert [tag for tag in grown.tags if tag != "new_one"] == list(without.tags)
    assert grown.score_tags == without.score_tags
    # Each piece keeps its spelling and what stands before it, but where the new tag came between.
    pieces = {word for word in without.text.replace(",", " ").split(" ") if word}
    assert pieces <= set(grown.text.replace(",", " ").split(" "))


def test_changing_one_knob_leaves_all_other_draws():
    image = record(*[f"tag_{at}" for at in range(12)], score=8)
    base = policy(**ALL)
    for visit in range(60):
        one = render_prompt(image, base, 1, visit)
        for knob in (
            {"tag_style": "spaces"},
            {"delimiter": {"comma_p": 0.0}},
            {"score": {"position": "back"}},
        ):
            other = render_prompt(image, policy(**ALL, **knob), 1, visit)
            assert (other.tags, other.score_tags) == (one.tags, one.score_tags)
        spaced = render_prompt(image, policy(**ALL, tag_style="spaces"), 1, visit).text
        lined = render_prompt(image, policy(**ALL, tag_style="underscores"), 1, visit).text
        for tag in one.tags:
            spaced = spaced.replace(tag.replace("_", " "), tag)
        assert spaced == lined


def test_visits_seeds_and_ids_differ():
    names = [f"tag{at}" for at in range(12)]
    texts = {render_prompt(record(*names), policy(), 1, visit).text for visit in range(50)}
    texts |= {render_prompt(record(*names), policy(), seed, 0).text for seed in range(2, 50)}
    texts |= {
        render_prompt(record(*names, id_=f"{at:032x}"), policy(), 1, 0).text for at in range(50)
    }
    assert len(texts) > 140


def test_worker_processes_give_the_same_texts():
    image = record(*[f"tag_{at}" for at in range(20)], caption="a “cat”", score=3)
    jobs = [(image, PromptPolicy(mode="concat_random"), 5, visit) for visit in range(40)]
    with get_context("spawn").Pool(2) as pool:
        parts = pool.starmap(render_prompt, jobs, chunksize=7)
    assert parts == [render_prompt(*job) for job in jobs]


def test_hash_seed_changes_nothing():
    code = (
        "import json; from sdprep.prompts import *\n"
        "row = {'id': 'b' * 32, 'tags': [f'tag_{at}' for at in range(20)], 'score': 3}\n"
        "print(json.dumps([render_prompt(row, PromptPolicy(), 5, v).text for v in range(20)]))"
    )
    found = set()
    for seed in ("0", "1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1
    assert len(set(json.loads(found.pop()))) > 10


# --- properties of the text -----------------------------------------------------------------------

odd_names = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from([":)", "a,b", ",", "o_o", "long hair", "x,"])),
    max_size=15,
)
any_policy = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["tags", "caption", "pick", "concat", "concat_random"]),
        "max_chunks": st.integers(1, 3),
        "num_keep": st.integers(0, 3),
        "shuffle": st.booleans(),
        "tag_style": st.sampled_from(["underscores", "spaces", "mixed"]),
        "dropout_p": st.sampled_from([0.0, 0.5]),
        "score": st.fixed_dictionaries(
            {"position": st.sampled_from(["front", "back", "shuffled", "none"])}
        ),
        "triggers": st.sampled_from([[], ["sks dog"], ["ohwx,", "MyStyle"]]),
        "concat": st.fixed_dictionaries(
            {"order": st.sampled_from(["tags_caption", "caption_tags"])}
        ),
        "delimiter": st.fixed_dictionaries({"comma_p": st.sampled_from([0.0, 0.8, 1.0])}),
    }
)
captions_ = st.one_of(
    st.none(),
    st.text(max_size=40),
    st.lists(st.sampled_from(["cat", "sat,", "on", "日本", "&amp;"]), max_size=400).map(" ".join),
)


@settings(max_examples=300, deadline=None)
@given(odd_names, captions_, any_policy, st.integers(0, 9), st.integers(0, 5))
def test_properties_of_every_prompt(names, caption, knobs, score, visit):
    how = validate({**knobs, "priority": ["watermark"]}, PromptPolicy, "the test")
    image = row([*names, "watermark", "1girl"], caption=caption, score=score)
    found = render_prompt(image, how, 1, visit)
    assert found.tokens == count_tokens(found.text) <= 75 * how.max_chunks
    assert 1 <= found.chunks <= how.max_chunks
    if found.dropped:
        assert found.text == ""
        return
    if found.mode != "caption":
        assert "watermark" in found.tags
        assert "watermark" in found.text
    if found.mode == "tags":
        assert ",," not in found.text.replace(" ", "")
        assert found.text == found.text.strip(", ")
    for trigger in how.triggers:
        assert trigger.rstrip(",") in found.text
    if score == 0 or knobs["score"]["position"] == "none":
        assert found.score_tags == ()
    else:
        assert 1 <= len(found.score_tags) <= min(3, score + 1)
    assert (found.num_removed > 0) == found.truncated
    assert "<|endoftext|>" not in found.text.lower()


def test_fitting_removes_whole_words_from_the_end_and_keeps_what_is_protected():
    words = " ".join(f"word{at}" for at in range(200))
    how = policy(**ALL, **PLAIN, mode="concat", max_chunks=1, triggers=["sks"])
    found = render_prompt(record("watermark", "1girl", caption=words, score=3), how, 1, 0)
    assert found.truncated
    assert 70 <= found.tokens <= 75
    head, _, tail = found.text.partition(", word0 ")
    assert set(head.split(", ")) == {"sks", *found.score_tags, "watermark", "1girl"}
    assert words.startswith("word0 " + tail)
    assert count_tokens(found.text + " word" + str(len(tail.split()) + 1)) > 75
    alone = render_prompt(
        record(*[f"protected_tag_{at}" for at in range(60)]),
        policy(**ALL, priority=[f"protected_tag_{at}" for at in range(60)], max_chunks=1),
        1,
        0,
    )
    assert alone.tokens <= 75
    assert alone.truncated
    assert len(alone.tags) > 5


def test_a_comma_is_not_doubled_where_a_caption_was_cut():
    words = ", ".join(f"word{at}" for at in range(200))
    for position in ("front", "back", "shuffled"):
        how = policy(**PLAIN, mode="caption", max_chunks=1, score={"position": position})
        for visit in range(6):
            text = render_prompt(record(caption=words, score=9), how, 1, visit).text
            assert ",," not in text.replace(" ", "")
            assert "score_" in text


@pytest.mark.parametrize("position", ["front", "back", "shuffled", "none"])
@pytest.mark.parametrize("order", ["tags_caption", "caption_tags"])
def test_a_law_may_ask_for_no_tags(position, order):
    none = {"law": "empirical", "weights": {"0": 1.0}}
    score = {"position": position, "set": "exact"}
    how = policy(**PLAIN, mode="concat", concat={"order": order}, length=none, score=score)
    found = render_prompt(record("cat", caption="a dog", score=2), how, 1, 0)
    assert found.tags == ()
    assert sorted(found.text.split(", ")) == ["a dog"] + ["score_2"] * (position != "none")
    alone = render_prompt(record("cat", score=2), how, 1, 0).text
    assert alone == ("" if position == "none" else "score_2")


def test_num_keep_counts_tags_and_keeps_their_order():
    names = [f"tag{at}" for at in range(30)]
    how = policy(**PLAIN, num_keep=3, length={"law": "empirical", "weights": {"5": 1.0}})
    firsts, others = set(), set()
    for visit in range(40):
        found = render_prompt(record(*names, "watermark"), how, 1, visit)
        assert len(found.tags) == 5
        assert "watermark" in found.tags
        firsts.add(found.tags[:3])
        others.add(found.tags[3:])
    assert firsts == {("tag0", "tag1", "tag2")}
    assert len(others) > 20


def test_no_shuffle_keeps_the_record_order_of_what_is_chosen():
    names = [f"tag{at}" for at in range(30)]
    found = render_prompt(record(*names), policy(shuffle=False), 1, 0)
    assert list(found.tags) == [name for name in names if name in found.tags]


def test_aliases_spare_kept_tags_triggers_and_scores():
    names = ["first_tag", "second_tag"]
    other = {name: ["other_name"] for name in ("first_tag", "second_tag", "score_3", "sks")}
    how = policy(**ALL, alias_p=1.0, num_keep=1, triggers=["sks"], tag_style="underscores")
    how = how.with_aliases(other, [*names, "score_3", "sks"])
    found = render_prompt(record(*names, score=3), how, 1, 0)
    assert "first_tag" in found.text
    assert "other_name" in found.text
    assert "second_tag" not in found.text
    assert found.text.count("other_name") == 1
    assert found.text.startswith("sks")


def test_missing_sides_give_way_and_are_said():
    both, tags, caption, none = (
        record("cat", caption="a dog"),
        record("cat"),
        record(caption="a dog"),
        record(score=7),
    )
    how = {mode: policy(**PLAIN, mode=mode) for mode in ("tags", "caption", "concat")}
    assert render_prompt(both, how["concat"], 1, 0).text == "cat, a dog"
    found = render_prompt(caption, how["tags"], 1, 0)
    assert (found.text, found.mode, found.missing) == ("a dog", "caption", "tags")
    found = render_prompt(tags, how["caption"], 1, 0)
    assert (found.text, found.mode, found.missing) == ("cat", "tags", "caption")
    found = render_prompt(tags, how["concat"], 1, 0)
    assert (found.text, found.mode, found.missing) == ("cat", "tags", "caption")
    found = render_prompt(none, how["tags"], 1, 0)
    assert (found.text, found.mode, found.missing, found.dropped) == ("", "", "both", False)
    trigger = policy(triggers=["sks dog"])
    assert render_prompt(none, trigger, 1, 0).text == "sks dog"


def test_concat_order_separator_and_scores_beside_captions():
    image = record("cat", caption="A dog.", score=1)
    how = policy(
        **PLAIN,
        mode="concat",
        concat={"order": "caption_tags", "sep": " | "},
        score={"set": "exact"},
    )
    assert render_prompt(image, how, 1, 0).text == "score_1, A dog. | cat"
    back = policy(**PLAIN, mode="caption", score={"set": "exact", "position": "back"})
    assert render_prompt(image, back, 1, 0).text == "A dog., score_1"


def test_rendering_of_names():
    how = policy(**ALL, **PLAIN, shuffle=False)
    names = ["long_hair", "^_^", "o_o", "(o)_(o)", "saber_(fate)", "k_x", "ab_c"]
    text = render_prompt(record(*names), how, 1, 0).text
    assert text == "long hair, ^_^, o_o, (o)_(o), saber (fate), k_x, ab c"


def test_ratings_are_not_written_and_can_be():
    image = PromptRecord("a", (PromptTag("explicit", "rating"), PromptTag("cat")))
    assert render_prompt(image, policy(**PLAIN), 1, 0).text == "cat"
    assert "explicit" in render_prompt(image, policy(skip_categories=[]), 1, 0).text


def test_text_is_made_plain_once():
    image = record(caption="it\u2019s a \u201ccat\u201d &amp; more<|endoftext|>")
    assert render_prompt(image, policy(mode="caption"), 1, 0).text == 'it\'s a "cat" & more'
