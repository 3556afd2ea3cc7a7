"""Where a caption contradicts what tags and detectors found in the same picture.

Only claims that can be read with certainty are held against it: a check that does not apply
counts neither for nor against a caption.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_NUMBERS = {"a": 1, "an": 1, "one": 1, "single": 1, "two": 2, "pair": 2, "couple": 2, "both": 2}
_NUMBERS |= {"three": 3, "trio": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
_NUMBERS |= {str(number): number for number in range(1, 21)}
_FEMALE = "woman women girl girls lady ladies female females"
_MALE = "man men boy boys gentleman gentlemen guy guys male males"
_EITHER = "person people child children kid kids adult adults"
_SEX = {word: "female" for word in _FEMALE.split()} | {word: "male" for word in _MALE.split()}
_SEX |= dict.fromkeys(_EITHER.split(), "either")
_PLURAL = frozenset(word for word in _SEX if word.endswith(("s", "men", "people", "children")))
# With one of these in a caption, there may be more people than its nouns count.
_CROWD = re.compile(
    r"\b(?:crowds?|groups?|famil(?:y|ies)|teams?|several|many|some|few|audience|passengers?|others?"
    r"|pedestrians?|spectators?|students?|soldiers?|another|each|every|multiple|various|someone"
    r"|couples?|pairs?|friends?|together|bab(?:y|ies)|toddlers?|players?|skiers?|surfers?|riders?"
    r"|skateboarders?|snowboarders?|batters?|catchers?|pitchers?|umpires?|brides?|grooms?|mothers?"
    r"|mom|dad|fathers?|sons?|daughters?|husband|wife|brothers?|sisters?|officers?|workers?)\b"
)
_WORD = re.compile(r"[a-z0-9]+(?:['’-][a-z]+)*")
_BREAK_WORDS = "and or of with to by in on at for from as the that who his her their"
_BREAKS = frozenset(_BREAK_WORDS.split())
_COLOURS = {
    "grey": "grey",
    "gray": "grey",
    "silver": "grey",
    "blonde": "yellow",
    "golden": "yellow",
}
_COLOURS |= {"blond": "yellow", "yellow": "yellow", "brunette": "brown", "brown": "brown"}
_COLOURS |= {"violet": "purple", "purple": "purple", "orange": "orange", "ginger": "orange"}
_COLOURS |= {name: name for name in ("red", "blue", "green", "black", "white", "pink", "aqua")}
_CHROMATIC = re.compile(
    r"\b(?:red|blue|green|yellow|orange|purple|pink|colou?rful|vibrant colou?rs?|multicolou?red)\b"
)
_GREY_PICTURE = re.compile(
    r"\bblack[- ](?:and|&)[- ]white (?:photo|photograph|image|picture|shot|drawing|sketch|film)"
    r"|\b(?:monochrom(?:e|atic)|gr[ae]yscale) (?:photo|photograph|image|picture|shot|drawing)"
)
_INSIDE = re.compile(
    r"\b(?:indoors?|inside an? (?:room|house|building|kitchen|office|shop|store))\b"
)
_OUTSIDE = re.compile(r"\b(?:outdoors?|outside (?:on|in|under|of) )")
_NO_TEXT = re.compile(
    r"\b(?:no|without(?: any)?) (?:visible )?(?:text|writing|letters|watermarks?)\b"
)
_TEXT = re.compile(
    r"\b(?:watermark(?:s|ed)?|caption reads|text (?:reads|says|that)|(?:sign|label|logo|banner)s? "
    r"(?:reads|says|reading|saying|that (?:reads|says))|the words? [\"“'])"
)
_TEXT_LABELS = frozenset({"text", "watermark", "a_watermark", "logo", "signature"})
_PERSON_LABELS = frozenset({"person", "people", "human", "a_person"})
_COUNT_TAG = re.compile(r"^(\d)(\+?)(girl|boy|other)s?$")
PERSON_SCORE = 0.5


class Finding(NamedTuple):
    """One check that applied: which, and what speaks against the caption (None: nothing)."""

    check: str
    reason: str | None


@dataclass(frozen=True)
class Seen:
    """What other annotators found in one picture."""

    tags: frozenset[str] = frozenset()
    boxes: Sequence[tuple[str, float]] = ()  # (label, score)
    looked_for_people: bool = False  # a detector of persons has run, so that no box means none
    looked_for_text: bool = False
    looked_for_colour: bool = False  # `tags_attributes` has run

    def people_boxes(self) -> int:
        """Persons that a detector is sure of."""
        return sum(is_person_label(name) and p >= PERSON_SCORE for name, p in self.boxes)

    def has_text(self) -> bool:
        """Whether a box or a tag says that there is text or a watermark."""
        boxed = any(is_text_label(name) for name, _ in self.boxes)
        return boxed or not self.tags.isdisjoint(_TEXT_LABELS)


def is_person_label(label: str) -> bool:
    """Whether a detector's label stands for a person."""
    return _plain(label) in _PERSON_LABELS


