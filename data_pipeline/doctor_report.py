"""Says in words what the doctor found: what hurts first, ten of a kind and how to mend them, then the sum."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from data_pipeline.doctor import Diagnosis
from data_pipeline.findings import HURTS, KINDS, NOTE, Finding

SHOWN, MENDS_SHOWN = 10, 3  # of a kind
HEADINGS = {HURTS: "What would hurt:", NOTE: "Worth knowing:"}


def content_of(diagnosis: Diagnosis) -> dict[str, Any]:
    """The same for machines, as the fields of a JSON object."""
    findings = [finding.as_json() for finding in diagnosis.findings]
    return {"dataset": diagnosis.dataset, "checked": asdict(diagnosis.checked), "findings": findings}


def report_lines(diagnosis: Diagnosis, *, width: int | None, seconds: float) -> Iterator[str]:
    """The report, wrapped to `width` letters unless that is None."""
    yield from finding_lines(diagnosis.findings, KINDS, width=width)
    yield from _sum_lines(diagnosis, seconds)


def finding_lines(findings: Sequence[Finding], kinds: Iterable[str], *, width: int | None) -> Iterator[str]:
    """What hurts, then what is worth knowing, each in the order of `kinds`."""
    for severity, heading in HEADINGS.items():
        found = [one for one in findings if one.kind.severity == severity]
        if not found:
            continue
        yield heading
        for code in kinds:
            if of_kind := [one for one in found if one.code == code]:
                yield f"  {code}"
                yield from _kind_lines(of_kind, width)
        yield ""


def _kind_lines(found: list[Finding], width: int | None) -> Iterator[str]:
    for one in found[:SHOWN]:
        yield _wrapped(_line(one), width)
    if more := sum(one.count for one in found[SHOWN:]):
        yield f"    and {more:,} more"
    for mend in list(dict.fromkeys(one.mend for one in found[:SHOWN]))[:MENDS_SHOWN]:
        yield _wrapped(f"-> {mend}", width)


def _wrapped(line: str, width: int | None) -> str:
    if width is None:
        return f"    {line}"
    return textwrap.fill(
        line,
        max(width, 40),
        initial_indent="    ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _line(finding: Finding) -> str:
    """Where and what; a name in a stranger's tar may hold what would steer a terminal, so it is quoted."""
    place = finding.shard
    if finding.key:
        place += f" {finding.key!r}"
    if finding.offset is not None:
        place += f" at byte {finding.offset:,}"
    line = f"{place}: {finding.what}" if place else finding.what
    if finding.kind.of_many:
        line = f"{finding.what}, the first is {place}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def _sum_lines(diagnosis: Diagnosis, seconds: float) -> Iterator[str]:
    checked = diagnosis.checked
    if checked.bad_samples:
        yield f"training would skip {checked.bad_samples:,} of {checked.samples:,} samples"
    if checked.decoded < checked.samples:
        yield f"{checked.decoded:,} of {checked.samples:,} samples were decoded"
    samples = _counted(checked.samples, "sample", "samples")
    shards = _counted(checked.shards, "shard", "shards")
    yield f"{samples} in {shards} checked in {_duration(seconds)}: {sum_of(diagnosis.findings)}"


def sum_of(findings: Sequence[Finding]) -> str:
    """How much was found, in words."""
    hurts, notes = (
        sum(one.count for one in findings if one.kind.severity == severity) for severity in HEADINGS
    )
    found = [_counted(hurts, "finding that hurts", "findings that hurt")] if hurts else []
    found += [_counted(notes, "note", "notes")] if notes else []
    return ", ".join([*([] if hurts else ["nothing that hurts was found"]), *found])


def _counted(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
