"""Flower's strategies as a test's parameters: CI takes one of each kind, `-m slow` the others."""

from __future__ import annotations

import pytest

from benchmarks import digits

KINDS = ("FedAvg", "FedAdam", "FedTrimmedAvg", "Krum", "DifferentialPrivacyServerSideFixedClipping")
"""A mean, one with state, one of sorted values, one by distances, one with noise for all replies."""

EVERY_STRATEGY = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in digits.STRATEGIES]
