"""What settings may be: their types and ranges, in words and as tests."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoflip_flwr.core import choices

Value = bool | int | float | str
"""What a Flower run config can hold."""


class ConfigError(ValueError):
    """A setting that the user has to change. The message is one line that can be shown."""


@dataclass(frozen=True)
class Rule:
    """What a setting allows: a type, a range in words and as a test, and the choices if there are any."""

    kind: type[Value]
    allowed: str
    accepts: Callable[[Any], bool] = lambda _: True
    choices: tuple[str, ...] = ()


def parts_of(text: str) -> list[str]:
    """Return the parts between commas."""
    return [part.strip() for part in text.split(",")]


def one_of(allowed: tuple[str, ...]) -> Rule:
    """Return the rule that a text is one of these."""
    told = ", ".join(filter(None, allowed))
    return Rule(str, f"{'empty or ' * ('' in allowed)}one of {told}", allowed.__contains__, allowed)


TEXT = Rule(str, "a string")
FLAG = Rule(bool, "true or false")
COUNT = Rule(int, "an integer >= 1", lambda v: v >= 1)
NOT_BELOW_ZERO = Rule(int, "an integer >= 0", lambda v: v >= 0)
POSITIVE = Rule(float, "a number > 0", lambda v: v > 0)
NOT_NEGATIVE = Rule(float, "a number >= 0", lambda v: v >= 0)
BELOW_ONE = Rule(float, "a number in [0, 1)", lambda v: 0 <= v < 1)
ABOVE_ONE = Rule(float, "a number > 1", lambda v: v > 1)
POWER = Rule(float, "a number in [1, 100)", lambda v: 1 <= v < 100)
NO_POWER_OR = Rule(float, "0, or a number in [1, 100)", lambda v: v == 0 or 1 <= v < 100)
UP_TO_ONE = Rule(float, "a number in (0, 1]", lambda v: 0 < v <= 1)
UNIT = Rule(float, "a number in [0, 1]", lambda v: 0 <= v <= 1)
SEED = Rule(int, "an integer in [0, 4294967295]", lambda v: 0 <= v < 2**32)
DATASET = Rule(
    str,
    f"one of {', '.join(choices.DATASETS)}, or module:callable",
    lambda v: v in choices.DATASETS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", v) is not None,
    choices.DATASETS,
)
NAME = Rule(
    str,
    "at most 64 letters, digits, '.', '_' or '-'",
    lambda v: re.fullmatch(r"[A-Za-z0-9._-]{0,64}", v) is not None,
)
FOLDER_NAME = Rule(str, "the path of a folder", lambda v: v != "")
TRACKERS = Rule(
    str,
    f"empty, or one or more of {', '.join(choices.TRACKERS)}, with commas in between",
    lambda v: v == "" or (set(parts_of(v)) <= set(choices.TRACKERS) and len(parts_of(v)) == len(set(parts_of(v)))),
)
MODEL = Rule(
    str,
    f"one of {', '.join(choices.MODELS)}, or your own as module:callable",
    lambda v: v in choices.MODELS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", v) is not None,
    choices.MODELS,
)
CODING, OWN_CODING = one_of(choices.VALUES), one_of(("", *choices.VALUES))


def allowed(key: str, rule: Rule, value: Any) -> Value:
    """Return a value for a setting; an integer for a float is converted.

    Raises
    ------
    ConfigError
        If the rule does not allow it.
    """
    if rule.kind is float and type(value) is int:
        # An integer beyond the range of a float counts as infinity.
        value = float(value) if abs(value) < 2**1023 else math.inf
    wrong = type(value) is not rule.kind or (isinstance(value, float) and not math.isfinite(value))
    if wrong or not rule.accepts(value):
        raise ConfigError(f"{key} = {shown(value)}: must be {rule.allowed}")
    found: Value = value
    return found


def shown(value: object) -> str:
    """Return a value as messages show it: as in TOML, but with strings in single quotes."""
    return str(value).lower() if isinstance(value, bool) else repr(value)
