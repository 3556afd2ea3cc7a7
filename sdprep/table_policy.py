"""The prompt policy of the recipe that a table was last prepared with, kept in the table itself.

So the preview, publishing and training on the table agree without being told again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sdprep.prompt_policy import PromptPolicy
from sdprep.recipe import validate

if TYPE_CHECKING:
    from sdprep.table import PhotoTable

KEY = "sdprep.policy"


def remember_policy(table: PhotoTable, policy: PromptPolicy) -> None:
    """Keep a policy in the table; nothing is written if it is there already.

    Args:
        table: its lock is taken.
        policy: what it sets explicitly is kept, so that defaults stay defaults.
    """
    text = json.dumps(policy.model_dump(mode="json", exclude_unset=True), sort_keys=True)
    if _kept(table) == text:
        return
    with table.writer():
        table.dataset.update_schema_metadata({KEY: text})
        table.refresh()


def policy_of(table: PhotoTable) -> PromptPolicy | None:
    """The policy that a table keeps; None if no recipe was run on it."""
    text = _kept(table)
    if text is None:
        return None
    return validate(json.loads(text), PromptPolicy, f"{table.path}, the policy kept in it")


def _kept(table: PhotoTable) -> str | None:
    found = (table.schema.metadata or {}).get(KEY.encode())
    return None if found is None else str(found.decode())
