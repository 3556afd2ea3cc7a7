"""Lists of aliases and implications in every form, and their linter."""

import gzip
import json

import pytest

from sdprep.errors import DataError
from sdprep.tag_lint import lint
from sdprep.tag_lists import lint_file, read_tag_list
from sdprep.tag_rules import cycle_members
from sdprep.tags import (
    make_rules,
)


def test_lint_of_the_danbooru_list(shared_data):
    found = lint_file(shared_data("tags") / "danbooru.csv")
    assert found["rows"] == 140_782
    assert found["rows_with_links"] == 23_975
    assert found["antecedents"] == 30_078
    expected = {"shortcut": 334, "conflict": 36, "antecedent_is_canonical": 108, "chain": 41}
    nothing = dict.fromkeys(["malformed", "not_active", "self", "unknown_target"], 0)
    assert found["counts"] == expected | nothing | {"cycle": 6}
    assert len(found["problems"]) == sum(found["counts"].values())
    json.dumps(found)


def test_what_the_danbooru_list_may_change(shared_data):
    report = lint(read_tag_list(shared_data("tags") / "danbooru.csv"))
    aliases = report.aliases()
    assert len(aliases) == len(report.usable) == 29_600
    assert aliases["longhair"] == "long_hair"
    for refused in ("/lh", "elf_ears", "hair_bun", "virgin", "defloration"):
        assert refused not in aliases
    assert not set(aliases) & set(aliases.values())
    assert not set(aliases) & set(report.source.categories)
    assert "longhair" in report.spellings()["long_hair"]
    assert "29600 of" in report.summary()
    assert "334 shortcut" in report.summary()
    lax = lint(report.source, keep_canonical=False).aliases()
    assert lax["all_rights_reserved"] == "watermark"  # the chain is followed to its end
    assert lax["hair_bun"] == "single_hair_bun"
    assert "virgin" not in lax  # still a cycle
    assert not set(lax) & set(lax.values())


def test_lint_of_the_e621_implications(shared_data):
    report = lint(read_tag_list(shared_data("tags") / "e621_tag_implications.csv.gz"))
    assert report.source.kind == "implications"
    assert report.counts()["not_active"] == 5056 + 511 + 1 + 1
    assert report.source.num_rows == 59_023
    assert report.implications()["fox"] == ("canine",)
    rules = make_rules(implications=report.implications())
    assert all(name not in entailed for name, entailed in rules.implications.items())


LINKS = [
    ("a", "b", "active"),
    ("b", "c", "active"),
    ("Long Hair", "long_hair", "active"),
    ("old", "new", "deleted"),
    ("x", "y", "active"),
    ("y", "z", "active"),
    ("z", "x", "active"),
    ("w", "x", "active"),
    ("two", "one", "active"),
    ("two", "three", "active"),
    ("/t", "tee", "active"),
]


def _danbooru(tmp_path, form):
    keys = ("antecedent_name", "consequent_name", "status")
    entries = [dict(zip(keys, link, strict=True)) for link in LINKS]
    if form == "e621 json":
        path = tmp_path / "aliases.json"
        path.write_text(json.dumps({"tag_aliases": entries}, indent=1), "utf-8")
    elif form == "json":
        path = tmp_path / "tag aliases.json"
        path.write_text(json.dumps(entries), "utf-8")
    elif form == "jsonl":
        path = tmp_path / "aliases.jsonl"
        path.write_text("\ufeff" + "\r\n".join(map(json.dumps, entries)) + "\r\n", "utf-8")
    else:
        path = tmp_path / "aliases.csv.gz"
        lines = ["id," + ",".join(keys)] + [f"{n}," + ",".join(e) for n, e in enumerate(LINKS)]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.mark.parametrize("form", ["json", "e621 json", "jsonl", "csv.gz"])
def test_danbooru_lists_in_every_form(tmp_path, form):
    report = lint(read_tag_list(_danbooru(tmp_path, form)))
    expected = {"not_active": 1, "self": 1, "cycle": 3, "conflict": 1, "shortcut": 1}
    counts = {kind: number for kind, number in report.counts().items() if number}
    assert counts == expected | {"chain": 5}  # a->b, x->y, y->z, z->x, w->x
    assert report.aliases() == {"a": "c", "b": "c", "w": "x"}


def test_malformed_lines_are_listed_and_the_rest_is_used(tmp_path):
    path = tmp_path / "tags.csv"
    path.write_text(
        'good,0,5,"fine,,good2"\nno number,x,5,\n"",0,1,z\nshort\nlast,4,1,l\n', "utf-8"
    )
    report = lint(read_tag_list(path))
    assert report.counts()["malformed"] == 4
    assert report.aliases() == {"fine": "good", "good2": "good", "l": "last"}
    assert report.source.categories == {"good": "general", "last": "character"}
    path = tmp_path / "aliases.jsonl"
    path.write_text('{"antecedent_name": "a"}\nnot json\n[1]\n', "utf-8")
    path.write_text(path.read_text() + '{"antecedent_name": 3, "consequent_name": "b"}\n', "utf-8")
    assert [problem.line for problem in lint(read_tag_list(path)).problems] == [1, 2, 3, 4]


def test_toml_lists(tmp_path):
    path = tmp_path / "my rules.toml"
    path.write_text(
        '[tags]\nlong_hair = "general"\nkitten = "nothing"\n'
        '[aliases]\nlonghair = "Long Hair"\ngone = "not there"\n'
        '[implications]\ncat_ears = ["animal_ears", "ears"]\n',
        "utf-8",
    )
    report = lint(read_tag_list(path))
    assert report.aliases() == {"longhair": "long_hair"}
    assert report.counts()["unknown_target"] == report.counts()["malformed"] == 1
    found = lint(read_tag_list(path, "implications"), vocabulary=())
    assert found.implications() == {"cat_ears": ("animal_ears", "ears")}


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("none.csv", None, "no tag list"),
        ("empty.csv", b"", "empty"),
        ("latin.csv", b"caf\xe9,0,1,\n", "not UTF-8"),
        ("broken.csv.gz", b"\x1f\x8bnothing", "cannot be read"),
        ("broken.json", b"[{", "not JSON"),
        ("half.csv", b"id,antecedent_name\n1,a\n", "consequent_name"),
        ("bad.toml", b"[", "not TOML"),
        ("other.toml", b"[alias]\na = 'b'\n", "[aliases]"),
        ("implications.csv", b"a,0,1,b\n", "no implications"),
    ],
)
def test_unreadable_lists_say_what_is_wrong(tmp_path, name, data, words):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError) as error:
        read_tag_list(path)
    assert words in str(error.value)
    assert name in str(error.value)


def test_cycles_are_found_in_deep_graphs():
    chain = {str(n): [str(n + 1)] for n in range(5000)}
    assert cycle_members(chain) == {}
    chain["5000"] = ["4990"]
    assert set(cycle_members(chain)) == {str(n) for n in range(4990, 5001)}
    assert len(make_rules({str(n): str(n + 1) for n in range(3000)}).aliases) == 3000
