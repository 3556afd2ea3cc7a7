"""Keyed randomness: every draw is a pure function of named parts, never of ambient state.

A key is the parts' UTF-8 text joined by U+001F, hashed with blake2b. The same parts give the same
draw in any process, on any platform, in any order.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SEPARATOR = "\x1f"


def key_text(*parts: object) -> bytes:
    """The bytes that are hashed for `parts`."""
    return SEPARATOR.join(str(part) for part in parts).encode("utf-8")


def integer(*parts: object) -> int:
    """A 64-bit unsigned integer keyed by `parts`."""
    return int.from_bytes(blake2b(key_text(*parts), digest_size=8).digest(), "big")


def uniform(*parts: object) -> float:
    """A float in [0, 1) with 53 random bits, keyed by `parts`."""
    return (integer(*parts) >> 11) * 2.0**-53


def rng_for(*parts: object) -> np.random.Generator:
    """A numpy generator of its own for `parts`, such as `(seed, "crop", sample_id, visit)`."""
    import numpy as np

    digest = blake2b(key_text(*parts), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))


def digest(*parts: object) -> str:
    """Hex of a 128-bit blake2b over `parts`: for fingerprints and certificates."""
    return blake2b(key_text(*parts), digest_size=16).hexdigest()
