"""What one run of ingest did, and the error for a source that is mostly unusable."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sdprep.errors import DataError
from sdprep.source_item import Finding


@dataclass
class IngestReport:
    """What one run of ingest did.

    `found = added + already_present + rejected`. `rejected` counts files whose verdict is a
    rejection, also where it was reached in an earlier run; `rejects` lists them.
    """

    source: str
    storage: str = "embed"
    found: int = 0
    added: int = 0
    already_present: int = 0
    rejected: int = 0
    ignored: int = 0
    updated: int = 0  # rows whose text was edited beside an unchanged image
    superseded: int = 0  # rows whose only file holds another image now
    gone: int = 0  # files of earlier runs that are not there any more; their rows stay
    rejects: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    ignored_by_kind: dict[str, int] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)  # kind → keys

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)

    def reject(self, key: str, reason: str) -> None:
        """Count and list one rejected file."""
        self.rejected += 1
        self.rejects.append({"source_key": key, "reason": reason})

    def warn(self, kind: str, key: str) -> None:
        """Note a warning about one file."""
        self.warnings.setdefault(kind, []).append(key)

    def note(self, finding: Finding) -> None:
        """Count and list what the source met."""
        if finding.level == "missing":
            self.found += 1
            self.reject(finding.key, finding.kind)
        elif finding.level == "warning":
            self.warn(finding.kind, finding.key)
        else:
            self.ignored += 1
            self.ignored_by_kind[finding.kind] = self.ignored_by_kind.get(finding.kind, 0) + 1
            if finding.level == "skipped":
                self.skipped.append({"source_key": finding.key, "reason": finding.kind})


class TooManyRejected(DataError):
    """More of a source is unusable than `max_rejected_share` allows; `report` says what."""

    def __init__(self, report: IngestReport, num_bad: int, num_files: int, share: float) -> None:
        reasons: dict[str, list[str]] = {}
        for entry in report.rejects:
            reasons.setdefault(entry["reason"], []).append(entry["source_key"])
        lines = [f"  {len(keys):>6} {kind}: {some(keys)}" for kind, keys in reasons.items()]
        super().__init__(
            f"{num_bad} of {num_files} files of {report.source} are unusable, "
            f"more than the allowed {share:.0%}:\n" + "\n".join(lines),
            "The good ones seen so far are in the table. If this is as it should be, "
            "allow it with --max-rejected 1.0.",
        )
        self.report = report


def some(keys: list[str], count: int = 3) -> str:
    """The first few of a list, for a message."""
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
