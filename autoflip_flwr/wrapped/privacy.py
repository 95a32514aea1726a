"""Support Flower's differential-privacy wrappers: refuse what would break them, and track the budget spent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

from autoflip_flwr.wrapped import traits

ADAPTIVE = DifferentialPrivacyClientSideAdaptiveClipping | DifferentialPrivacyServerSideAdaptiveClipping
WRAPPERS = ADAPTIVE | DifferentialPrivacyClientSideFixedClipping | DifferentialPrivacyServerSideFixedClipping

RELATIONS = {"add-or-remove-one": 1.0, "replace-one": 2.0}
"""The most that one client can change the sum, in clipping norms, by neighbouring relation."""


@dataclass
class PrivacyBudget:
    """Privacy budget spent so far, as zero-concentrated differential privacy.

    It counts the released averages of train replies only. An exploration, metrics, numbers of examples, and integer
    and bool arrays are not counted. It claims no amplification by sampling, so it also holds against someone who knows
    which clients were sampled. Weights (numbers of examples) count as public. Clients that clip are trusted to do so.

    Attributes
    ----------
    releases : int
        Rounds that were aggregated.
    refused : int
        Rounds that were not aggregated because replies were missing.
    rho : float
        Sum of the releases' costs under ``"add-or-remove-one"`` (a client's update is there or counts as zero);
        infinite if a release has no bound.
    """

    releases: int = 0
    refused: int = 0
    rho: float = 0.0

    def epsilon(self, delta: float = 1e-5, relation: str = "replace-one") -> float:
        """Return an upper bound of the epsilon spent at ``delta``: rho + 2 sqrt(rho ln(1 / delta)) (arXiv 1605.02065).

        ``relation`` is ``"replace-one"``, where any other update may replace a client's, or ``"add-or-remove-one"``,
        where a client's update may count as zero. The latter costs a quarter of the rho.

        Raises
        ------
        ValueError
            If ``delta`` is not in (0, 1), or the relation is unknown.
        """
        if not 0 < delta < 1:
            raise ValueError(f"delta = {delta}: must be in (0, 1)")
        if relation not in RELATIONS:
            raise ValueError(f"relation = {relation!r}: must be one of {', '.join(RELATIONS)}")
        rho = self.rho * RELATIONS[relation] ** 2
        return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def budget_of(strategy: Strategy) -> PrivacyBudget | None:
    """Return a new, unspent budget; ``None`` without a differential-privacy wrapper."""
    return PrivacyBudget() if any(_wrappers(strategy)) else None


def check_exploration(strategy: Strategy) -> None:
    """Raise ``ValueError`` if an exploration is about to run under a wrapper, whose noise does not cover it."""
    for wrapper in _wrappers(strategy):
        raise ValueError(
            f"an exploration is outside the noise and the budget of {type(wrapper).__name__}: bring a mask= that does "
            "not depend on the clients' data, or declare with LossExploration(public=True) that the explorers' data "
            "may be known"
        )


def replies_needed(strategy: Strategy) -> int:
    """Return the number of replies for which the noise is scaled; 0 without a differential-privacy wrapper."""
    return max((wrapper.num_sampled_clients for wrapper in _wrappers(strategy)), default=0)


def aggregate(
    strategy: Strategy, server_round: int, replies: Sequence[Message], budget: PrivacyBudget | None
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Let the strategy aggregate the valid replies. Under a wrapper none may be missing, and the budget is charged."""
    wrapper = next(_wrappers(strategy), None)
    if wrapper is None:
        return strategy.aggregate_train(server_round, replies)
    budget = PrivacyBudget() if budget is None else budget
    valid = [reply for reply in replies if not reply.has_error()]
    problem = _no_bound(wrapper)
    share, norm = 1.0 if problem else _largest_share(wrapper, valid), wrapper.clipping_norm
    record, metrics = strategy.aggregate_train(server_round, replies)
    if record is not None:
        budget.releases += 1
        budget.rho += math.inf if problem else _cost(wrapper, share, norm)
        _tell(budget, server_round, problem)
    return record, metrics


def refuse(strategy: Strategy, server_round: int, budget: PrivacyBudget | None) -> None:
    """Note that a round is not aggregated."""
    wrapper = next(_wrappers(strategy), None)
    if wrapper is None:
        return
    if budget is not None:
        budget.refused += 1
    if getattr(wrapper, "accountant", None) is not None:
        strategy.aggregate_train(server_round, [])  # it refuses as well, and clears its notes on the round


def _wrappers(strategy: Strategy) -> Iterator[WRAPPERS]:
    return (layer for layer in traits.layers(strategy) if isinstance(layer, WRAPPERS))


def _no_bound(wrapper: WRAPPERS) -> str:
    """Say why the cost of a release has no bound; "" if it has one."""
    if wrapper.noise_multiplier <= 0:
        return "there is no noise"
    if not traits.averages_plainly(wrapper.strategy):
        return f"the noise is scaled for FedAvg's own average, not for {type(wrapper.strategy).__name__}"
    return ""


def _largest_share(wrapper: WRAPPERS, replies: Sequence[Message]) -> float:
    """Return the largest share of a single client in the weighted mean."""
    key = traits.weight_key_of(wrapper.strategy)
    weights = [float(record[key]) for reply in replies for record in reply.content.metric_records.values()]  # type: ignore[arg-type]
    return max(weights) / sum(weights)


def _cost(wrapper: WRAPPERS, share: float, clipped_at: float) -> float:
    """Return the rho of one release: of the mean, plus of the count by which the clipping norm adapts."""
    # the noise is scaled for equal shares, and for the norm as adapted after clipping
    fitting = wrapper.clipping_norm / clipped_at / (share * wrapper.num_sampled_clients)
    rho = 1 / (2 * (wrapper.noise_multiplier * fitting) ** 2)
    if isinstance(wrapper, ADAPTIVE):
        rho += 1 / (2 * (2 * wrapper.clipped_count_stddev) ** 2)  # a bit is 1/2 or -1/2
    return rho


def _tell(budget: PrivacyBudget, server_round: int, problem: str) -> None:
    if math.isinf(budget.rho):
        log(WARNING, "round %d: the privacy spent has no bound%s", server_round, problem and f": {problem}")
        return
    log(
        INFO,
        "round %d: privacy spent at delta 1e-05: epsilon %.4g (replace-one), %.4g (add-or-remove-one), %d releases",
        server_round,
        budget.epsilon(),
        budget.epsilon(relation="add-or-remove-one"),
        budget.releases,
    )
