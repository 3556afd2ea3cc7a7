"""The card: the Hub can read it, data cannot speak in it, and nothing private is told."""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from huggingface_hub import DatasetCard, metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from sdprep.card import write_card, yaml_features
from sdprep.card_facts import NUM_SAMPLES, Facts
from sdprep.card_pictures import SHEET_WIDTH, contact_sheet
from sdprep.card_text import fenced, plain, table
from sdprep.prepared_files import features, prepared_schema
from sdprep.private_paths import hide_paths

EVIL = (
    "x|<script>alert(1)</script> [a](javascript:1) ![i](http://e/x.png) `c` **b** @bob\n# h\n| y |"
)


def row(number: int, **changes: Any) -> dict[str, Any]:
    width, height = 40 + 7 * (number % 9), 90 - 6 * (number % 7)
    picture = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, 99, 30)).save(picture, "PNG")
    made = {
        "id": f"{number:032x}",
        "image": {"bytes": picture.getvalue(), "path": f"{number:032x}.png"},
        "width": width,
        "height": height,
        "caption": "a thing",
        "tags": [{"name": f"tag_{k}", "category": "general"} for k in range(number % 4)],
        "score": 1 + number % 9,
        "rating": "general",
        "source": "mine",
        "license": "cc0-1.0",
        "boxes": [],
    }
    return made | changes


def counted(rows: list[dict[str, Any]]) -> Facts:
    facts = Facts()
    for number, one in enumerate(rows):
        facts.add("validation" if number % 5 == 4 else "train", one)
    return facts


def manifest(**changes: Any) -> dict[str, Any]:
    made = {
        "SCHEMA_VERSION": 1,
        "format": "parquet",
        "left_out": {},
        "repacked_as_png": 0,
        "score": "score_technical",
        "policy": {"mode": "tags"},
        "certificate": {"seed": 7, "counts": {"train": 8}, "digests": {"id_split": "abc"}},
        "fingerprints": {"score_technical": "technical 1"},
        "features": features(),
    }
    return made | changes


def written(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    options = {"title": "Things", "recipe_text": 'mode = "tags"\n'} | {
        name: changes.pop(name) for name in ("title", "recipe_text") if name in changes
    }
    write_card(folder, manifest(**changes), counted(rows), **options)
    return (folder / "README.md").read_text(encoding="utf-8")


def html_of(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def test_the_hub_reads_it(tmp_path: Path) -> None:
    text = written(tmp_path / "set", [row(n) for n in range(20)])
    card = DatasetCard.load(tmp_path / "set" / "README.md")
    assert card.data.license == "cc0-1.0"
    assert card.data.pretty_name == "Things"
    assert card.data.size_categories == ["n<1K"]
    loaded = metadata_load(tmp_path / "set" / "README.md")
    assert loaded["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"},
        {"split": "validation", "path": "data/validation-*.parquet"},
    ]
    for words in ("**20 images**", "4 of them", "| train | 16 |", "cc0-1.0 | 20 |", "load_dataset"):
        assert words in text
    for words in ("seed | 7", "counts&#58; train | 8", "technical 1", 'mode = "tags"'):
        assert words in text


def test_features_are_those_of_the_datasets_library() -> None:
    theirs = datasets.Features.from_arrow_schema(prepared_schema())
    assert isinstance(theirs["image"], datasets.Image)
    assert theirs.arrow_schema.metadata == prepared_schema().metadata
    assert theirs.arrow_schema == prepared_schema()
    listed = yaml.safe_load(yaml.safe_dump(yaml_features(features())))
    assert datasets.Features._from_yaml_list(listed) == theirs


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(n) for n in range(30)]
    for name in ("one", "two"):
        written(tmp_path / name, rows)
    for file in ("README.md", "assets/samples.jpg", "assets/sizes.png", "assets/counts.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_users_matplotlib_settings_do_not_matter(tmp_path: Path) -> None:
    import matplotlib

    rows = [row(n) for n in range(10)]
    written(tmp_path / "one", rows)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20}):
        written(tmp_path / "two", rows)
        assert matplotlib.rcParams["font.size"] == 20
    same = [(tmp_path / name / "assets/sizes.png").read_bytes() for name in ("one", "two")]
    assert same[0] == same[1]


