"""Check what the replies of a round must have in common: their records, and the metrics that Flower averages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from logging import WARNING

from flwr.app import Message, MetricRecord, RecordDict
from flwr.common.logger import log


class Likeness:
    """Compares the replies of a round, and remembers the usual records of earlier rounds.

    Parameters
    ----------
    averaged : Collection[str]
        Phases whose metrics are averaged by Flower's own mean.
    """

    def __init__(self, averaged: Collection[str]) -> None:
        self._averaged = averaged
        self._usual: dict[str, tuple[str, ...]] = {}  # names of a reply's records, by phase
        self._warned: set[str] = set()  # names of metrics

    def unlike(self, replies: Collection[Message], phase: str) -> dict[int, str]:
        """Find the nodes whose replies have other records than most, with the reason. Strategies need the same records.

        A tie is decided by the records of the round before.
        """
        names = {reply.metadata.src_node_id: tuple(sorted(reply.content)) for reply in replies}
        counts, before = Counter(names.values()), self._usual.get(phase)
        if counts:
            self._usual[phase] = max(counts, key=lambda own: (counts[own], own == before))
        return {
            node: f"its records {own} differ from most replies' {self._usual[phase]}"
            for node, own in names.items()
            if own != self._usual[phase]
        }

    def drop_disputed(self, replies: Collection[Message], phase: str, round_: int) -> None:
        """Remove the metrics over which Flower would end the run from all replies. Log this once per name."""
        found = disputed_metrics((reply.content for reply in replies), averaged=phase in self._averaged)
        for name, reason in found.items():
            if name not in self._warned:
                text = "%s, round %d: metric %r is not averaged: %s (said once; the replies count all the same)"
                log(WARNING, text, phase, round_, name, reason)
        self._warned |= found.keys()
        if found:
            for reply in replies:
                reply.content = without_metrics(reply.content, found)


def disputed_metrics(contents: Iterable[RecordDict], *, averaged: bool) -> dict[str, str]:
    """Find the metrics over which Flower would end the run.

    Flower refuses replies whose metrics differ in name. Its own mean (if ``averaged``) also fails if a metric is a
    number in one reply and a list in another, or if lists differ in length.

    Returns
    -------
    dict[str, str]
        The reason, by name of the metric.
    """
    records = [record for content in contents for record in content.metric_records.values()]
    found = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record[name] for record in records if name in record]
        sizes = {len(value) if isinstance(value, list) else None for value in values}
        if len(values) < len(records):
            found[name] = f"{len(values)} of {len(records)} replies report it"
        elif averaged and len(sizes) > 1:
            found[name] = "it is not a number in all replies, nor a list of one length"
    return found


def without_metrics(content: RecordDict, names: Collection[str]) -> RecordDict:
    """Return the content without the metrics that have these names."""
    return RecordDict(
        {
            key: MetricRecord({name: value for name, value in record.items() if name not in names})
            if isinstance(record, MetricRecord)
            else record
            for key, record in content.items()
        }
    )
