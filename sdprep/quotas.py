"""How many validation images: of all, and of each stratum. Integers and exact decimals only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from sdprep.errors import UserError
from sdprep.seeding import integer

AUTOMATIC_LARGEST = 2048
AUTOMATIC_SMALL_SET = 8


@dataclass(frozen=True)
class Wanted:
    """How much validation is asked for; neither means automatic.

    Args:
        share: of the images, 0 <= share < 1, as an exact decimal.
        count: of images, >= 0.
    """

    share: Decimal | None = None
    count: int | None = None

    @property
    def mode(self) -> str:
        """One of none, proportion, count, automatic."""
        if self.share == 0 or self.count == 0:
            return "none"
        if self.share is not None:
            return "proportion"
        return "automatic" if self.count is None else "count"

    def size(self, num_images: int) -> int:
        """Validation images among `num_images`; at least 1 and never all, rounding half up."""
        if self.mode == "none" or num_images < 2:
            return 0
        if self.share is not None:
            top, bottom = self.share.as_integer_ratio()
            size = (2 * num_images * top + bottom) // (2 * bottom)
        elif self.count is not None:
            size = self.count
        else:
            twentieth, three = (num_images + 10) // 20, (3 * num_images + 10) // 20
            size = min(AUTOMATIC_LARGEST, max(twentieth, min(AUTOMATIC_SMALL_SET, three)))
        return max(1, min(size, num_images - 1))


def exact_share(value: str | float | Decimal) -> Decimal:
    """A share as the decimal that was typed: 0.58 is 58/100, not the nearest binary fraction.

    Raises:
        UserError: it is no number, negative, or 1 and more.
    """
    try:
        share = Decimal(str(value))
    except InvalidOperation:
        share = Decimal("NaN")
    if not share.is_finite() or not 0 <= share < 1:
        raise UserError(
            f"validation share {value} must be at least 0 and below 1",
            "0.05 is 5 %; 0 is none; for a number of images use the validation count.",
        )
    return share


def largest_remainder(total: int, weights: Mapping[str, int], seed: int) -> dict[str, int]:
    """Share `total` out in proportion to whole-number weights, in integers.

    Args:
        total: at most the sum of the weights; then no share passes its weight.
        weights: name to weight, >= 0.
        seed: of the draw between equal remainders.
    """
    whole = sum(weights.values())
    if not whole:
        return dict.fromkeys(weights, 0)
    shares = {name: total * weight // whole for name, weight in weights.items()}
    left = total - sum(shares.values())

    def order(name: str) -> tuple[int, int, str]:
        return -(total * weights[name] % whole), integer(seed, "stratum", name), name

    for name in sorted(weights, key=order)[:left]:
        shares[name] += 1
    return shares
