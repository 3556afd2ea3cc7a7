"""What was cut off the prompts that a run trained: counted at every step, never silent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from sdprep.console import warn
from sdtrain.buckets import Slot, Step


@dataclass
class CutText:
    """Counts of a whole run; all of them are of samples, so a prompt counts at every visit.

    Args:
        prompts: how many lost something, for either reason.
        shortened: how many lost whole tags or words, so that they fit `prompt.max_chunks`.
        units: those tags and words.
        truncated: how many are longer than `model.max_chunks`, so that the model reads a part.
        tokens: what it does not read.
    """

    prompts: int = 0
    shortened: int = 0
    units: int = 0
    truncated: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, slots: Iterable[Slot]) -> CutText:
        """The counts of some samples."""
        texts = [slot.text for slot in slots if slot.text.num_removed or slot.text.num_cut]
        return cls(
            prompts=len(texts),
            shortened=sum(text.num_removed > 0 for text in texts),
            units=sum(text.num_removed for text in texts),
            truncated=sum(text.num_cut > 0 for text in texts),
            tokens=sum(text.num_cut for text in texts),
        )

    def take(self, step: Step) -> dict[str, dict[str, int]]:
        """Count one step; the first time that something is cut it is told.

        Returns:
            `cut_text` for the step's line of the metrics; nothing where nothing was cut.
        """
        found = CutText.of(step.slots)
        if not found.prompts:
            return {}
        if not self.prompts:
            first = next(s for s in step.slots if s.text.num_removed or s.text.num_cut)
            warn(f"prompts are cut, {first.sample_id} first: {found.sentence(len(step.slots))}")
        for name, count in asdict(found).items():
            setattr(self, name, getattr(self, name) + count)
        return {"cut_text": asdict(found)}

    def sentence(self, num_samples: int) -> str:
        """The counts in words.

        Args:
            num_samples: among how many.
        """
        parts = []
        if self.shortened:
            parts.append(
                f"{self.shortened:,} lost {self.units:,} tags or words to prompt.max_chunks"
            )
        if self.truncated:
            parts.append(
                f"{self.truncated:,} have {self.tokens:,} tokens beyond model.max_chunks, "
                "which are not read"
            )
        return f"of {num_samples:,} prompts {' and '.join(parts) or 'none is cut'}"

    def to_json(self) -> dict[str, int]:
        """As checkpoints and `--json` hold it."""
        return asdict(self)
