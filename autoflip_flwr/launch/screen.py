"""Show a run's progress: one line per step and round, from the log of Flower, Ray and the app."""

from __future__ import annotations

import os
import re
import shutil
from typing import TextIO

from autoflip_flwr.costs.reason import COLOURS, last_words

_WRAPPER = re.compile(r"^(?:\w+ failed with exception: )+")
_GENERAL = re.compile(r"An error was encountered. Ending simulation|Simulation Runtime crashed|^finished:failed$|^$")
_APP_ERROR = re.compile(r"autoflip: error: (.*\S)")
_RECORD = re.compile(r"run record: (.+)")
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) : *(.*)")
_ACTOR = re.compile(r"\((\w+) pid=\d+(?:, ip=[^)]*)?\) ?(.*)")
_FLOWERS_ROUND = re.compile(r"\[ROUND (\d+)/(\d+)\]")
_GOES_ON = re.compile(r"going on after round (\d+)")
_PROGRESS = re.compile(r"waiting for (?:nodes|answers): |explorer \d+ of \d+[, ]|round \d+: \d+ of \d+ ")
# the library's table of bytes at a run's end, which the shipped app's summary repeats
_SAVINGS = re.compile(r"MB sent +AutoFLIP|\w+ +[\d.]+(?: +[\d.]+)?(?:  .*)?$|sent [\d.]+ MB, |MB are 10\^6 bytes")
_RESULT = re.compile(r"(?:└──> (?:Aggregated )?MetricRecord|Initial global evaluation results): .*")
_ERROR_REPLY = re.compile(r"\t> Received error in reply from node \d+: ")
# how a traceback begins in Python, Ray and Flower, and what may follow
_OPENS = re.compile(r"Traceback \(most recent|ray::|<class '|Exit Code: \d")
_CONTINUES = re.compile(
    r"\s|$|The above exception|During handling of|Exception \w+ occurred|An unhandled exception|For more information,|"
    r"(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|StopIteration)(?:\(\w+\))?(?:: |:?$)"
)
# Uninformative lines of Flower's log, and prints of Flower and Ray. All others are shown: they may be the app's.
_CHATTER = re.compile(
    r"$|\t|Starting logstream for run_id |Starting Flower |Since flwr \d|Federation `|To change federation size|"
    r"fraction_evaluate is set to 0|Starting \w+ strategy:|configure_\w+: Sampled|"
    r"aggregate_\w+: Received \d+ results and 0 failures|Global evaluation$|Strategy execution finished|Final results:|"
    r"Exit Code: |An exception was raised when processing a message by RayBackend|Simulation raised an exception|"
    r"Manually terminating ClientAppActor"
)
_PRINTED = re.compile(
    r"Using SuperLink: |Successfully started run |Successfully installed \S+ to |"
    r"\d{4}-\d\d-\d\d [\d:,]+\tINFO \w+\.py:\d+ -- "
)
_RAYS_TIP = re.compile(r".*/ray/_private/worker\.py:\d+: FutureWarning: Tip:")


