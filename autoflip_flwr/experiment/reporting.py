"""Report the statistics that the server requests of the app's clients."""

from __future__ import annotations

from flwr.app import Context
from torch import nn

from autoflip_flwr.client.report import current_request, report
from autoflip_flwr.core.choices import MINIBATCH
from autoflip_flwr.experiment import training
from autoflip_flwr.experiment.config import Config
from autoflip_flwr.experiment.examples import Examples
from autoflip_flwr.torch import gradients

SMALLNESS = "smallness"
"""A statistic that is the larger, the smaller a weight is after training. Gradients are then those after training."""


def report_gradients(
    model: nn.Module, examples: Examples, config: Config, context: Context, seed: int
) -> training.Trained:
    """Report what is requested of gradients, at the model's present weights, without training.

    One minibatch is used, or all examples, as the method's authors do. Return the examples that this took.
    """
    most = 1 if config.method in MINIBATCH else None
    with gradients(model, context):
        return training.pass_over(model, examples, config.batch_size, seed, most)


def when_asked(context: Context) -> str:
    """Return when this message's statistics are reported: ``"before"`` or ``"after"`` the training, or ``""``."""
    asked = [request.name for request in current_request(context)]
    return "" if not asked else "after" if SMALLNESS in asked else "before"


def report_smallness(model: nn.Module, context: Context) -> None:
    """Report ``1 / (1 + |w|)``, so that the smallest weights are the top entries."""
    report(
        context,
        SMALLNESS,
        {
            name: (1 / (1 + weight.detach().abs())).float().cpu().numpy()
            for name, weight in model.named_parameters(remove_duplicate=False)
        },
    )
