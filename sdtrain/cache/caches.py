"""The caches of one run: what is kept, where, and why something is not."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from sdprep.errors import UserError
from sdprep.prompts import render_prompt
from sdtrain.cache.encoding import Encoder, names_of
from sdtrain.cache.keys import latents_kind, text_kind
from sdtrain.cache.reading import Kept, StoredReader
from sdtrain.cache.store import EntryStore, require_lance

if TYPE_CHECKING:
    from sdtrain.setup import Setup

LATENTS, TEXT = "latents.lance", "text.lance"
TEXT_ENCODER = "text_encoder"
"""How the canonical names of text encoders begin."""

_LOOKED_AT_ROWS = 32
_LOOKED_AT_VISITS = 64
_FEW_TEXTS = 16


class Caches:
    """What the recipe keeps of latents and text.

    Args:
        setup: the run.

    Raises:
        UserError: text is to be kept although an encoder trains or texts never repeat, or Lance is
            missing.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup, self.section = setup, setup.recipe.cache
        self.folder = self.section.folder(setup.recipe.output)
        if self.section.is_wanted:
            require_lance()
        self.text_rules = training_rules(setup)
        self.why_no_text = ""
        if self.section.text:
            self.why_no_text = self._why_no_text()
            if self.why_no_text and self.section.text is True:
                raise UserError(
                    f"cache.text = true, but {self.why_no_text}",
                    'Set cache.text = "auto" to keep text only where that can work, or false. '
                    "Text is fixed without shuffled tags (prompt.shuffle = false, "
                    'prompt.length.law = "all") and score tags (prompt.score.position = "none").',
                )

    @cached_property
    def latents(self) -> Kept | None:
        """The cache of pictures. Its name depends on the VAE as it is now."""
        if not self.section.latents:
            return None
        kind = latents_kind(self._setup.family, self.section)
        return Kept(EntryStore(self.folder / LATENTS), kind, names_of(self.section))

    @cached_property
    def text(self) -> Kept | None:
        """The cache of prompts. Its name depends on the encoders as they are now."""
        if not self.section.text or self.why_no_text:
            return None
        kind = text_kind(self._setup.family, self.section)
        return Kept(EntryStore(self.folder / TEXT), kind)

    def reader(self) -> StoredReader:
        """What the loader's workers look up."""
        return StoredReader(self.latents, self.text)

    def encoder(self) -> Encoder:
        """What encodes the rest."""
        setup = self._setup
        return Encoder(
            setup.family,
            self.section,
            seed=setup.recipe.seed,
            device=setup.device,
            latents=self.latents,
            text=self.text,
            text_trains=bool(self.text_rules),
        )

    def _why_no_text(self) -> str:
        if self.text_rules:
            return f"a text encoder trains, by the rule {', '.join(map(repr, self.text_rules))}"
        return _texts_never_repeat(self._setup)


def training_rules(setup: Setup) -> list[str]:
    """The rules by which text encoders train at any time of the run."""
    rows = setup.plan.rows
    found = [row.rule for row in rows if row.part.startswith(TEXT_ENCODER) and row.num_trained]
    return list(dict.fromkeys(found))


def _texts_never_repeat(setup: Setup) -> str:
    """Which row shows that nearly every visit draws a new text; empty where texts repeat."""
    seed, data = setup.recipe.seed, setup.data
    sources = [("the prompt policy", data.train, setup.train.kept, data.policy)]
    if setup.prior is not None:
        prior = setup.prior
        whose = "the policy of [prior], which prior.caption would end and [prompt] does not touch,"
        sources.append((whose, prior.texts, prior.assignment.kept, prior.data.policy))
    for whose, rows, kept, policy in sources:
        for record in rows.records(kept[:_LOOKED_AT_ROWS].tolist()):
            texts = {
                render_prompt(record, policy, seed, visit).text
                for visit in range(_LOOKED_AT_VISITS)
            }
            if len(texts) > _FEW_TEXTS:
                return (
                    f"{whose} draws new texts: image {record['id']} gets {len(texts)} "
                    f"different ones in {_LOOKED_AT_VISITS} visits"
                )
    return ""
