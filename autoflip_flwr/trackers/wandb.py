"""Write a run for Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoflip_flwr.trackers.hook import Hook, Round, Setting
from autoflip_flwr.trackers.packages import require

UPLOAD = 120.0
"""Seconds that the end of a run waits for an upload. What is not uploaded by then is on the disk."""


class WandB(Hook):
    """Logs a run's values, settings (as the config) and totals (in the summary) to Weights & Biases.

    Parameters
    ----------
    project : str (default: "autoflip")
        The project.
    folder : str or Path (default: ".")
        Where W&B makes its own folder ``wandb``.
    mode : str or None
        ``"offline"``: into the folder alone, and nothing goes over the network; ``wandb sync`` uploads it later.
        ``"online"``: uploaded as well. Default: as the environment's ``WANDB_MODE`` says, else online if it has
        ``WANDB_API_KEY``, else offline.
    options : Any
        Anything else that ``wandb.init`` takes, such as ``name``, ``entity`` or ``id``. A resumed run goes on in the
        W&B run of the same ``id``; without one it makes another W&B run, which begins after the last finished round.

    Raises
    ------
    ModuleNotFoundError
        If the package ``wandb`` is not installed.
    """

    def __init__(
        self, project: str = "autoflip", *, folder: str | Path = ".", mode: str | None = None, **options: Any
    ) -> None:
        require("wandb")
        self.project, self.folder, self.mode, self.options = project, Path(folder), mode, options
        self._run: Any = None

    @property
    def resolved_mode(self) -> str:
        """The mode, or what the environment says."""
        found = self.mode or os.environ.get("WANDB_MODE")
        return found or ("online" if os.environ.get("WANDB_API_KEY") else "offline")

    def began(self, settings: Mapping[str, Setting], after: int) -> None:
        """Begin a W&B run beside those that the process may have."""
        mode = self.resolved_mode
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B reports its own errors even then
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        own = {
            "project": self.project,
            "dir": str(self.folder),
            "mode": mode,
            "config": dict(settings),
            "reinit": "create_new",
            "resume": "allow" if after and mode == "online" and "id" in self.options else None,
            "settings": wandb.Settings(console="off", silent=True, finish_timeout=UPLOAD),
        }
        self._run = wandb.init(**{**own, **self.options})

    def round(self, round_: Round) -> None:
        """Log the round's values."""
        self._run.log(dict(round_.values), step=round_.number)

    def ended(self, totals: Mapping[str, float], failure: str) -> None:
        """Write the totals into the summary, and finish the W&B run."""
        self._run.summary.update({f"total/{name}": value for name, value in totals.items()})
        if failure:
            self._run.summary.update({"failure": failure})
        self._run.finish(exit_code=1 if failure else 0)
