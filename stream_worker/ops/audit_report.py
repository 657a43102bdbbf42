"""What an audit found, as figures and as a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.table import Table

from stream_worker.ops.drift import Drift

__all__ = ["AuditReport", "report_table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What an audit found; entities are named by their hash (`inspect` takes the id)."""

    view: str
    topic: str
    sampled: int
    equal: int
    unverifiable: int  # retention has taken the beginning of their log
    moving: int  # had new events each time they were looked at
    equal_share: float  # of those that could be verified
    worst_difference: float  # relative, of any recomputed value that was compared
    findings: Mapping[str, int] = field(default_factory=dict)  # "place kind": entities
    entities: Mapping[str, list[str]] = field(default_factory=dict)  # by hash
    repaired: int = 0
    not_repaired: int = 0
    drift: Drift | None = None
    seconds: float = 0.0


def report_table(report: AuditReport) -> Table:
    """What an audit found, for a terminal."""
    table = Table(show_header=False, title=f"audit of {report.view}")
    rows = [
        ("entities sampled", f"{report.sampled:,}"),
        ("equal", f"{report.equal:,} ({report.equal_share:.2%})"),
        ("unverifiable", f"{report.unverifiable:,}"),
        ("moving", f"{report.moving:,}"),
        ("worst difference", f"{report.worst_difference:.1e}"),
        *((name, f"{count:,}") for name, count in sorted(report.findings.items())),
        ("repaired", f"{report.repaired:,}, {report.not_repaired:,} not"),
    ]
    if report.drift is not None:
        rows += [
            ("drift of the embedding's mean", f"{report.drift.embedding_shift:.2f} std"),
            ("its spread, now over then", f"{report.drift.embedding_spread:.2f}"),
            *(
                (f"drift of {name}", f"{nats:+.2f} std")
                for name, nats in report.drift.surprise_shift.items()
            ),
        ]
    for row in rows:
        table.add_row(*row)
    return table
