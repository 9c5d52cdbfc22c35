"""Tables on the terminal: statistics, findings, differences.

In: plain values. Out: text on stdout.
"""

from __future__ import annotations

from typing import Any

from higgs_tune.inspect.diff import SetDiff
from higgs_tune.inspect.show import WIDE, isolated, open_console
from higgs_tune.inspect.verify.diagnose import Finding
from higgs_tune.inspect.verify.verify import Verdict
from higgs_tune.inspect.view import printable
from rich.console import Console
from rich.table import Table
from rich.text import Text

MOST_ROWS = 50
SIZES = ("B", "kB", "MB", "GB", "TB")


def print_statistics(numbers: dict[str, Any], notes: list[str]) -> None:
    """Print the output of `statistics`, then the notes."""
    console = open_console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(2):
        facts.add_column(overflow="fold")
    for name, value in numbers.items():
        if not isinstance(value, dict):
            facts.add_row(_title(name), Text(_readable(name, value)))
        elif not name.endswith("percentiles") and name != "code_usage":
            items = [f"{_name(name, key)} {_readable(name, item)}" for key, item in list(value.items())[:MOST_ROWS]]
            more = f", and {len(value) - MOST_ROWS} more (--json lists all)" if len(value) > MOST_ROWS else ""
            facts.add_row(_title(name), Text(", ".join(items) + more if items else "none"))
    console.print(facts)
    wide = open_console(WIDE)
    rows = {name: value for name, value in numbers.items() if name.endswith("percentiles") and value}
    lengths = Table("percentile", *next(iter(rows.values()), {}), box=None, pad_edge=False)
    for name, value in rows.items():
        lengths.add_row(_title(name.removesuffix("_percentiles")), *(f"{item:,.6g}" for item in value.values()))
    wide.print(lengths)
    usage = numbers["code_usage"]
    books = Table("codebook", *(str(k) for k in range(len(usage["dead_codes"]))), box=None, pad_edge=False)
    books.add_row("entropy, bits", *(f"{bits:.3f}" for bits in usage["entropy_bits"]))
    books.add_row(f"dead codes of {usage['codebook_size']}", *map(str, usage["dead_codes"]))
    wide.print(books)
    for note in notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _title(name: str) -> Text:
    return Text(name.replace("_", " "))


def _name(group: str, name: str) -> str:
    return isolated(printable(name)) if group in ("speakers", "rejects") else name.replace("_", " ")


def _readable(name: str, value: Any) -> str:
    if name.endswith("bytes"):
        return _bytes(value)
    if isinstance(value, float):
        return f"{value:.1%}" if name in ("label_shares", "pack_fill") else f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _bytes(count: int) -> str:
    size, power = float(count), 0
    while size >= 1000 and power < len(SIZES) - 1:
        size, power = size / 1000, power + 1
    return f"{size:.4g} {SIZES[power]}"


def print_verdict(verdict: Verdict) -> None:
    """Print the findings of `verify`, one line each, then the notes and the sum."""
    console = open_console()
    if verdict.findings:
        for finding in verdict.findings[:MOST_ROWS]:
            console.print(Text(_finding_line(finding)), soft_wrap=True)
        if len(verdict.findings) > MOST_ROWS:
            console.print(Text(f"and {len(verdict.findings) - MOST_ROWS} more: --json lists all"))
    for note in verdict.notes:
        console.print(Text(f"note: {printable(note)}"), soft_wrap=True)
    size = f"{verdict.samples:,} samples in {len(verdict.results)} shards"
    kinds = ", ".join(f"{count} {kind}" for kind, count in verdict.kinds.items())
    total = f"{len(verdict.findings)} findings: {kinds}" if verdict.findings else "nothing is wrong"
    console.print(Text(f"{size} ({verdict.seconds:.1f} s): {total}", "bold"), soft_wrap=True)


def _finding_line(finding: Finding) -> str:
    place = [finding.file]
    place += [f"key {isolated(printable(finding.key))}"] if finding.key else []
    place += [f"offset {finding.offset}"] if finding.offset is not None else []
    return f"{finding.kind}  {', '.join(place)}: {isolated(printable(finding.detail))}"


def print_diff(difference: SetDiff) -> None:
    """Print the differences between two sets."""
    console = open_console()
    for name, text in difference.provenance.items():
        console.print(Text(f"{name}: {printable(text)}"), soft_wrap=True)
    for mark, keys in (("added", difference.added), ("removed", difference.removed)):
        for key in keys[:MOST_ROWS]:
            console.print(Text(f"{mark}  {key}"))
        _more(console, len(keys))
    for change in difference.changed[:MOST_ROWS]:
        parts = "; ".join(f"{name}: {isolated(printable(text))}" for name, text in change.parts.items())
        console.print(Text(f"changed  {change.key}  {parts}"), soft_wrap=True)
    _more(console, len(difference.changed))
    counts = (len(difference.added), len(difference.removed), len(difference.changed), difference.same)
    console.print(Text("{:,} added, {:,} removed, {:,} changed, {:,} the same".format(*counts), "bold"))


def _more(console: Console, count: int) -> None:
    if count > MOST_ROWS:
        console.print(Text(f"and {count - MOST_ROWS} more: --json lists all"))