def is_text_label(label: str) -> bool:
    """Whether a detector's label stands for text or a watermark."""
    return _plain(label) in _TEXT_LABELS


def _plain(label: str) -> str:
    return label.strip().lower().replace(" ", "_")


def check_claims(text: str, seen: Seen) -> list[Finding]:
    """Every check that applies to a caption, with the contradiction where there is one."""
    lower = " ".join(text.lower().split())
    checks = (_people, _sexes, _writing, _place, _monochrome)
    found = [finding for check in checks for finding in check(lower, seen)]
    return found + list(_hues(lower, seen))


def people_claimed(lower: str) -> tuple[int, float, frozenset[str]] | None:
    """Fewest and most people that a caption can mean, and their sexes; None if it names none."""
    words = _WORD.findall(lower)
    most_of = {"female": 0, "male": 0, "either": 0}
    most: float = 0
    for at, noun in enumerate(words):
        if noun not in _SEX:
            continue
        number = _number_before(words, at)
        count = number or (2 if noun in _PLURAL else 1)
        is_vague = noun in _PLURAL and (number or 1) == 1  # `people`, or `a women` mistyped
        most = math.inf if is_vague else most + count
        most_of[_SEX[noun]] = max(most_of[_SEX[noun]], count)
    if not any(most_of.values()):
        return None
    fewest = max(most_of["female"] + most_of["male"], most_of["either"])
    sexes = frozenset(sex for sex, count in most_of.items() if count and sex != "either")
    if _CROWD.search(lower):
        most = math.inf
    return fewest, most, sexes


def _number_before(words: Sequence[str], at: int) -> int | None:
    """The number that belongs to a noun, over at most three words such as `young` between."""
    for word in reversed(words[max(0, at - 4) : at]):
        if word in _NUMBERS:
            return _NUMBERS[word]
        if word in _BREAKS or word in _SEX:
            return None
    return None


def people_tagged(tags: Iterable[str]) -> tuple[int, float] | None:
    """Fewest and most people by tags such as `1girl`, `2boys`, `6+girls`, `no_humans`."""
    tags = frozenset(tags)
    if "no_humans" in tags:
        return 0, 0
    fewest: int = 0
    most: float = 0
    for tag in tags:
        match = _COUNT_TAG.match(tag)
        if match:
            fewest += int(match[1])
            most = math.inf if match[2] else most + int(match[1])
    if tags & {"multiple_girls", "multiple_boys", "crowd"} and fewest < 2:
        return 2, math.inf
    if fewest == 0:
        return (1, 1) if "solo" in tags else None
    return fewest, math.inf if "crowd" in tags or "multiple_others" in tags else most


