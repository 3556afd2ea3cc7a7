"""Tags: spelling, rules, and composition with human edits."""

import random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdprep.errors import DataError, RecipeError
from sdprep.recipe import validate
from sdprep.schema import CORE, FOLDS, SCORED_TAG
from sdprep.table import PhotoTable
from sdprep.tag_lists import read_names, read_tag_list
from sdprep.tag_rules import is_emoticon, spaced_tag, written_tag
from sdprep.tags import (
    RawTag,
    TagRules,
    TagsConfig,
    compose_row,
    compose_tags,
    make_rules,
    normalise_tag,
    read_edits,
)

# --- spelling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("Long Hair", "long_hair"),
        ("  long \t hair ", "long_hair"),
        (r"saber \(fate\)", "saber_(fate)"),
        (r"\(^o^)/", r"\(^o^)/"),
        (r"\||/", r"\||/"),
        ("cafe\u0301", "caf\u00e9"),
        ("ÄRGER", "ärger"),
        ("^_^", "^_^"),
        ("東方 Project", "東方_project"),
        (" \n ", ""),
        ("", ""),
    ],
)
def test_canonical_spelling(raw, canonical):
    assert normalise_tag(raw) == canonical


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20))
def test_canonical_spelling_is_idempotent(text):
    once = normalise_tag(text)
    assert normalise_tag(once) == once
    assert " " not in once


def test_every_danbooru_tag_is_canonical_already(shared_data):
    names = read_tag_list(shared_data("tags") / "danbooru.csv").categories
    assert len(names) == 140_782
    faces = [name for name in names if len(name) > 3 and is_emoticon(name)]
    assert faces == ["<|>_<|>", "<o>_<o>"]
    assert [name for name in faces if written_tag(name, True) != name] == []


def test_spaces_for_all_but_faces_and_short_names():
    cases = {"long_hair": "long hair", "k_x": "k_x", "(o)_(o)": "(o)_(o)", "||_||": "||_||"}
    assert {name: spaced_tag(name) for name in cases} == cases
    assert spaced_tag("s&w_m&p") == "s&w m&p"
    assert written_tag("ab,_c", True) == "ab c"
    assert written_tag("a,_bcd", False) == "a_bcd"
    assert written_tag(",", True) == ""


# --- one row --------------------------------------------------------------------------------------


def raw(*names, source="sidecar", score=None, category=None):
    return [RawTag(name, category, score, source) for name in names]


RULES = make_rules(
    {"longhair": "long_hair", "kitty_ears": "cat_ears", "kitty ears 2": "kitty_ears"},
    {"kitty_ears": ["animal_ears"], "animal_ears": ["ears"], "tabby": ["cat"]},
    blacklist=["Bad Tag", "longhair"],
    deprecated=["old_tag"],
    categories={"cat_ears": "general", "ears": "meta"},
)


def names_of(tags):
    return [tag.name for tag in tags]


def test_order_is_normalise_alias_implication_blacklist():
    tags, counts = compose_row(raw("Kitty Ears 2", "Longhair", "bad_tag", "old_tag", "solo"), RULES)
    assert tags == [
        RawTag("cat_ears", "general", None, "alias"),
        RawTag("solo", "general", None, "sidecar"),
        RawTag("animal_ears", "general", None, "implication"),
        RawTag("ears", "meta", None, "implication"),
    ]
    assert counts == {"aliased": 2, "implied": 2, "blacklisted": 2, "deprecated": 1}


def test_the_better_source_wins():
    given_ = [
        *raw("longhair2", source="wd", score=0.9),
        *raw("hat", source="wd", score=0.6, category="general"),
        *raw("hat", source="joytag", score=0.7, category="general"),
        *raw("solo", source="wd", score=0.99),
        *raw("solo", source="sidecar"),
        *raw("kitty_ears", source="sidecar"),
        *raw("cat_ears", source="wd", score=0.5),
    ]
    tags, _ = compose_row(given_, RULES)
    by_name = {tag.name: (tag.source, tag.score) for tag in tags}
    assert by_name["hat"] == ("joytag", 0.7)
    assert by_name["solo"] == ("sidecar", None)
    assert by_name["cat_ears"] == ("wd", 0.5)


def test_drop_ancestors_keeps_the_most_special():
    rules = make_rules(implications={"a": ["b"], "b": ["c"]}, mode="drop_ancestors")
    tags, counts = compose_row(raw("c", "b", "a", "d"), rules)
    assert names_of(tags) == ["a", "d"]
    assert counts["ancestors"] == 2
    off = make_rules(implications={"a": ["b"]}, mode="off")
    assert names_of(compose_row(raw("a"), off)[0]) == ["a"]
    # Over the graph, never substrings: "hair" stays beside "long_hair".
    assert names_of(compose_row(raw("hair", "long_hair"), rules)[0]) == ["hair", "long_hair"]


def edits_of(*actions):
    return read_edits([{"id": "x", **action} for action in actions])["x"]


