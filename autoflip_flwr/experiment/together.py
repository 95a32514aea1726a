"""Check that settings go together, each of which is allowed by itself."""

from __future__ import annotations

from autoflip_flwr.core import choices
from autoflip_flwr.core.pace import Exchange
from autoflip_flwr.experiment.declared import Settings
from autoflip_flwr.experiment.inputs import WORDS, misfit
from autoflip_flwr.experiment.rules import ConfigError, shown

PATHS = ("data-dir", "output-dir", "exploration", "resume")
"""The settings that are paths."""


def check_together(config: Settings) -> None:
    """Raise ``ConfigError`` for settings that contradict each other, or together cannot work."""
    for key in PATHS:
        value = getattr(config, key.replace("-", "_"))
        if any(ord(character) < 32 for character in value):
            raise ConfigError(
                f"{key} = {shown(value)}: holds a control character. In double quotes a backslash begins an "
                "escape: write a Windows path with forward slashes, or in single quotes"
            )
    if config.model in choices.MODELS and (kind := choices.DATASET_INPUTS.get(config.dataset)):
        reason = misfit(config.model, kind, f"the {WORDS[kind]} of dataset = {shown(config.dataset)}")
        if reason:
            raise ConfigError(f"model = {shown(config.model)}: {reason}")
    if config.method in choices.ASKING and 0 < config.nodes < config.min_explorers:
        raise ConfigError(
            f"min-explorers = {config.min_explorers}: must not be more than nodes = {config.nodes}; "
            f"for a mask of {config.nodes} node{'s' * (config.nodes > 1)}, min-explorers={config.nodes}"
        )
    if config.resume and not (config.wrapped and config.checkpoints):
        raise ConfigError(
            f"resume = {shown(config.resume)}: needs checkpoints > 0, and a method that is not 'fedavg' or 'fedprox' "
            "(unless its values are quantised)"
        )
    if config.method == "fedprox" and (config.server_momentum or config.server_learning_rate != 1.0):
        raise ConfigError("method = 'fedprox': needs server-momentum = 0 and server-learning-rate = 1")
    if config.method == "fedprox" and not config.proximal_mu:
        raise ConfigError("proximal-mu = 0.0: with method = 'fedprox' it must be above 0, such as 0.01")
    if config.sparsity:
        _check_fall(config)
        _check_exchange(config)
        _check_participants(config)
        _check_powers(config)


def _check_fall(config: Settings) -> None:
    """Raise `ConfigError` if the density could not fall to the target."""
    if not config.falls:
        return
    by = (config.drop_by, config.drop_scope)
    if config.method == "autoflip" and config.extrusion and by != ("magnitude", "global"):
        raise ConfigError(f"extrusion = {config.extrusion}: needs drop-by = 'magnitude' and drop-scope = 'global'")
    if config.num_server_rounds <= config.fall_every > 1:
        raise ConfigError(
            f"fall-every = {config.fall_every}: with num-server-rounds = {config.num_server_rounds} the density would "
            "never fall; lower it, or run more rounds"
        )


def _check_exchange(config: Settings) -> None:
    """Raise `ConfigError` if entries would never be exchanged."""
    kind = config.method
    if kind == "autoflip":
        kind = next((part for part in config.schedule.split("+") if part in choices.EVERY), "")
    if kind not in choices.EVERY:
        return
    rounds, every = config.num_server_rounds, config.adjust_every or choices.EVERY[kind]
    if kind not in choices.UNTIL:
        changes = rounds > every
    else:
        until = config.adjust_until or choices.UNTIL[kind]
        if config.adjust_after >= until:
            raise ConfigError(f"adjust-after = {config.adjust_after}: must be below adjust-until = {until}")
        exchange = Exchange(config.adjust_share or 0.5, every, until, config.adjust_after)
        changes = any(exchange.after(round_, rounds) for round_ in range(1, rounds))
    if not changes:
        raise ConfigError(
            f"adjust-every = {every}: with num-server-rounds = {rounds} the mask would never change; lower it, or "
            "run more rounds"
        )


def _check_participants(config: Settings) -> None:
    """Raise `ConfigError` if masks by the explorers of a round could not be made, or a setting would do nothing."""
    if config.method != "autoflip" or config.schedule not in choices.SAMPLED_SCHEDULES:
        return
    if config.exploration:
        raise ConfigError(
            f"exploration = {shown(config.exploration)}: holds averages over its explorers, and schedule = "
            f"{shown(config.schedule)} needs what each of them reported; leave it out, so that they explore in this run"
        )
    if config.rank_by == "random":
        raise ConfigError(
            f"rank-by = 'random': does nothing with schedule = {shown(config.schedule)}, which ranks by the explorers' "
            "reports from round 1 on; use rank-by = 'deviation'"
        )


def _check_powers(config: Settings) -> None:
    """Raise `ConfigError` if entries that stand at zero would have to move under powerpropagation."""
    if config.method != "autoflip" or config.powerpropagation in (0.0, 1.0) or config.outside != "zero":
        return
    moving = "cut-feedback = true" if config.cut_feedback else f"schedule = {shown(config.schedule)}"
    if config.cut_feedback or config.schedule in choices.REGROWING_SCHEDULES:
        raise ConfigError(
            f"powerpropagation = {config.powerpropagation}: weights of zero never move, as their gradients are zero, "
            f"and {moving} needs them to; leave one of the two out"
        )
