"""What can be seen wrong in one caption by itself: loops, refusals, wrappings, cut ends.

Every monitor takes the text (and what was asked for) and gives a reason in words, or None. The
bounds were set on human captions (COCO, DOCCI, ImageInWords), of which fewer than 2 % may be
flagged by all monitors together; `tests/test_caption_check.py` holds them to it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sdprep.caption_json import asks_for_json, words_in_json

FLAGS = (
    *("empty", "repetition", "unfinished", "refusal", "boilerplate", "preamble", "markdown"),
    *("json", "url", "script", "language", "length", "word_list", "contradiction", "similarity"),
)
"""Everything that a caption can be flagged with, in the order of reports."""

REPEATED_SHARE = 0.3  # of 4-grams; spec/prep.md, section 5
RUNS = 4  # a 1- to 6-gram this many times running
LENGTH_TOLERANCE = 0.5  # of the number of words asked for
LEAST_WORDS = 3
LONG_WORDS = 25  # a text this long that ends without a mark was cut


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[^\W_]+(?:['’_-][^\W_]+)*")
_END = re.compile(r"[.!?…。!?][\"'”’)\]»*]*$|[”»]$")
_CUT = re.compile(r"[,;:([{–—-]$")
_DANGLING = _listed(
    "a an the and or of with his their its my your our is are was were has have that which "
    "while between into very in on at to by from for as near"
)
_LIMIT = frozenset({"length", "max_tokens"})


@dataclass(frozen=True)
class Habits:
    """What is usual among the captions that one captioner wrote."""

    ends_with_mark: bool = False  # nearly all do, so one that does not was cut
    script: str = "LATIN"
    language: str = "en"
    words: tuple[float, float] | None = None  # fewest and most that are no outlier
    cosines: Mapping[str, float] = field(default_factory=dict)  # least usual one, by scorer


def words_of(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def ends_with_mark(text: str) -> bool:
    """Whether the last sentence is closed."""
    return bool(_END.search(text.strip()))


def repetition(words: Sequence[str]) -> str | None:
    """A text that goes round in circles."""
    for size in range(1, 7):
        run = _longest_run(words, size)
        if run >= RUNS:
            return f"a phrase of {size} words stands {run} times running"
    fours = [tuple(words[at : at + 4]) for at in range(len(words) - 3)]
    if len(fours) >= 8:
        share = 1 - len(set(fours)) / len(fours)
        if share > REPEATED_SHARE:
            return f"{share:.0%} of its 4-word phrases are repeats"
    return None


def _longest_run(words: Sequence[str], size: int) -> int:
    """How many times at most a phrase of `size` words follows itself, itself included."""
    same = longest = 0
    for at in range(size, len(words)):
        same = same + 1 if words[at] == words[at - size] else 0
        longest = max(longest, same // size + 1 if same >= size else 0)
    return longest


def unfinished(
    text: str, words: Sequence[str], finish_reason: str | None, habits: Habits, is_list: bool
) -> str | None:
    """A text that was cut before its end."""
    text = text.strip()
    if ends_with_mark(text):
        return None
    if finish_reason in _LIMIT:
        return "stopped at the token limit without a closing mark"
    if _CUT.search(text):
        return f"ends in {text[-1]!r}"
    if words and words[-1] in _DANGLING:
        return f"ends in the word {words[-1]!r}"
    if is_list:
        return None
    if habits.ends_with_mark:
        return "has no closing mark, unlike the other captions of its column"
    if len(words) >= LONG_WORDS:
        return f"{len(words)} words without a closing mark"
    return None


_REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial|language model)\b"
    r"|\bi(?:['’]m| am) (?:sorry|afraid|unable|not able|just an ai|an ai)\b"
    r"|\bi (?:can(?:not|['’]t| not)|could(?: not|n['’]t)|won['’]t)\b"
    r"|\bi do(?:n['’]t| not) (?:have|feel)\b"
    r"|\bi apologi[sz]e\b|\bunfortunately, i\b"
    r"|\b(?:unable|not able) to (?:view|see|process|assist|help|describe|identify|provide|access)\b"
    r"|\bcan(?:not|['’]t) (?:assist|help|fulfil|fulfill|comply|provide|be described)\b"
    r"|\b(?:against|violates?) (?:my|our|the) (?:guidelines|policy|policies|content)\b"
    r"|\bno image (?:was |has been |is )?(?:provided|attached|uploaded|visible)\b"
    r"|\b(?:please )?(?:provide|upload|share) (?:me )?(?:with )?(?:the|an|your) (?:actual )?image\b"
)
_BOILERPLATE = re.compile(
    r"^(?:the|this) (?:image|picture|photo|photograph|scene) "
    r"(?:shows?|depicts?|features?|captures?|presents?|portrays?|showcases?|displays?|contains?"
    r"|is (?:of|an? (?:\w+ )?(?:photo|photograph|image|picture|illustration))|appears to)\b"
    r"|^in (?:the|this) (?:image|picture|photo|photograph),? (?:we|you|i|there)\b"
    r"|\boverall,? (?:the|this) (?:image|scene|picture|photo|photograph|composition|atmosphere)\b"
    r"|\bthere (?:is|are) no (?:visible |discernible |other )?(?:text|watermarks?|logos?)\b"
    r"[^.]{0,80}\b(?:visible|present|in the image|in this image)\b"
    r"|\bit(?:['’]s| is) (?:important|worth) (?:to note|noting)\b"
    r"|\bevok(?:es|ing) a sense of\b|\btestament to\b"
)
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|absolutely|okay|ok|great|yes)\b[,!.:]"
    r"|^here(?:['’]s| is| are)\b[^.:]{0,60}\b(?:captions?|descriptions?|prompts?|summary)\b"
    r"|^(?:caption|description|answer|output|response|prompt|assistant|image description|title)\s*:"
    r"|^(?:a|the|this) (?:suitable )?(?:caption|description)\b[^.]{0,40}\b(?:is|could be|would)\b"
    r"|\b(?:let me know if|hope this helps|feel free to)\b"
    r"|<\|[^|>]*\|>|</?s>|\[/?inst\]|<(?:image|eos|bos|pad|unk)>|<end_of_turn>|###\s*assistant"
)
_MARKDOWN = re.compile(
    r"^\s{0,3}#{1,6} \S|^\s*[-*+•] \S|^\s*\d{1,2}[.)] \S.*\n\s*\d{1,2}[.)] \S"
    r"|\*\*[^*\n]+\*\*|__[^_\n]+__|```|\[[^\]\n]+\]\([^)\n]+\)|^\s*\|.*\|\s*$",
    re.MULTILINE,
)
_JSON = re.compile(r"^\s*[\[{]\s*[\[{\"']|\"[\w ]+\"\s*:\s*[\[{\"\d]|^\s*\{[^}]*:|\}\s*$")
_URL = re.compile(r"(?:https?|ftp)://\S|\bwww\.\w+\.\w{2,}/?", re.IGNORECASE)


def patterns(text: str) -> dict[str, str]:
    """Refusals, set phrases and wrappings: flag → the passage that gave it away."""
    lower = text.strip().lower()
    found = {}
    for flag, pattern, where in (
        ("refusal", _REFUSAL, lower),
        ("preamble", _PREAMBLE, lower),
        ("boilerplate", _BOILERPLATE, lower),
        ("markdown", _MARKDOWN, text),
        ("json", _JSON, text),
        ("url", _URL, text),
    ):
        match = pattern.search(where)
        if match:
            passage = " ".join(match.group().split())
            found[flag] = f"{passage[:60]!r}"
    return found


def length(words: Sequence[str], prompt: str | None, habits: Habits) -> str | None:
    """Too few or too many words for what was asked."""
    count = len(words)
    asked = requested_words(prompt)
    if asked is not None:
        low, high = asked * (1 - LENGTH_TOLERANCE), asked * (1 + LENGTH_TOLERANCE)
        if not low <= count <= high:
            return f"{count} words, asked for {asked}"
        return None
    if count < LEAST_WORDS:
        return f"only {count} words"
    if habits.words and not habits.words[0] <= count <= habits.words[1]:
        return f"{count} words, far from what is usual here"
    return None


_ASKED = re.compile(r"\b(\d{1,4})(?:[- ]|\s+)words?\b", re.IGNORECASE)
_LIST_ASKED = re.compile(r"\b(?:tags?|keywords?|list|prompt)\b", re.IGNORECASE)


def requested_words(prompt: str | None) -> int | None:
    """The number of words that a prompt asks for, if it does."""
    match = _ASKED.search(prompt or "")
    return int(match.group(1)) if match else None


def asks_for_list(prompt: str | None) -> bool:
    """Whether the prompt wants tags or an image prompt, which need be no sentence."""
    return bool(_LIST_ASKED.search(prompt or ""))


_FUNCTION_WORDS = _listed(
    "a an the is are was were be been being has have had of in on at by with to from for into over "
    "under near and or but while as that which who its his her their it he she they this these "
    "there next front behind sits stands holding"
)


def word_list(text: str, words: Sequence[str]) -> str | None:
    """Tags or keywords where sentences are wanted."""
    parts = [part for part in re.split(r"[,;|\n]", text) if part.strip()]
    if len(parts) < 4:
        return None
    lengths = sorted(len(words_of(part)) for part in parts)
    glue = sum(word in _FUNCTION_WORDS for word in words) / max(len(words), 1)
    if lengths[len(lengths) // 2] <= 3 and glue < 0.12:
        return f"{len(parts)} parts between commas, hardly a sentence"
    return None


def scripts(text: str) -> Counter[str]:
    """Letters by writing system, such as LATIN, CJK, CYRILLIC."""
    if text.isascii():
        return Counter(LATIN=sum(map(str.isalpha, text)))
    names = (unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    return Counter(names)


def foreign_script(text: str, habits: Habits) -> str | None:
    """Letters of another writing system than the other captions have."""
    if text.isascii() and habits.script == "LATIN":
        return None
    counts = scripts(text)
    total = sum(counts.values())
    others = {name: n for name, n in counts.items() if name != habits.script}
    number = sum(others.values())
    if number >= 2 and number / total > 0.05:
        most = max(sorted(others), key=lambda name: others[name])
        return f"{number} of {total} letters are no {habits.script} ones but {most}"
    return "replacement characters" if "\ufffd" in text else None


_LANGUAGES = {
    "en": "the and with of is are on in a an at to that his her there has wearing",
    "de": "der die das und mit ein eine einer einem einen ist auf im dem den nicht sich vor steht",
    "fr": "le la les et avec un une est dans sur des du au qui sont ses deux une d'un d'une",
    "es": "el la los las y con un una es en de del está están sobre que sus hay se por",
    "it": "il la gli e con un una è di del della nel che sono sul si due alla uno",
    "pt": "o os as e com um uma é em de do da no na está são sobre dois ao",
    "nl": "de het en met een is op van in aan zijn die staat bij voor twee niet naar",
}
_WORDS_OF_LANGUAGE = {name: _listed(text) for name, text in _LANGUAGES.items()}


def language_of(words: Sequence[str]) -> str | None:
    """The language whose small words are clearly the most; None where it does not show."""
    counts = {
        name: sum(word in known for word in words) for name, known in _WORDS_OF_LANGUAGE.items()
    }
    first, second = sorted(counts, key=lambda name: -counts[name])[:2]
    is_clear = counts[first] >= 3 and counts[first] >= 1.5 * counts[second]
    is_short = counts[first] == 2 and counts["en"] == 0 and len(words) <= 8 and counts[second] < 2
    return first if is_clear or is_short else None


def foreign_language(words: Sequence[str], habits: Habits) -> str | None:
    """Another language than that of the other captions."""
    found = language_of(words)
    if found is None or found == habits.language:
        return None
    usual = sum(word in _WORDS_OF_LANGUAGE[habits.language] for word in words)
    if usual / max(len(words), 1) > 0.15:
        return None
    return f"written in {found!r}, the others in {habits.language!r}"


def check_text(
    text: str,
    *,
    prompt: str | None = None,
    finish_reason: str | None = None,
    habits: Habits | None = None,
) -> dict[str, str]:
    """Everything that is wrong with one caption: flag → reason in words; empty if nothing is.

    Args:
        text: the caption.
        prompt: what the model was asked, which may name a number of words or ask for tags.
        finish_reason: `length` where the model hit its token limit.
        habits: what is usual among the captions beside it.
    """
    habits = habits or Habits()
    if asks_for_json(prompt):
        inside = words_in_json(text)
        if inside is None:
            return {"json": f"JSON was asked for, and this is none: {text.strip()[:60]!r}"}
        text = inside
    words = words_of(text)
    if not words:
        return {"empty": "no words"}
    is_list = asks_for_list(prompt) or asks_for_json(prompt)
    found: dict[str, str | None] = {
        "repetition": repetition(words),
        "unfinished": unfinished(text, words, finish_reason, habits, is_list),
        **patterns(text),
        "script": foreign_script(text, habits),
        "language": foreign_language(words, habits),
        "length": length(words, prompt, habits),
        "word_list": None if is_list else word_list(text, words),
    }
    return {flag: found[flag] for flag in FLAGS if found.get(flag)}  # type: ignore[misc]


def malformed(text: str, prompt: str | None = None) -> str | None:
    """Why a model's answer is worth another try: empty, a loop, a refusal, or broken characters.

    JSON is malformed unless the prompt asks for it, and then whatever is none.
    """
    found = check_text(text, prompt=prompt)
    for flag in ("empty", "repetition", "refusal", "json"):
        if flag in found:
            return f"{flag}: {found[flag]}"
    if "\ufffd" in text:
        return "replacement characters"
    return None
