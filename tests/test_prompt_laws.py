"""Every law of the prompt policy.

Laws are checked on 100,000 keyed draws within 4 standard errors: a right law fails such a check
with probability 6e-5, and never from one run to the next, for the seeds are fixed.
"""

import math
from statistics import NormalDist, median

import pytest

from sdprep.clip_tokens import count_tokens
from sdprep.prompt_policy import Length
from sdprep.prompt_tags import _num_tags
from sdprep.prompts import (
    Draws,
    PromptPolicy,
    render_prompt,
)
from tests.prompt_cases import ALL, PLAIN, near, policy, record

DRAWS = 100_000


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
