"""From measurements to verdicts.

A notebook hands `Sample` (values with the labels of their units) or `Exact` numbers to
`Replication.claim`. A run keeps the points of every test in evidence.csv; `judge` turns them and the
record into verdicts, without running anything. How and why: README, "How a verdict is made".
"""

from reattend.evidence.samples import Exact, Sample

__all__ = ["Exact", "Sample"]
