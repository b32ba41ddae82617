"""Tables for pages: the paper's numbers joined to ours where both name the same rows."""

from __future__ import annotations

from reattend.findings import Run, Table
from reattend.records import Record, ReportedTable


def tables(record: Record, run: Run) -> tuple[list[Table], list[Table]]:
    """A run's tables with the reported ones joined to them, and the reported ones that fit none.

    A reported table is joined to the table with which it shares most names in the first column, two at
    least, unless that one holds reported numbers already.
    """
    ours = [table for table in run.tables if "reported" not in table.name]
    rest = []
    for reported in reported_tables(record):
        shared = [_shared(table, reported) for table in ours]
        most = max(shared, default=0)
        if most < 2:
            rest.append(reported)
        else:
            number = shared.index(most)
            ours[number] = _joined(ours[number], reported)
    return ours, rest


def reported_tables(record: Record) -> list[Table]:
    """The paper's own numbers."""
    return [_as_table(name, table) for name, table in record.reported.items()]


def _as_table(name: str, table: ReportedTable) -> Table:
    rows = tuple(tuple("" if c is None else str(c) for c in row) for row in table.rows)
    return Table(name, table.source, tuple(table.columns), rows)


def _names(table: Table) -> list[str]:
    return [row[0].casefold().strip() for row in table.rows]


def _shared(table: Table, reported: Table) -> int:
    own = " ".join(table.columns)
    names = _names(table)
    if "reported" in own or "paper" in own or len(set(names)) < len(names):
        return 0
    return len(set(names) & set(_names(reported)))


def _joined(table: Table, reported: Table) -> Table:
    """Our rows with the reported columns behind them, then the rows that only the paper has."""
    theirs = {name: row[1:] for name, row in zip(_names(reported), reported.rows, strict=True)}
    empty = ("",) * (len(reported.columns) - 1)
    rows = [
        (*row, *theirs.get(name, empty))
        for name, row in zip(_names(table), table.rows, strict=True)
    ]
    known = set(_names(table))
    blank = ("",) * (len(table.columns) - 1)
    rows += [
        (row[0], *blank, *row[1:])
        for row in reported.rows
        if row[0].casefold().strip() not in known
    ]
    columns = (*table.columns, *(f"{name}, reported" for name in reported.columns[1:]))
    caption = f"{table.caption}. Reported: {reported.caption}"
    return Table(table.name, caption, columns, tuple(rows))