class Screen:
    """Show a run's log, line by line.

    On a terminal, progress within a round is one line that is overwritten. Elsewhere each step of it is a new line.

    Parameters
    ----------
    out : TextIO
        Where to write.
    own : bool (False)
        Whether the app is the shipped one, whose one line per round replaces many lines of Flower's log.
    verbose : bool (False)
        Show the log unchanged, but without colours unless ``out`` is a terminal and ``$NO_COLOR`` is not set.

    Attributes
    ----------
    errors : list[str]
        The errors that the shipped app has logged. They are not shown, but become the reason for the run's failure.
    raised : list[str]
        Classes and messages of the exceptions whose tracebacks are in the log.
    record : str
        Folder of the run's record, once the app has logged it; "" before.
    """

    def __init__(self, out: TextIO, *, own: bool = False, verbose: bool = False) -> None:
        self._out, self._own, self._verbose = out, own, verbose
        self._terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._colours = self._terminal and not os.environ.get("NO_COLOR")
        self._overwrites = False  # whether the last line is progress
        self._earlier = 0  # finished rounds before those that Flower counts from 1
        self._block: list[str] = []  # the lines of an error so far
        self._tip = False  # whether the last line was a tip from Ray, whose source follows
        self._told: set[str] = set()
        self._traced = False
        self.errors: list[str] = []
        self.raised: list[str] = []
        self.record = ""

    def say(self, text: str) -> None:
        """Show a line."""
        self._clear()
        print(text, file=self._out, flush=True)

    def progress(self, text: str) -> None:
        """Show a line that the next one replaces, on a terminal."""
        if not self._terminal:
            self.say(text)
            return
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]}\x1b[K", end="", file=self._out, flush=True)
        self._overwrites = True

    def close(self) -> None:
        """Show what is still held back, since the log has ended."""
        self._end_block()
        self._clear()

    def reason(self, details: str) -> str:
        """Return why the run has failed, in full and without repetition. ``details`` is what Flower says of its end."""
        found = last_words(_WRAPPER.sub("", COLOURS.sub("", details)))
        if not self.errors:
            # prefer the text with the exception's class, and any text to Flower's general words on a crash
            alike = [words for words in self.raised if words.endswith(found) or _GENERAL.search(found)]
            return alike[0] if alike else found
        parts = list(dict.fromkeys([*self.errors, found]))
        return "; ".join(part for part in parts if not any(part in other for other in parts if other != part))

    def feed(self, line: str) -> None:
        """Process a line of the log, and show what should be shown of it."""
        plain = COLOURS.sub("", line.rstrip())
        if self._verbose:
            self.say(line.rstrip("\n") if self._colours else COLOURS.sub("", line.rstrip("\n")))
        actor = _ACTOR.fullmatch(plain)
        words = actor[2] if actor else plain
        found = _LEVEL.fullmatch(words)
        opened = any(_OPENS.match(each) for each in self._block)
        if self._block and not found and (_OPENS.match(words) or (opened and _CONTINUES.match(words))):
            self._block.append(words)
            return
        self._end_block()
        level, text = (found[1], found[2]) if found else ("", words)
        if told := _APP_ERROR.search(text):
            self._block = [text]
            if told[1] not in self.errors:
                self.errors.append(told[1])
        elif level in ("ERROR", "CRITICAL") or (not level and text.startswith("Traceback (most recent")):
            self._block = [text]
        elif told := _ERROR_REPLY.match(text):
            self._block = [text[told.end() :]]
        elif not level or not self._noted(text.strip()):
            self._show(level, text, f"{actor[1]}: " if actor else "")

    def _noted(self, text: str) -> bool:
        """Process a line that is recognised by its words. Return whether nothing else is to be done with it."""
        if self._own and (told := _RECORD.fullmatch(text)):
            self.record = told[1]
        elif told := _GOES_ON.match(text):
            self._earlier = int(told[1])
            self._tell(told[0])
            return True
        elif told := _FLOWERS_ROUND.fullmatch(text):
            if not self._own:
                self._tell(f"[round {int(told[1]) + self._earlier}/{int(told[2]) + self._earlier}]")
            return True
        elif _PROGRESS.match(text):
            if not self._verbose:
                self.progress(text)
            return True
        elif _RESULT.fullmatch(text):
            if not self._own:
                self._tell(f"  {text.removeprefix('└──> ')}")
            return True
        elif text.startswith("Starting Flower Simulation") and not self._verbose:
            self.progress("starting Ray and the clients' processes ...")
            return True
        return False

    def _show(self, level: str, text: str, who: str) -> None:
        after_tip, self._tip = self._tip, bool(_RAYS_TIP.match(text))
        if self._tip or (after_tip and text.startswith(" ")) or (_CHATTER if level else _PRINTED).match(text):
            return
        if self._own and level == "INFO" and _SAVINGS.match(text):
            return
        self._tell(who + ("warning: " if level == "WARNING" else "") + text)

    def _tell(self, text: str) -> None:
        if not self._verbose:
            self.say(text)

    def _end_block(self) -> None:
        """Show an error in one line, or with its traceback if it is the first one of an app that is not shipped."""
        block, self._block = self._block, []
        if not block:
            return
        trace = any(line.startswith('  File "') for line in block)
        words = last_words("\n".join(block))
        if trace:
            self.raised.append(words)
        known = words in self._told or any(error in words for error in self.errors)
        if known or _CHATTER.match(words) or _GENERAL.search(words):
            return
        self._told.add(words)
        if trace and not self._own and not self._traced:
            self._traced = True
            self._tell("\n".join(block))
        else:
            self._tell(f"error: {words}")

    def _clear(self) -> None:
        if self._overwrites:
            print("\r\x1b[K", end="", file=self._out, flush=True)
            self._overwrites = False
