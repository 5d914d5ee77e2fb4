"""Figures beside their bounds, the targets they are held to, and the last word on both.

Knows tables, not how anything is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks._report import format_table

__all__ = ["TARGETS", "Figure", "Ledger", "Target"]


@dataclass(frozen=True)
class Figure:
    """One measured value and what bounds it.

    Attributes:
        section: that measured it.
        name: unique within a run; targets refer to it.
        value: in ``unit``.
        bound: the same quantity at the hardware's own speed: a floor of times, a ceiling of rates.
        num_bytes, num_operations: that the bound counts.
        is_wrong: a check that failed; the run fails with it.
    """

    section: str
    name: str
    value: float
    unit: str
    bound: float | None = None
    num_bytes: float | None = None
    num_operations: float | None = None
    note: str = ""
    is_wrong: bool = False

    @property
    def ratio(self) -> float | None:
        """How far from the bound, 1 at best, for times and for rates."""
        if not self.bound or not self.value:
            return None
        more_is_better = self.unit.endswith("/s") or self.unit == "sequences"
        return self.bound / self.value if more_is_better else self.value / self.bound


@dataclass(frozen=True)
class Target:
    """What one figure of the issue must reach, and what it should."""

    figure: str
    must: float | None
    aim: float | None
    better: Literal["lower", "higher"] = "lower"
    published: str = ""

    def is_met(self, value: float, limit: float) -> bool:
        return value <= limit if self.better == "lower" else value >= limit


_SHORT = "156 positions + 102 frames"

TARGETS = (
    Target("step B=1 ctx=800", 2.4, 1.7, published="5.8 ms"),
    Target("step B=64 ctx=800", 4.8, 3.4),
    Target(f"audio, 64 streams, {_SHORT}", 450, 770, "higher", "150-212"),
    Target(f"audio, 128 streams, {_SHORT}", 600, 1000, "higher", "287-299, 8 processes"),
    Target(f"audio, 256 streams, {_SHORT}", 600, 1000, "higher", "287-299, 8 processes"),
    Target("first audio p95, 1 stream, cached voice", 70, 42, published="109-176 ms at <= 16"),
    Target("first audio p95, 64 streams, cached voice", 150, 95, published="109-176 ms at <= 16"),
    Target("underruns, 128 streams, cached voice", 0, 0),
    Target("streamed audio against one decode, largest difference", 1e-4, 0),
    Target("requests that differ from their solo run", 0, 0),
    Target("step B=1 ctx=800 fp8", None, 1.0),
    Target("step B=64 ctx=800 fp8", None, 1.8),
    Target("sequences of 1,050 positions in 24e9 bytes", 64, 78, "higher"),
    Target("sequences of 1,050 positions in 24e9 bytes fp8", None, 150, "higher"),
)


@dataclass
class Ledger:
    """All figures of a run, in the order in which they came."""

    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out, and why
    failures: list[str] = field(default_factory=list)  # sections that broke

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Ledger:
        """What ``as_json`` wrote of an earlier run, to go on with."""
        figures = []
        for each in written["figures"]:
            fields = {name: value for name, value in each.items() if name != "ratio"}
            figures.append(Figure(**fields))
        return cls(figures, [*written["notes"]], [*written["failures"]])

    def of(self, section: str) -> list[Figure]:
        return [figure for figure in self.figures if figure.section == section]

    def find(self, name: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.name == name), None)

    def table(self, figures: Sequence[Figure]) -> str:
        """Figures beside their bounds, with the bytes and operations that these count."""
        rows = [
            [
                *(each.name, each.value, each.unit, each.bound, each.ratio),
                None if each.num_bytes is None else each.num_bytes / 1e9,
                None if each.num_operations is None else each.num_operations / 1e9,
                ("WRONG " if each.is_wrong else "") + each.note,
            ]
            for each in figures
        ]
        header = ["figure", "value", "unit", "bound", "ratio", "GB", "Gop", "note"]
        return format_table(header, rows)

    def targets_table(self) -> str:
        """Every target with its figure beside the floor."""
        rows = []
        for target in TARGETS:
            figure = self.find(target.figure)
            value = None if figure is None else figure.value
            bounds = (None, None) if figure is None else (figure.bound, figure.ratio)
            rows.append(
                [
                    *(target.figure, value, *bounds, target.must, target.aim),
                    self._word(target),
                    target.published,
                ]
            )
        header = ["target", "value", "bound", "ratio", "must", "aim", "", "best published"]
        return format_table(header, rows)

    def verdict(self, *, is_toy: bool) -> tuple[str, bool]:
        """The last line, and whether nothing is wrong."""
        words = [self._word(target) for target in TARGETS if target.must is not None]
        wrong = [figure.name for figure in self.figures if figure.is_wrong]
        problems = [*self.failures, *wrong]
        if is_toy:
            line = "FAIL" if problems else "RAN"
            return f"{line}: toy sizes, targets do not apply{_listed(problems)}", not problems
        num_met = sum(word in ("met", "aim met") for word in words)
        num_missed = words.count("missed")
        num_open = words.count("not measured")
        line = "FAIL" if problems or num_missed else "INCOMPLETE" if num_open else "PASS"
        counts = (
            f"{num_met} of {len(words)} musts met, {num_missed} missed, {num_open} not measured"
        )
        return f"{line}: {counts}{_listed(problems)}", line != "FAIL"

    def as_json(self) -> dict[str, Any]:
        """Everything, with targets and their outcome."""
        return {
            "figures": [asdict(each) | {"ratio": each.ratio} for each in self.figures],
            "targets": [asdict(each) | {"outcome": self._word(each)} for each in TARGETS],
            "notes": self.notes,
            "failures": self.failures,
        }

    def _word(self, target: Target) -> str:
        figure = self.find(target.figure)
        if figure is None:
            return "not measured"
        if target.aim is not None and target.is_met(figure.value, target.aim):
            return "aim met"
        if target.must is None:
            return "aim missed"
        return "met" if target.is_met(figure.value, target.must) else "missed"


def _listed(problems: Sequence[str]) -> str:
    return f"; wrong: {', '.join(problems)}" if problems else ""
