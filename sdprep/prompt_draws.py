"""Keyed draws of a rendering, fast: the hash of the common prefix is made once and copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from struct import unpack

from sdprep.seeding import SEPARATOR, key_text

UNIT = 2.0**-53
"""Distance between neighbouring draws."""


class Draws:
    """The draws of one rendering: `seeding.uniform("prompt", seed, id, visit, knob, subject…)`.

    Every decision has a key of its own, so changing one leaves all other draws unchanged.
    """

    __slots__ = ("_prefix",)

    def __init__(self, seed: int, id_: str, visit: int) -> None:
        self._prefix = blake2b(key_text("prompt", seed, id_, visit), digest_size=8)

    def uniform(self, knob: str, *subject: str) -> float:
        """A float in [0, 1)."""
        state = self._prefix.copy()
        state.update(SEPARATOR.join(("", knob, *subject)).encode())
        return (int.from_bytes(state.digest(), "big") >> 11) * UNIT

    def uniforms(self, knob: str, subjects: Iterable[str]) -> list[float]:
        """A float in [0, 1) for each subject; each equals `uniform(knob, subject)`."""
        prefix = self._prefix.copy()
        prefix.update(f"{SEPARATOR}{knob}{SEPARATOR}".encode())
        copy = prefix.copy
        digests = []
        for subject in subjects:
            state = copy()
            state.update(subject.encode())
            digests.append(state.digest())
        return [(number >> 11) * UNIT for number in unpack(f">{len(digests)}Q", b"".join(digests))]

    def ordered(self, knob: str, subjects: Sequence[str]) -> list[str]:
        """The subjects by their draw, ties by name."""
        return [name for _, name in sorted(zip(self.uniforms(knob, subjects), subjects))]  # noqa: B905


def weighted(u: float, choices: Sequence[tuple[int, float]]) -> int:
    """The choice in whose share of the weights u falls."""
    left = u * sum(weight for _, weight in choices)
    for choice, weight in choices:
        left -= weight
        if left < 0:
            return choice
    return max(choice for choice, weight in choices if weight > 0)  # rounding at u near 1
