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
"""The metric in which clients of adaptive clipping say whether they clipped: Flower's private `KEY_NORM_BIT`."""

_BLIND = ("__init__", "__repr__", "summary", "start")  # methods that see no arrays, or AutoFlip's full ones
_NOT_OF_THE_MEAN = ("__", "summary", "configure_", "aggregate_evaluate")
_FLOATS_ONLY = (
    QFedAvg,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)


def layers(strategy: Strategy) -> Iterator[Strategy]:
    """The strategy and, through wrappers such as Flower's differential privacy, the ones inside it."""
    found = [strategy]
    for layer in found:
        inside = [value for value in vars(layer).values() if isinstance(value, Strategy)]
        found += [value for value in inside if not any(value is known for known in found)]
    yield from found


def weight_key_of(strategy: Strategy) -> str:
    """The metric by which the strategy weighs replies; "" where it has none, and asks nothing of metrics."""
    return str(setting(strategy, "weighted_by_key", ""))


def metrics_needed(strategy: Strategy) -> dict[str, float]:
    """Metrics without which one reply would end the round, by name, with the least value of each."""
    needed = {}
    for layer in layers(strategy):
        if isinstance(layer, QFedAvg):
            needed[layer.train_loss_key] = 0.0
        if isinstance(layer, DifferentialPrivacyClientSideAdaptiveClipping):
            needed[NORM_BIT] = 0.0
    return needed


def metrics_averaged(strategy: Strategy) -> set[str]:
    """Phases (``"train"``, ``"evaluate"``) whose metrics Flower's own mean averages, not a function of the user's."""
    return {
        phase
        for phase in ("train", "evaluate")
        if _module(setting(strategy, f"{phase}_metrics_aggr_fn", None)).startswith("flwr.")
    }


def setting(strategy: Strategy, name: str, default: object) -> object:
    """An attribute of the outermost layer that has it."""
    return next((getattr(layer, name) for layer in layers(strategy) if hasattr(layer, name)), default)


def resolve(coordinates: str, strategy: Strategy) -> str:
    """``"packed"`` or ``"dense"``; ``"auto"`` packs where every method and function in force is Flower's own.

    A strategy with overridden methods, or with functions of the user's own that are given replies (metric functions,
    a selection rule), may look at the arrays: it gets full ones.
    """
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates = {coordinates!r}: must be one of {', '.join(COORDINATES)}")
    if coordinates != "auto":
        return coordinates
    return "packed" if all(_is_flowers(layer) for layer in layers(strategy)) else "dense"


def shows_integers(strategy: Strategy) -> bool:
    """Whether integer and bool arrays are shown to a strategy in dense coordinates.

    Only to one with code of the user's own, which may want the whole model; not where QFedAvg or a
    differential-privacy wrapper may fail on them, or take them for a part of the update, as they do in Flower alone.
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
    """Whether a differential-privacy wrapper relies on the clients' updates being no longer than its norm."""
    kinds = (DifferentialPrivacyClientSideAdaptiveClipping, DifferentialPrivacyClientSideFixedClipping)
    return any(isinstance(layer, kinds) for layer in layers(strategy))


def divides_by_norm(strategy: Strategy) -> bool:
    """Whether a differential-privacy wrapper scales each update by its norm, and fails on one of exactly zero."""
    kinds = (DifferentialPrivacyServerSideAdaptiveClipping, DifferentialPrivacyServerSideFixedClipping)
    return any(isinstance(layer, kinds) for layer in layers(strategy))


def nodes_needed(strategy: Strategy) -> int:
    """How many nodes the strategy waits for, or must have."""
    return _largest(strategy, "min_available_nodes", "min_train_nodes", "min_evaluate_nodes", "num_sampled_clients")


def nodes_waited_for(strategy: Strategy) -> int:
    """How many nodes the strategy waits for, without a limit, before its first message."""
    return _largest(strategy, "min_available_nodes", "min_train_nodes")


def _largest(strategy: Strategy, *names: str) -> int:
    return max(int(getattr(layer, name, 1) or 1) for layer in layers(strategy) for name in names)


def averages_plainly(strategy: Strategy) -> bool:
    """Whether FedAvg's own weighted mean is in force, of arrays and metrics alike."""
    used = [name for name, thing in vars(FedAvg).items() if callable(thing) and not name.startswith(_NOT_OF_THE_MEAN)]
    own = all(getattr(type(strategy), name, None) is vars(FedAvg)[name] for name in used)
    own = own and not vars(strategy).keys() & set(used)
    return own and _module(getattr(strategy, "train_metrics_aggr_fn", None)).startswith("flwr.")
