"""Extract a client's exception message from the text that Flower and Ray wrap around it."""

from __future__ import annotations

import re

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_WRAPPED = re.compile(r"<class '([^']+)'>:<'(.*)'>", re.DOTALL)
_CHAINED = re.compile(r"\n\n(?:The above exception was|During handling of the above exception)[^\n]*:\n")
_FLOWERS_OWN = re.compile(r"(?:[\w.]*ClientAppException:)?\s*Exception ClientAppException occurred\. Message: ")


def last_words(text: str) -> str:
    """Return an exception's class and message on one line, without colours, tracebacks and wrapping exceptions.

    Any other text is returned unchanged on one line.
    """
    plain = COLOURS.sub("", text).strip()
    if wrapped := _WRAPPED.fullmatch(plain):
        kind, plain = wrapped[1], wrapped[2].strip()
        if not kind.endswith(("ClientAppException", "ClientAppException)")):
            plain = f"{kind}: {plain}"
    said = [_end_of_traceback(part) for part in _CHAINED.split(plain)]
    # Flower's exception repeats the message of the original one, but not its class
    words = said[-1]
    if passed_on := _FLOWERS_OWN.match(words):
        words = said[-2] if len(said) > 1 else words[passed_on.end() :]
    return re.sub(r"^(?:\w+\.)+(?=\w+: )", "", " ".join(words.split()))


def _end_of_traceback(part: str) -> str:
    lines = part.split("\n")
    frames = [number for number, line in enumerate(lines) if re.match(r'\s+File "', line)]
    if not frames:
        return part
    # the source line of a frame, and the markers below it, are indented
    end = next(
        (number for number in range(frames[-1] + 1, len(lines)) if not lines[number].startswith(" ")), len(lines)
    )
    return "\n".join(lines[end:]) or part