def test_people_win():
    edits = edits_of(
        {"action": "add_tag", "tag": "Bad Tag"},
        {"action": "add_tag", "tag": "kitty ears", "category": "meta"},
        {"action": "remove_tag", "tag": "Animal Ears"},
        {"action": "remove_tag", "tag": "tabby"},
        {"action": "add_tag", "tag": "second thoughts"},
        {"action": "remove_tag", "tag": "second thoughts"},
    )
    tags, counts = compose_row(raw("tabby", "solo", "bad_tag"), RULES, edits)
    assert {tag.name: tag.source for tag in tags} == {
        "solo": "sidecar",
        "bad_tag": "human",
        "cat_ears": "human",
        "ears": "implication",
    }
    assert next(tag.category for tag in tags if tag.name == "cat_ears") == "meta"
    assert counts["human"] == 3  # two added, one taken away
    ancestors = make_rules(implications={"a": ["b"]}, mode="drop_ancestors")
    kept = compose_row(raw("a"), ancestors, edits_of({"action": "add_tag", "tag": "b"}))[0]
    assert names_of(kept) == ["a", "b"]


def test_the_last_word_counts_in_any_spelling():
    added = edits_of(
        {"action": "remove_tag", "tag": "long hair"}, {"action": "add_tag", "tag": "Long_Hair"}
    )
    assert names_of(compose_row([], TagRules(), added)[0]) == ["long_hair"]
    removed = edits_of(
        {"action": "add_tag", "tag": "Long_Hair"}, {"action": "remove_tag", "tag": "long hair"}
    )
    assert compose_row(raw("long_hair"), TagRules(), removed)[0] == []


def test_edits_that_lack_something_are_refused():
    with pytest.raises(DataError, match="line 4: add_tag needs id and tag"):
        read_edits([{"n": 4, "action": "add_tag", "id": "x"}])
    assert read_edits([{"action": "rate", "id": "x"}]) == {}


letters = st.sampled_from("abcdefgh")
some_tags = st.lists(
    st.builds(
        RawTag,
        letters,
        st.sampled_from([None, "general", "meta"]),
        st.sampled_from([None, 0.25, 0.5]),
        st.sampled_from(["sidecar", "wd", "joytag"]),
    ),
    max_size=10,
)
some_rules = st.builds(
    lambda aliases, implied, mode, black: make_rules(aliases, implied, mode=mode, blacklist=black),
    st.dictionaries(letters, letters, max_size=5),
    st.dictionaries(letters, st.lists(letters, max_size=3), max_size=5),
    st.sampled_from(["add", "drop_ancestors", "off"]),
    st.lists(letters, max_size=2),
)


@settings(max_examples=400, deadline=None)
@given(some_tags, some_rules, st.randoms(use_true_random=False))
def test_composition_is_idempotent_and_order_free(tags, rules, rng: random.Random):
    once, _ = compose_row(tags, rules)
    assert sorted(compose_row(once, rules)[0]) == sorted(once)
    shuffled = list(tags)
    rng.shuffle(shuffled)
    # Sorted as text: None and floats do not compare.
    assert sorted(map(str, compose_row(shuffled, rules)[0])) == sorted(map(str, once))
    assert len({tag.name for tag in once}) == len(once)


@settings(max_examples=100, deadline=None)
@given(some_rules)
def test_aliasing_is_idempotent(rules):
    assert all(rules.canonical(new) == new for new in rules.aliases.values())


# --- the table ------------------------------------------------------------------------------------


def scored(*tags):
    return {"tags": [dict(zip(("name", "p", "category"), tag, strict=True)) for tag in tags]}


@pytest.fixture
def table(tmp_path):
    """Four images, the last of them rejected at ingest, and what five annotators said of them."""
    ids = [f"{at:032x}" for at in range(4)]
    rows = []
    for at, id_ in enumerate(ids):
        row = dict.fromkeys(CORE.names) | {"id": id_, "image": b"x", "width": 8, "height": 8}
        row["text"] = {"caption": f" Caption {at} "} if at == 0 else None
        row["reject_ingest"] = "truncated" if at == 3 else None
        rows.append({name: value for name, value in row.items() if name != "ordinal"})
    fields = [field for field in CORE if field.name != "ordinal"]
    opened = PhotoTable.open(tmp_path / "my photos.lance", create=True)
    with_error = {"error": pa.string()}
    box = pa.struct({"label": pa.string(), "score": pa.float32()})
    types = {
        "tags_": pa.struct({"tags": pa.list_(SCORED_TAG), **with_error}),
        "boxes_": pa.struct({"boxes": pa.list_(box), **with_error}),
        "caption_": pa.struct({"caption": pa.string(), **with_error}),
    }
    wd = [("hat", 0.5, "general"), ("dress", 0.3, "general"), ("miku", 0.8, "character")]
    wd += [("safe", 0.2, "rating"), ("sensitive", 0.6, "rating")]
    boxes = [("a watermark", 0.5), ("a watermark", 0.1), ("face", 0.9)]
    values = {
        "tags_sidecar": [scored(("Long Hair", 1.0, None), ("kitty", 1.0, "general"))],
        "tags_wd": [
            scored(*wd),
            {"tags": None, "error": "no"},
            scored(("hat", 0.36, "general"), ("nan", float("nan"), "general")),
        ],
        "tags_joytag": [scored(("hat", 0.75, "general"), ("low", 0.39, "general"))],
        "boxes_owlv2": [None, {"boxes": [{"label": l_, "score": p} for l_, p in boxes]}],
        "caption_florence": [{"caption": text} for text in ("a model's words", "more words", " ")],
    }
    columns = {}
    for name, given_ in values.items():
        kind = types[name.partition("_")[0] + "_"]
        columns[name] = pa.array(given_ + [None] * (4 - len(given_)), kind)
    with opened.writer():
        opened.add_images(pa.Table.from_pylist(rows, pa.schema(fields)))
        opened.write_fold(ids, columns, stage="test")
    return opened


