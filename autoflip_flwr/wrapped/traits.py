"""What AutoFLIP needs to know about the strategy that it wraps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    QFedAvg,
    Strategy,
)

from autoflip_flwr.core.choices import COORDINATES

NORM_BIT = "norm_bit"
"""Metric by which clients report whether they clipped, in adaptive clipping: Flower's private `KEY_NORM_BIT`."""

_BLIND = ("__init__", "__repr__", "summary", "start")  # methods that see no arrays, or full ones
_NOT_OF_THE_MEAN = ("__", "summary", "configure_", "aggregate_evaluate")
_FLOATS_ONLY = (
    QFedAvg,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)


def layers(strategy: Strategy) -> Iterator[Strategy]:
    """Yield the strategy and then, through wrappers such as Flower's differential privacy, the ones inside it."""
    found = [strategy]
    for layer in found:
        inside = [value for value in vars(layer).values() if isinstance(value, Strategy)]
        found += [value for value in inside if not any(value is known for known in found)]
    yield from found


def weight_key_of(strategy: Strategy) -> str:
    """Return the metric by which the strategy weights replies; "" if it has none. Then metrics are not checked."""
    return str(setting(strategy, "weighted_by_key", ""))


def metrics_needed(strategy: Strategy) -> dict[str, float]:
    """Return the metrics that every reply must have, or the round would fail: smallest allowed value by name."""
    needed = {}
    for layer in layers(strategy):
        if isinstance(layer, QFedAvg):
            needed[layer.train_loss_key] = 0.0
        if isinstance(layer, DifferentialPrivacyClientSideAdaptiveClipping):
            needed[NORM_BIT] = 0.0
    return needed


def metrics_averaged(strategy: Strategy) -> set[str]:
    """Return the phases (``"train"``, ``"evaluate"``) whose metrics are averaged by Flower's mean, not a user's."""
    return {
        phase
        for phase in ("train", "evaluate")
        if _module(setting(strategy, f"{phase}_metrics_aggr_fn", None)).startswith("flwr.")
    }


def setting(strategy: Strategy, name: str, default: object) -> object:
    """Return an attribute of the outermost layer that has it."""
    return next((getattr(layer, name) for layer in layers(strategy) if hasattr(layer, name)), default)


def resolve(coordinates: str, strategy: Strategy) -> str:
    """Return ``"packed"`` or ``"dense"``. ``"auto"`` is packed if every method and function in use is Flower's own.

    A strategy gets full arrays if it overrides methods or passes replies to the user's functions (metric functions, a
    selection rule), since these may look at the arrays.
    """
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates = {coordinates!r}: must be one of {', '.join(COORDINATES)}")
    if coordinates != "auto":
        return coordinates
    return "packed" if all(_is_flowers(layer) for layer in layers(strategy)) else "dense"


def shows_integers(strategy: Strategy) -> bool:
    """Return whether a strategy in dense coordinates sees integer and bool arrays.

    Only strategies with the user's own code do, since it may need the whole model. QFedAvg and differential-privacy
    wrappers do not: they may fail on such arrays, or treat them as a part of the update, as they do in Flower alone.
    """
    found = list(layers(strategy))
    return not all(map(_is_flowers, found)) and not any(isinstance(layer, _FLOATS_ONLY) for layer in found)


def _is_flowers(strategy: Strategy) -> bool:
    kind = type(strategy)
    flowers = [base for base in kind.__mro__ if _module(base).startswith("flwr.")]
    known = {name for base in flowers for name in (*vars(base), *inspect.signature(base).parameters)}
    functions = [getattr(kind, name, None) for name in known.difference(_BLIND)]
    functions += vars(strategy).values()
    return all(_module(each).startswith("flwr.") for each in functions if callable(each) or isinstance(each, property))


def _module(thing: object) -> str:
    return str(getattr(thing, "__module__", ""))


def clips_at_clients(strategy: Strategy) -> bool:
    """Return whether a differential-privacy wrapper relies on the clients to clip their updates to its norm."""
    kinds = (DifferentialPrivacyClientSideAdaptiveClipping, DifferentialPrivacyClientSideFixedClipping)
    return any(isinstance(layer, kinds) for layer in layers(strategy))


def divides_by_norm(strategy: Strategy) -> bool:
    """Return whether a differential-privacy wrapper divides each update by its norm, and so fails on a zero update."""
    kinds = (DifferentialPrivacyServerSideAdaptiveClipping, DifferentialPrivacyServerSideFixedClipping)
    return any(isinstance(layer, kinds) for layer in layers(strategy))


def nodes_needed(strategy: Strategy) -> int:
    """Return how many nodes the strategy waits for or needs."""
    return _largest(strategy, "min_available_nodes", "min_train_nodes", "min_evaluate_nodes", "num_sampled_clients")


def nodes_waited_for(strategy: Strategy) -> int:
    """Return how many nodes the strategy waits for, without a time limit, before its first message."""
    return _largest(strategy, "min_available_nodes", "min_train_nodes")


def _largest(strategy: Strategy, *names: str) -> int:
    return max(int(getattr(layer, name, 1) or 1) for layer in layers(strategy) for name in names)


def averages_plainly(strategy: Strategy) -> bool:
    """Return whether both arrays and metrics are averaged by FedAvg's own weighted mean."""
    used = [name for name, thing in vars(FedAvg).items() if callable(thing) and not name.startswith(_NOT_OF_THE_MEAN)]
    own = all(getattr(type(strategy), name, None) is vars(FedAvg)[name] for name in used)
    own = own and not vars(strategy).keys() & set(used)
    return own and _module(getattr(strategy, "train_metrics_aggr_fn", None)).startswith("flwr.")
