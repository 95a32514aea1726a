"""Write a run for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoflip_flwr.trackers.hook import Hook, Round, Setting
from autoflip_flwr.trackers.packages import require


class TensorBoard(Hook):
    """Writes a run's values as scalars, and its settings and totals as text, for ``tensorboard --logdir <folder>``.

    Parameters
    ----------
    folder : str or Path (default: "logs")
        Folder of this run alone, made if it is not there. TensorBoard shows the last run that was written into it. A
        resumed run goes on in the same folder: TensorBoard shows each of its rounds once.

    Raises
    ------
    ModuleNotFoundError
        If the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: str | Path = "logs") -> None:
        require("tensorboard")
        self.folder = Path(folder)
        self._writer: Any = None

    def began(self, settings: Mapping[str, Setting], after: int) -> None:
        """Open a file of events. What the folder has of this round and of later ones is superseded."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(self.folder))
        self._write(after + 1 if after else 0, session_log=SessionLog(status=SessionLog.START))
        self._table("settings", settings, after)

    def round(self, round_: Round) -> None:
        """Write the round's values. They are on the disk when this returns."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in round_.values.items()]
        self._write(round_.number, summary=Summary(value=values))
        self._writer.flush()

    def ended(self, totals: Mapping[str, float], failure: str) -> None:
        """Write the totals, and close the file."""
        self._table("totals", {**totals, **({"failure": failure} if failure else {})}, 0)
        self._writer.close()

    def _table(self, name: str, values: Mapping[str, object], step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in values.items()]
        self._write(step, summary=text_pb(name, "\n".join(["| | |", "|---|---|", *lines])))

    def _write(self, step: int, **content: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))