def composed(table):
    rows = table.read(["tags", "caption", "captions"]).to_pylist()
    tags = [row["tags"] and [(t["name"], t["source"]) for t in row["tags"]] for row in rows]
    return tags, rows


def test_composition_of_a_table(table, tmp_path):
    lists = tmp_path / "lists.toml"
    lists.write_text('[aliases]\nkitty = "cat"\n[implications]\ncat = ["animal"]\n', "utf-8")
    (tmp_path / "black.txt").write_text("# a remark\nlow\n\n#compass\nHat\n", "utf-8")
    config = TagsConfig(
        aliases=str(lists), implications=str(lists), blacklist=str(tmp_path / "black.txt")
    )
    assert read_names(tmp_path / "black.txt") == ("low", "#compass", "hat")
    counts = compose_tags(table, config)
    tags, rows = composed(table)
    assert tags == [
        [
            ("long_hair", "sidecar"),
            ("cat", "alias"),
            ("sensitive", "wd"),
            ("animal", "implication"),
        ],
        [("watermark", "owlv2")],
        [],
        None,
    ]
    assert {name: counts[name] for name in ("added", "aliased", "implied", "blacklisted")} == {
        "added": 5, "aliased": 1, "implied": 1, "blacklisted": 2,
    }  # fmt: skip
    assert counts["below_threshold"] == 4  # dress, miku, low, and the one that is no number
    assert [row["caption"] for row in rows] == ["Caption 0", "more words", None, None]
    assert rows[0]["captions"] == [
        {"text": "Caption 0", "source": "sidecar"},
        {"text": "a model's words", "source": "florence"},
    ]
    assert [table.schema.field(name).type for name in ("tags", "captions")] == [
        FOLDS["tags"],
        FOLDS["captions"],
    ]
    version = table.version
    assert compose_tags(table, config) == counts
    assert table.version == version


def test_thresholds_of_a_table(table, capsys):
    lower = {"wd": {"character": 0.7, "general": 0.2}, "nobody": {"default": 0.1}}
    compose_tags(table, validate({"thresholds": lower}, TagsConfig, "[tags]"))
    tags, _ = composed(table)
    assert tags[0] == [
        ("long_hair", "sidecar"), ("kitty", "sidecar"), ("hat", "joytag"),
        ("miku", "wd"), ("dress", "wd"), ("sensitive", "wd"),
    ]  # fmt: skip
    assert "tags.thresholds.nobody: no such tagger has run" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="is no category"):
        validate({"thresholds": {"wd": {"characters": 0.5}}}, TagsConfig, "[tags]")
    with pytest.raises(RecipeError, match="must be <= 1"):
        validate({"thresholds": {"wd": {"general": 35.0}}}, TagsConfig, "[tags]")
    assert TagsConfig().thresholds_of("wd_eva") == TagsConfig().thresholds_of("wd")
    assert TagsConfig().thresholds_of("wdx") == {}


def test_the_journal_survives_composing_again(table):
    journal, ids = table.journal(), table.read(["id"])["id"].to_pylist()
    journal.append({"action": "add_tag", "id": ids[2], "tag": "My Tag"})
    journal.append({"action": "remove_tag", "id": ids[0], "tag": "hat"})
    journal.append({"action": "set_caption", "id": ids[0], "caption": "said by hand"})
    line = journal.append({"action": "set_caption", "id": ids[1], "caption": ""})
    for _ in range(2):
        compose_tags(table, TagsConfig())
        tags, rows = composed(table)
        assert tags[2] == [("hat", "wd"), ("my_tag", "human")]
        assert "hat" not in dict(tags[0])
        assert rows[0]["captions"] == [{"text": "said by hand", "source": "human"}]
        assert rows[1]["caption"] is None
    journal.undo(line)
    compose_tags(table, TagsConfig())
    assert composed(table)[1][1]["caption"] == "more words"


def test_a_table_without_taggers(tmp_path):
    empty = PhotoTable.open(tmp_path / "empty.lance", create=True)
    assert set(compose_tags(empty, TagsConfig()).values()) == {0}
    assert empty.has("tags")
