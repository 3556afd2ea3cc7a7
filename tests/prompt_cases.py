"""Records and policies that the tests of prompts share."""

import math

from sdprep.prompts import PromptCaption, PromptPolicy, PromptRecord, PromptTag
from sdprep.recipe import validate


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


def row(names, **more):
    return {"id": "f" * 32, "tags": [{"name": n, "category": "general"} for n in names], **more}
