"""Report at the end of a run: the bytes that it sent, compared with those of plain FedAvg."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_ROWS = {
    "exploration": ("exploration_up", "exploration_down"),
    "masks": ("mask_down",),
    "outside them": ("base_down",),
    "training": ("train_up", "train_down"),
    "evaluation": ("evaluate_up", "evaluate_down"),
    "other": ("other",),
    "total": ("total",),
}


def lines(sent: Mapping[str, int], dense: Mapping[str, int], *, pruned: bool) -> Iterator[str]:
    """Yield the lines of the report, at most 68 characters each: a table by phase, or one line if nothing is pruned.

    Parameters
    ----------
    sent : Mapping[str, int]
        Bytes of the run, from :meth:`Ledger.bytes_by_phase() <autoflip_flwr.costs.ledger.Ledger.bytes_by_phase>`.
    dense : Mapping[str, int]
        Bytes of plain FedAvg, from :meth:`~autoflip_flwr.costs.ledger.Ledger.dense_bytes_by_phase`.
    pruned : bool
        Whether anything is pruned.
    """
    digits = 2 if sent["total"] >= 1e6 else 4
    if not pruned:
        yield f"sent {sent['total'] / 1e6:.{digits}f} MB, {saving(sent['total'], dense['total'])}; see strategy.ledger"
        return
    yield f"{'MB sent':<12} {'AutoFLIP':>11} {'dense':>11}"
    for name, keys in _ROWS.items():
        ours, theirs = (sum(table.get(key, 0) for key in keys) for table in (sent, dense))
        if ours or theirs:
            beside = f"{theirs / 1e6:>12.{digits}f}" if theirs else ""
            end = f"   {saving(ours, theirs)}" if name == "total" else ""
            yield f"{name:<12} {ours / 1e6:>11.{digits}f}{beside}{end}"
    yield "MB are 10^6 bytes; more in strategy.ledger.bytes_by_phase()"


def saving(sent: int, dense: int) -> str:
    """Return the share of bytes that was saved, or sent in addition, compared with dense messages, as text."""
    if not dense:
        return "no rounds"
    share = 100 * (1 - sent / dense)
    return f"{share:.1f} % saved" if share >= 0 else f"{-share:.1f} % more than dense"