def test_data_cannot_speak_in_the_card(tmp_path: Path) -> None:
    rows = [
        row(n, source=EVIL, license=EVIL, rating=EVIL, tags=[{"name": EVIL, "category": "general"}])
        for n in range(6)
    ]
    text = written(
        tmp_path / "set",
        rows,
        title=EVIL,
        recipe_text="```\n<script>alert(2)</script>\n````\n# h\n",
        fingerprints={EVIL: EVIL},
        certificate={EVIL: EVIL, "counts": {}},
        policy={"mode": "```\n<b>"},
        left_out={EVIL: 3},
    )
    page = html_of(text.split("\n---\n", 1)[1])
    assert "<script" not in page
    assert "javascript:1)" in page  # shown as text
    assert "<a " not in page
    assert "<strong>b</strong>" not in page
    assert page.count("<h1>") == 1
    assert page.count("<img ") == 2  # ours; evil ratings are never shown as samples
    assert DatasetCard(text).data.pretty_name == EVIL[:200]


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab |\\`_*[]<>&!#~:@$()\n") | st.characters(), max_size=40))
def test_plain_text_is_shown_as_it_is(text: str) -> None:
    page = html_of(table(["a", "b"], [[f"x{plain(text)}x", "y"]]))
    cells = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    assert len(cells) == 2
    assert cells[1] == "y"
    assert "<" not in cells[0]
    shown = html.unescape(cells[0])[1:-1]
    kept = [char for char in text if char.isalnum() and char.isascii() or char in "|`_*[]<>\\"]
    assert [char for char in shown if char in kept] == kept


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="`~a\n #", max_size=40))
def test_nothing_escapes_a_code_block(text: str) -> None:
    tokens = MarkdownIt().parse(fenced(text))
    assert [token.type for token in tokens] == ["fence"]
    assert tokens[0].content.rstrip("\n") == text.rstrip("\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('path = "/home/ann/my photos/cats"', 'path = ".../cats"'),
        ("table = '/srv/x.lance'", "table = '.../x.lance'"),
        ('path = "C:\\\\Users\\\\ann\\\\cats"', 'path = ".../cats"'),
        ('path = "~/cats"', 'path = ".../cats"'),
        ('path = "//nas/ann/cats"', 'path = ".../cats"'),
        ('path = "photos/cats"', 'path = "photos/cats"'),
        ("joytag 1 /mnt/models/joytag@abc", "joytag 1 .../joytag@abc"),
        ("laion/CLIP-ViT-B-32 at 1/255", "laion/CLIP-ViT-B-32 at 1/255"),
        ("see https://huggingface.co/a/b", "see https://huggingface.co/a/b"),
        ("width / height > 2", "width / height > 2"),
    ],
)
def test_private_paths_are_shortened(text: str, shown: str) -> None:
    assert hide_paths(text) == shown


def test_no_private_path_reaches_the_card(tmp_path: Path) -> None:
    text = written(
        tmp_path / "set", [row(1)], recipe_text='table = "/home/ann/secret project/x.lance"\n'
    )
    assert "ann" not in text.replace("annotated", "")
    assert "secret" not in text


@pytest.mark.parametrize("num_rows", [1, 2, 60])
def test_samples_fit_the_sheet_and_hide_what_is_not_for_everyone(
    tmp_path: Path, num_rows: int
) -> None:
    rows = [row(n, rating="explicit" if n % 2 else "general") for n in range(num_rows)]
    facts = counted(rows)
    assert len(facts.samples()) == min(NUM_SAMPLES, (num_rows + 1) // 2)
    written(tmp_path / "set", rows)
    with Image.open(tmp_path / "set/assets/samples.jpg") as sheet:
        assert sheet.width <= SHEET_WIDTH
        assert not sheet.getexif()


def test_samples_do_not_depend_on_the_order_of_rows() -> None:
    rows = [row(n) for n in range(60)]
    one = [image.tobytes() for image in counted(rows).samples()]
    assert one == [image.tobytes() for image in counted(rows[::-1]).samples()]


def test_extreme_shapes_make_a_sheet(tmp_path: Path) -> None:
    for shapes in ([(1320, 440)] * 5, [(147, 440)] * 15, [(440, 440)]):
        contact_sheet([Image.new("RGB", shape) for shape in shapes], tmp_path / "s.jpg")
        with Image.open(tmp_path / "s.jpg") as sheet:
            assert sheet.width <= SHEET_WIDTH


def test_a_bare_data_set_has_a_card_without_empty_parts(tmp_path: Path) -> None:
    bare = row(0, tags=[], score=None, rating="explicit", source=None, license=None, caption=None)
    text = written(
        tmp_path / "set", [bare], certificate=None, score=None, fingerprints={}, recipe_text=None
    )
    assert "samples.jpg" not in text
    assert "counts.png" not in text
    assert "no validation split" in text
    assert "Recipe" not in text
    assert "license" not in metadata_load(tmp_path / "set/README.md")
    assert "unknown | not stated | 1" in text


def test_licences_that_the_hub_does_not_know_are_named(tmp_path: Path) -> None:
    written(tmp_path / "one", [row(1, license="my own")])
    assert metadata_load(tmp_path / "one/README.md")["license"] == "other"
    assert metadata_load(tmp_path / "one/README.md")["license_name"] == "my own"
    written(tmp_path / "two", [row(1), row(2, license=None)])
    assert metadata_load(tmp_path / "two/README.md")["license"] == "other"


def test_counts_are_right() -> None:
    facts = counted([row(n) for n in range(10)])
    assert dict(facts.rows) == {"train": 8, "validation": 2}
    assert facts.tags == Counter({"tag_0": 7, "tag_1": 4, "tag_2": 2})
    assert facts.tags_per_image == Counter({0: 3, 1: 3, 2: 2, 3: 2})
    assert facts.scores["train"].total() == 8
