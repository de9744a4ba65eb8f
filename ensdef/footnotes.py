"""What stands below a table: flags and failures of its records. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensdef.health.catalogue import FLAGS
from ensdef.records import Record


class Footnotes:
    """Flags and failures of a table's records, numbered in the order of the records; each kind of flag once."""

    def __init__(self, records: Sequence[Record]) -> None:
        kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for record in records:
            for flag in record.flags:
                kinds.setdefault(_kind(flag), []).append(flag)
        self._told = {kind: _told_together(flags) for kind, flags in kinds.items()}
        self.texts: list[str] = []
        for record in records:
            for text in self._of(record):
                if text not in self.texts:
                    self.texts.append(text)

    def marks(self, *records: Record) -> str:
        """`` [1] [3]``, or nothing."""
        texts = dict.fromkeys(text for record in records for text in self._of(record))
        return "".join(f" [{number}]" for number in sorted(self.texts.index(text) + 1 for text in texts))

    def add(self, text: str) -> str:
        """A footnote that no record has; its mark."""
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def _of(self, record: Record) -> list[str]:
        failure = [f"failed: {record.error}"] if record.error else []
        return [self._told[_kind(flag)] for flag in record.flags] + failure


def _kind(flag: Mapping[str, Any]) -> tuple[str, ...]:
    """What is told in one footnote: the same flag, whatever its details."""
    known = FLAGS.get(flag["flag"])
    general = known is not None and flag["meaning"].startswith(known.meaning)
    return (flag["flag"], flag["severity"], "" if general else flag["meaning"])


def _told_together(flags: Sequence[dict[str, Any]]) -> str:
    notes = list(dict.fromkeys(map(flag_note, flags)))
    if len(notes) == 1 or flags[0]["flag"] not in FLAGS:
        return "; ".join(notes)
    values = sorted(flag["value"] for flag in flags)
    first = flags[0]
    meaning = first["meaning"] if _kind(first)[2] else FLAGS[first["flag"]].meaning
    return (
        f"{first['flag']} ({first['severity']}, {_number(values[0])} to {_number(values[-1])}): {meaning}; "
        "details in the records"
    )


def flag_note(flag: dict[str, Any]) -> str:
    """A health finding as a footnote."""
    return f"{flag['flag']} ({flag['severity']}, {_number(flag['value'])}): {flag['meaning']}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.1e}"
