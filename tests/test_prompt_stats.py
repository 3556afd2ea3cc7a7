"""Previews, comparisons and statistics of prompts."""

import json

import pytest

from sdprep.prompt_stats import compare, previews, statistics, target_tags
from sdprep.prompts import (
    PromptPolicy,
    render_prompt,
)
from tests.prompt_cases import policy, row


def test_statistics_count_what_is_rendered():
    rows = [
        row([f"tag_{at}" for at in range(40)], score=5) | {"id": f"{n:032x}"} for n in range(50)
    ]
    rows.append({"id": "none"})
    found = statistics(rows, PromptPolicy(), 1, visits=4)
    json.dumps(found)
    assert (found["images"], found["prompts"]) == (51, 204)
    prompts = [render_prompt(each, PromptPolicy(), 1, visit) for each in rows for visit in range(4)]
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
    rows = [row(["red_dress", "cat"]) | {"id": str(at)} for at in range(4)]
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


@pytest.mark.parametrize(
    ("law", "total", "mean", "all_kept"),
    [
        ("truncated_normal", 10, 9.85, 0.949),
        ("truncated_normal", 20, 18.56, 0.797),
        ("truncated_normal", 40, 30.13, 0.376),
        ("clamped_normal", 10, 9.43, 0.867),
        ("clamped_normal", 20, 17.39, 0.728),
        ("clamped_normal", 40, 27.96, 0.343),
    ],
)
def test_the_target_law_is_the_published_one(
    law: str, total: int, mean: float, all_kept: float
) -> None:
    policy = PromptPolicy.model_validate({"length": {"law": law}})
    target = target_tags(policy, [total, total])
    assert target is not None
    assert sum(target.values()) == pytest.approx(1.0)
    assert sum(n * share for n, share in target.items()) == pytest.approx(mean, abs=0.005)
    assert target[total] == pytest.approx(all_kept, abs=0.0005)
    empirical = PromptPolicy.model_validate({"length": {"law": "like_caption"}})
    assert target_tags(empirical, [total]) is None