def _people(lower: str, seen: Seen) -> Iterable[Finding]:
    claimed = people_claimed(lower)
    if claimed is None:
        return
    fewest, most, _ = claimed
    tagged = people_tagged(seen.tags)
    if tagged is not None:
        fits = fewest <= tagged[1] and most >= tagged[0]
        reason = None if fits else f"{_span(fewest, most)} people, tags say {_span(*tagged)}"
        yield Finding("people_tags", reason)
    boxed = seen.people_boxes()
    if boxed or seen.looked_for_people:
        # A detector misses people and never counts one twice: it bounds the number from below.
        fits = most >= boxed and not (boxed == 0 and fewest > 0)
        reason = None if fits else f"{_span(fewest, most)} people, {boxed} boxed"
        yield Finding("people_boxes", reason)


def _span(fewest: int, most: float) -> str:
    if most == math.inf:
        return f"{fewest} or more"
    return f"{fewest}" if fewest == most else f"{fewest} to {most:.0f}"


def _sexes(lower: str, seen: Seen) -> Iterable[Finding]:
    kinds = {match[3] for match in map(_COUNT_TAG.match, seen.tags) if match}
    claimed = people_claimed(lower)
    if claimed is None or not claimed[2] or "other" in kinds or not kinds:
        return
    tagged = {{"girl": "female", "boy": "male"}[kind] for kind in kinds}
    wrong = sorted(claimed[2] - tagged)
    yield Finding("sex", f"{wrong[0]} people, tags say {min(tagged)}" if wrong else None)


def _writing(lower: str, seen: Seen) -> Iterable[Finding]:
    if _NO_TEXT.search(lower):
        if seen.has_text() or seen.looked_for_text:
            yield Finding("text", "says there is none, one was found" if seen.has_text() else None)
        return
    claim = _TEXT.search(lower)
    if claim and (seen.has_text() or seen.looked_for_text):
        reason = None if seen.has_text() else f"{claim.group()!r}, none was found"
        yield Finding("text", reason)


def _place(lower: str, seen: Seen) -> Iterable[Finding]:
    inside, outside = bool(_INSIDE.search(lower)), bool(_OUTSIDE.search(lower))
    tagged = seen.tags & {"indoors", "outdoors"}
    if inside == outside or len(tagged) != 1:
        return
    said = "indoors" if inside else "outdoors"
    yield Finding("place", None if said in tagged else f"{said}, tags say {min(tagged)}")


def _monochrome(lower: str, seen: Seen) -> Iterable[Finding]:
    is_grey = bool(seen.tags & {"greyscale"})
    if _GREY_PICTURE.search(lower):
        if is_grey or "monochrome" in seen.tags or seen.looked_for_colour:
            fits = is_grey or "monochrome" in seen.tags
            yield Finding("monochrome", None if fits else "black and white, the picture is not")
    elif is_grey and (claim := _CHROMATIC.search(lower)):
        yield Finding("monochrome", f"{claim.group()!r}, the picture is grey")


_HUE_NOUNS = "hair eyes dress shirt skirt hat jacket shoes pants bow ribbon gloves background sky"
_HUE_TAG = re.compile(rf"^({'|'.join(_COLOURS)})_({'|'.join(_HUE_NOUNS.split())})$")
_HUE_CLAIM = re.compile(
    rf"\b({'|'.join(_COLOURS)})[- ](?:(?:long|short|curly|wavy|straight|bright|dark|light) )?"
    rf"({'|'.join(_HUE_NOUNS.split())})\b"
)


def _hues(lower: str, seen: Seen) -> Iterable[Finding]:
    """Colours of things that tags name, such as `blue_hair`; several colours all count."""
    tagged: dict[str, set[str]] = {}
    for match in map(_HUE_TAG.match, seen.tags):
        if match:
            tagged.setdefault(match[2], set()).add(_COLOURS[match[1]])
    claimed: dict[str, set[str]] = {}
    for colour, noun in _HUE_CLAIM.findall(lower):
        claimed.setdefault(noun, set()).add(_COLOURS[colour])
    for noun in sorted(tagged.keys() & claimed.keys()):
        fits = not tagged[noun].isdisjoint(claimed[noun])
        said, known = ", ".join(sorted(claimed[noun])), ", ".join(sorted(tagged[noun]))
        yield Finding(f"colour_{noun}", None if fits else f"{noun} {said}, tags say {known}")
