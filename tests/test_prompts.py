"""Prompts: every law of the policy, independence of every draw, and properties of the text.

Laws are checked on 100,000 keyed draws within 4 standard errors: a right law fails such a check
with probability 6e-5, and never from one run to the next, for the seeds are fixed.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from statistics import NormalDist, median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.clip_tokens import count_tokens
from sdprep.errors import DataError, RecipeError
from sdprep.prompt_policy import Length, load_policy
from sdprep.prompt_stats import changed_knobs, compare, previews, statistics
from sdprep.prompt_tags import _num_tags
from sdprep.prompts import (
    Draws,
    PromptCaption,
    PromptPolicy,
    PromptRecord,
    PromptTag,
    render_prompt,
    validation_prompt,
)
from sdprep.recipe import validate
from sdprep.seeding import uniform

DRAWS = 100_000
ROOT = Path(__file__).resolve().parent.parent


def policy(**knobs) -> PromptPolicy:
    """A policy from TOML-like values; without dropout, unless said otherwise."""
    return validate({"dropout_p": 0.0, **knobs}, PromptPolicy, "the test")


PLAIN = {"alias_p": 0.0, "tag_style": "spaces", "delimiter": {"comma_p": 1.0, "blank_p": 1.0}}
ALL = {"length": {"law": "all"}}


def record(*names, caption=None, score=None, id_="a" * 32, captions=()) -> PromptRecord:
    texts = ([PromptCaption(caption)] if caption else []) + [PromptCaption(*c) for c in captions]
    return PromptRecord(id_, tuple(PromptTag(name) for name in names), tuple(texts), score)


def near(values, expected) -> bool:
    """Whether the mean of independent values is within 4 standard errors of what it should be."""
    n = len(values)
    mean = sum(values) / n
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return abs(mean - expected) < 4 * sd / math.sqrt(n) + 1e-12


# --- laws ---------------------------------------------------------------------------------------


def lengths(law: Length, total: int = 10_000) -> list[int]:
    return [min(_num_tags(law, Draws(7, f"{at:032x}", 0), "", total), total) for at in range(DRAWS)]


@pytest.mark.parametrize(
    ("name", "p_least", "mean", "sd", "middle", "means", "all_kept"),
    [
        ("truncated_normal", 0.0090, 34.91, 16.98, 34, (9.85, 18.56, 30.13), (0.949, 0.797, 0.376)),
        ("clamped_normal", 0.0946, 32.33, 18.28, None, (9.43, 17.39, 27.96), (0.867, 0.728, 0.343)),
    ],
)
def test_length_laws(name, p_least, mean, sd, middle, means, all_kept):
    found = lengths(Length(law=name))
    # The table is rounded: half of its last digit is allowed on top of 4 standard errors.
    error = 4 / math.sqrt(DRAWS)
    assert min(found) == 5
    share = sum(n == 5 for n in found) / DRAWS
    assert abs(share - p_least) < error * math.sqrt(p_least * (1 - p_least)) + 5e-5
    average = sum(found) / DRAWS
    assert abs(average - mean) < error * sd + 5e-3
    spread = math.sqrt(sum((n - average) ** 2 for n in found) / DRAWS)
    assert abs(spread - sd) < error * sd + 5e-3  # the sd of a sample sd is below sd / sqrt(n)
    assert middle is None or median(found) == middle
    for total, expected, kept in zip((10, 20, 40), means, all_kept, strict=True):
        cut = [min(n, total) for n in found]
        average = sum(cut) / DRAWS
        cut_sd = math.sqrt(sum((n - average) ** 2 for n in cut) / DRAWS)
        assert abs(average - expected) < error * cut_sd + 5e-3
        share = sum(n == total for n in cut) / DRAWS
        assert abs(share - kept) < error * math.sqrt(kept * (1 - kept)) + 5e-4


def test_truncated_law_equals_its_distribution_function_exactly():
    law, normal = Length(mean=12.0, sd=6.0, min=3), NormalDist(12.0, 6.0)
    found = lengths(law)
    below = normal.cdf(3)
    for n in (3, 5, 9, 12, 20):
        expected = (normal.cdf(n + 1) - below) / (1 - below)
        assert near([float(value <= n) for value in found], expected)


def test_extreme_laws_stay_finite():
    draws = [Draws(1, str(at), 0) for at in range(300)]
    assert {_num_tags(Length(mean=0.0, sd=0.1, min=500), d, "", 9) for d in draws} == {500}
    assert {_num_tags(Length(mean=900.0, sd=0.01, min=0), d, "", 9) for d in draws} <= {899, 900}
    assert {
        _num_tags(Length(law="clamped_normal", mean=0.0, sd=0.1, min=0), d, "", 9) for d in draws
    } == {0}

    class Edge:
        def __init__(self, u):
            self.u = u

        def uniform(self, knob):
            return self.u

    for law in ("truncated_normal", "clamped_normal"):
        assert _num_tags(Length(law=law), Edge(0.0), "", 9) == 5
        assert _num_tags(Length(law=law), Edge(1 - 2**-53), "", 9) > 150


def test_empirical_law_and_like_caption_and_all():
    found = lengths(Length(law="empirical", weights={"3": 1.0, "10": 3.0, "7": 0.0}))
    assert set(found) == {3, 10}
    assert near([float(n == 10) for n in found], 0.75)
    names = [f"tag{at}" for at in range(40)]
    caption = "a photo of a cat on a mat with a hat in a flat that is fat"
    assert count_tokens(caption) == 17
    like = policy(length={"law": "like_caption", "min": 2})
    assert len(render_prompt(record(*names, caption=caption), like, 1, 0).tags) == 6
    assert len(render_prompt(record(*names), policy(**ALL), 1, 0).tags) == 40


@pytest.fixture(scope="module")
def many():
    """100,000 prompts of one image under the default policy, with other names for one tag."""
    image = record("long_hair", "blue_eyes", "red_dress", "open_mouth", score=9)
    default = PromptPolicy().with_aliases(
        {"red_dress": ["crimson_gown", "scarlet_frock"], "unused": ["nothing"]},
        ["red_dress", "long_hair"],
    )
    return [render_prompt(image, default, 3, visit) for visit in range(DRAWS)]


def test_dropout_law(many):
    assert near([float(prompt.dropped) for prompt in many], 0.10)
    dropped = [prompt for prompt in many if prompt.dropped]
    assert {prompt.text for prompt in dropped} == {""}
    assert {(prompt.tokens, prompt.chunks, prompt.tags) for prompt in dropped} == {(0, 1, ())}


def test_score_laws(many):
    shown = [prompt for prompt in many if not prompt.dropped]
    assert near([len(prompt.score_tags) for prompt in shown], 2.0)
    for name in ("score_9", "score_9_up", "score_1_up"):
        assert near([float(name in prompt.score_tags) for prompt in shown], 0.2)
    assert all(prompt.text.startswith("score_") for prompt in shown)


@pytest.mark.parametrize(
    ("rank", "knobs", "mean", "p_given"),
    [
        (1, {}, 1.5, 0.75),
        (2, {}, 2.0, 2 / 3),
        (9, {"count": "weighted"}, 10 / 6, 1 / 6),
        (1, {"count": "weighted"}, 1.4, 0.7),
        (5, {"drop_p": 0.1}, 1.8, 0.3),
        (5, {"set": "up"}, 2.0, 0.4),
        (5, {"set": "exact"}, 1.0, None),
    ],
)
def test_score_count_laws(rank, knobs, mean, p_given):
    image, how = record("cat", score=rank), policy(**ALL, **PLAIN, score=knobs)
    found = [render_prompt(image, how, 5, visit) for visit in range(20_000)]
    assert near([len(prompt.score_tags) for prompt in found], mean)
    if p_given:
        name = f"score_{rank}_up"
        assert near([float(name in prompt.score_tags) for prompt in found], p_given)
    else:
        assert {prompt.score_tags for prompt in found} == {(f"score_{rank}",)}


def test_style_law(many):
    shown = [prompt.text for prompt in many if not prompt.dropped]
    for name in ("long_hair", "open_mouth"):
        assert near([float(name.replace("_", " ") in text) for text in shown], 1 / 3 + 0.8 / 3)
    assert near(
        [float("long_hair" in text and "blue_eyes" in text) for text in shown], (1 + 0.2**2) / 3
    )


def test_delimiter_law(many):
    commas, blanks, only_commas = [], [], []
    for prompt in (prompt for prompt in many if not prompt.dropped):
        gaps = len(prompt.tags) + len(prompt.score_tags) - 1
        commas.append(prompt.text.count(",") / gaps)
        only_commas.append(float(prompt.text.count(",") == gaps))
        if prompt.text.count(","):
            blanks.append(prompt.text.count(", ") / prompt.text.count(","))
    assert near(commas, 0.96)
    assert near(blanks, 0.8)
    assert sum(only_commas) / len(only_commas) > 0.85


def test_alias_law(many):
    shown = [prompt.text.replace("_", " ") for prompt in many if not prompt.dropped]
    assert near([float("red dress" not in text) for text in shown], 0.2)
    assert near([float("crimson gown" in text) for text in shown], 0.1)
    assert not any("nothing" in text for text in shown)
    assert all("long hair" in text for text in shown)


def test_pick_and_concat_random_laws():
    image = record("cat", caption="a cat")
    for p in (0.1, 0.7):
        how = policy(mode="pick", pick={"p_tags": p})
        found = [render_prompt(image, how, 2, visit).mode for visit in range(20_000)]
        assert near([float(mode == "tags") for mode in found], p)
    how = policy(mode="concat_random")
    found = [render_prompt(image, how, 2, visit).mode for visit in range(20_000)]
    assert set(found) == {"tags_caption", "caption_tags"}
    assert near([float(mode == "tags_caption") for mode in found], 0.5)


def test_captions_are_drawn_by_the_weight_of_their_source():
    image = record(captions=[("one", "human"), ("two", "florence"), ("three", "never")])
    how = policy(mode="caption", caption_weights={"human": 3.0, "never": 0.0})
    found = [render_prompt(image, how, 2, visit).text for visit in range(20_000)]
    assert set(found) == {"one", "two"}
    assert near([float(text == "one") for text in found], 0.75)


def test_shuffled_scores_take_every_place_alike():
    how = policy(**ALL, **PLAIN, num_keep=1, score={"position": "shuffled", "set": "exact"})
    image = record("keep", "b", "c", score=4)
    places = [
        render_prompt(image, how, 1, visit).text.split(", ").index("score_4")
        for visit in range(20_000)
    ]
    for place in (1, 2, 3):
        assert near([float(at == place) for at in places], 1 / 3)
    assert 0 not in places


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


def _row(names, **more):
    return {"id": "f" * 32, "tags": [{"name": n, "category": "general"} for n in names], **more}


@settings(max_examples=150, deadline=None)
@given(names_, st.randoms(use_true_random=False), st.integers(0, 99))
def test_input_order_is_irrelevant(names, random, visit):
    aliases = {name: ["x1", "x2"] for name in names}
    how = PromptPolicy().with_aliases(aliases, names)
    shuffled = list(names)
    random.shuffle(shuffled)
    one, two = (PromptRecord.from_row(_row(each, score=5)) for each in (names, shuffled))
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
    row = _row([*names, "watermark", "1girl"], caption=caption, score=score)
    found = render_prompt(row, how, 1, visit)
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


# --- rows, policies, validation prompts ----------------------------------------------------------


def test_rows_of_table_and_published_set():
    row = {
        "id": "c" * 32,
        "tags": [
            {"name": "Long Hair", "category": None, "score": 0.5, "source": "wd"},
            {"name": "long_hair", "category": "general", "score": None, "source": "sidecar"},
        ],
        "caption": "a cat",
        "captions": [{"text": "a cat", "source": "sidecar"}, {"text": "the cat", "source": None}],
        "score": 4,
        "image": b"ignored",
    }
    found = PromptRecord.from_row(row)
    assert found.tags == (PromptTag("long_hair", "general"),)
    assert found.captions == (PromptCaption("a cat", "sidecar"), PromptCaption("the cat", ""))
    assert found.score == 4
    empty = {"id": "d", "tags": None, "caption": None, "captions": None, "score": None}
    assert PromptRecord.from_row(empty) == PromptRecord("d")
    assert PromptRecord.from_row({"id": "d", "caption": "x"}).captions == (PromptCaption("x"),)
    assert PromptRecord.from_row({"id": "d", "score": 0}).score is None
    assert PromptRecord.from_row({"id": "d", "score": float("nan")}).score is None
    assert render_prompt(row, policy(), 1, 0) == render_prompt(found, policy(), 1, 0)
    for bad in (10, -1, 4.5):
        with pytest.raises(DataError, match="row d: score"):
            PromptRecord.from_row({"id": "d", "score": bad})


def test_policy_round_trips_through_json():
    how = policy(
        mode="pick",
        tag_style="spaces",
        length={"law": "empirical", "weights": {"4": 2.0}},
        triggers=["sks"],
    ).with_aliases({"a": ["b"]}, ["a"])
    again = validate(json.loads(how.model_dump_json(by_alias=True)), PromptPolicy, "sdprep.json")
    assert again == how
    assert json.loads(json.dumps(how.model_dump(mode="json"))) == how.model_dump(mode="json")


def test_overrides_change_only_what_they_name():
    base = policy(dropout_p=0.3, length={"law": "all", "mean": 20.0}, triggers=["sks"])
    over = validate({"length": {"mean": 10.0}, "mode": "concat"}, PromptPolicy, "[prompt]")
    merged = base.overridden(over)
    assert (merged.dropout_p, merged.triggers, merged.mode) == (0.3, ("sks",), "concat")
    assert (merged.length.law, merged.length.mean) == ("all", 10.0)
    assert set(changed_knobs(base, merged)) == {"length.mean", "mode"}


def test_policy_files_and_their_mistakes(tmp_path):
    file = tmp_path / "my policy.toml"
    file.write_text('[policy]\nmode = "concat"\n[policy.score]\nposition = "back"\n', "utf-8")
    assert load_policy(file).score.position == "back"
    file.write_text('mode = "caption"\n', "utf-8")
    assert load_policy(file).mode == "caption"
    file.write_text('mod = "caption"\ndropout_p = 2.0\n[length]\nlaw = "empirical"\n', "utf-8")
    with pytest.raises(RecipeError) as error:
        load_policy(file)
    for part in ("did you mean mode?", "dropout_p", "must be <= 1", "length.weights"):
        assert part in str(error.value)
    with pytest.raises(RecipeError, match="no recipe"):
        load_policy(tmp_path / "absent.toml")


def test_validation_prompts_have_no_noise():
    image = record("red_dress", "long_hair", "1girl", score=3)
    noisy = validate(
        {"dropout_p": 1.0, "score": {"drop_p": 1.0}, "alias_p": 1.0}, PromptPolicy, "t"
    )
    noisy = noisy.with_aliases({"red_dress": ["gown"]}, ["red_dress"])
    texts = {validation_prompt(image, noisy, 1) for _ in range(3)}
    assert len(texts) == 1
    text = texts.pop()
    assert {"red dress", "long hair", "1girl"} <= set(text.split(", "))
    assert "score_" in text
    lined = validate(
        {"tag_style": "underscores", "delimiter": {"comma_p": 0.0, "mixed_comma_p": 0.0}},
        PromptPolicy,
        "t",
    )
    assert "red_dress" in validation_prompt(image, lined, 1).split(" ")
    many = [record("a_bcd", "b_cde", "c_def", id_=str(at)) for at in range(200)]
    assert all(validation_prompt(each, PromptPolicy(), 1).count(", ") == 2 for each in many)


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_count_what_is_rendered():
    rows = [
        _row([f"tag_{at}" for at in range(40)], score=5) | {"id": f"{n:032x}"} for n in range(50)
    ]
    rows.append({"id": "none"})
    found = statistics(rows, PromptPolicy(), 1, visits=4)
    json.dumps(found)
    assert (found["images"], found["prompts"]) == (51, 204)
    prompts = [render_prompt(row, PromptPolicy(), 1, visit) for row in rows for visit in range(4)]
    shown = [prompt for prompt in prompts if not prompt.dropped]
    assert found["shares"]["dropped"] == (204 - len(shown)) / 204
    assert sum(found["tokens"].values()) == sum(found["chunks"].values()) == len(shown)
    assert found["means"]["tokens"] == sum(prompt.tokens for prompt in shown) / len(shown)
    assert found["missing"] == {"both": sum(prompt.missing == "both" for prompt in shown)}
    assert found["shares"]["chunks_1"] == sum(prompt.chunks == 1 for prompt in shown) / len(shown)
    top = found["exposure"]["most_frequent"][0]
    assert top["prompts"] == sum(top["name"] in prompt.tags for prompt in shown)
    assert found["exposure"]["distinct_tags"] == 40
    assert statistics([], PromptPolicy(), 1)["prompts"] == 0


def test_previews_and_comparison():
    rows = [_row(["red_dress", "cat"]) | {"id": str(at)} for at in range(4)]
    found = list(previews(rows, policy(), 1, visit=2, visits=3))
    assert [(each["id"], each["visit"]) for each in found[:4]] == [
        ("0", 2),
        ("0", 3),
        ("0", 4),
        ("1", 2),
    ]
    assert {"id", "text", "tags", "tokens", "chunks"} <= set(found[0])
    assert found[0]["text"] == render_prompt(rows[0], policy(), 1, 2).text
    pairs = list(compare(rows, policy(tag_style="spaces"), policy(tag_style="underscores"), 1))
    assert all(not pair["same"] for pair in pairs)
    assert all(pair["second"]["text"].replace("_", " ") == pair["first"]["text"] for pair in pairs)
