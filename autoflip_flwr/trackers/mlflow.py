"""Write a run for MLflow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoflip_flwr.trackers.hook import Hook, Round, Setting
from autoflip_flwr.trackers.packages import require

SQLITE = "sqlite:///"
LONGEST = 500
"""Characters of a setting. MLflow refuses longer ones; how long depends on its version and store."""


class MLflow(Hook):
    """Logs a run's values and totals as metrics and its settings as parameters to MLflow.

    The client alone is needed, which ``mlflow-skinny`` has. The pages that show the runs are in ``mlflow``:
    ``mlflow ui --backend-store-uri sqlite:///mlflow.db``.

    Parameters
    ----------
    uri : str
        The tracking server, or a database such as ``"sqlite:///mlflow.db"``, whose folder is made. Default: the
        environment's ``MLFLOW_TRACKING_URI``, else that database.
    experiment : str (default: "autoflip")
        The experiment, made if it is not there.
    name : str or None
        Of the run. A resumed run goes on in the experiment's last run of this name; without a name it makes another,
        which begins after the last finished round.

    Raises
    ------
    ModuleNotFoundError
        If neither the package ``mlflow-skinny`` nor ``mlflow`` is installed.
    """

    def __init__(self, uri: str = "", *, experiment: str = "autoflip", name: str | None = None) -> None:
        require("mlflow")
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
        self.experiment, self.name = experiment, name
        self._client: Any = None
        self._run = ""
        self._last = -1  # the last round that the run has

    def began(self, settings: Mapping[str, Setting], after: int) -> None:
        """Begin a run, or go on with that of the same name."""
        if self.uri.startswith(SQLITE):
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # what is kept here alone stays here
            Path(self.uri.removeprefix(SQLITE)).absolute().parent.mkdir(parents=True, exist_ok=True)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = client = MlflowClient(self.uri)
        found = client.get_experiment_by_name(self.experiment)
        experiment = client.create_experiment(self.experiment) if found is None else found.experiment_id
        self._last = -1
        if after and self.name is not None and (earlier := self._earlier(experiment)):
            self._run = earlier
            client.update_run(earlier, status="RUNNING")
            self._last = max((each.step for each in client.get_metric_history(earlier, "density")), default=-1)
            return
        self._run = client.create_run(experiment, run_name=self.name).info.run_id
        params = [Param(_key(name), str(value)[:LONGEST]) for name, value in settings.items()]
        for begin in range(0, len(params), 100):  # as many as MLflow takes at once
            client.log_batch(self._run, params=params[begin : begin + 100])

    def round(self, round_: Round) -> None:
        """Log the round's values, unless the run has them."""
        if round_.number > self._last:
            self._log(round_.values, round_.number)
            self._last = round_.number

    def ended(self, totals: Mapping[str, float], failure: str) -> None:
        """Log the totals, and end the run."""
        self._log({f"total/{name}": value for name, value in totals.items()}, max(self._last, 0))
        if failure:
            self._client.set_tag(self._run, "failure", failure)
        self._client.set_terminated(self._run, "FAILED" if failure else "FINISHED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(_key(name), value, now, step) for name, value in values.items()])

    def _earlier(self, experiment: str) -> str:
        """Return the id of the experiment's last run of this name; "" if it has none."""
        runs = (each.info for each in self._client.search_runs([experiment]))  # the newest first
        return next((str(each.run_id) for each in runs if each.run_name == self.name), "")


def _key(name: str) -> str:
    """Return a name with the characters that MLflow allows alone."""
    return re.sub(r"[^\w\-. /]", "_", name)
