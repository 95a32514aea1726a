"""Records rejected replies and pauses nodes rejected several times in a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

from flwr.app import Message
from flwr.common.logger import log

from autoflip_flwr.costs.ledger import Ledger, why_absent
from autoflip_flwr.replies.check import explain_error
from autoflip_flwr.replies.norms import FAR, Update, find_outliers, low_median
from autoflip_flwr.wire.keys import TRAIN


@dataclass(frozen=True)
class ReplyRules:
    """Which replies are rejected besides malformed ones, and what happens to their nodes.

    Parameters
    ----------
    norm_factor : float
        A reply is rejected if the L2 norm of its update (or exploration) exceeds the expected norm by this factor, > 1.
        The other replies and the work that the node reports give the expected norm
        (:mod:`autoflip_flwr.replies.norms`). From the default on, the update must also exceed the norm of earlier
        rounds by this factor, and be longer than the model. ``math.inf`` rejects none.
    max_examples : float
        A reply with a larger weight (``num-examples``) is rejected, > 0.
    min_replies : int
        A round with fewer valid replies leaves the model as it was, >= 1.
    strikes, pause : int
        A node whose replies were rejected ``strikes`` times in a row gets no messages for ``pause`` rounds; both >= 1.

    Raises
    ------
    ValueError
        If one is out of range.
    """

    norm_factor: float = FAR
    max_examples: float = 1e9
    min_replies: int = 1
    strikes: int = 3
    pause: int = 5

    def __post_init__(self) -> None:
        if not self.norm_factor > 1:
            raise ValueError(f"norm_factor = {self.norm_factor}: must be a number > 1")
        if not self.max_examples > 0:
            raise ValueError(f"max_examples = {self.max_examples}: must be a number > 0")
        for name in ("min_replies", "strikes", "pause"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


def why_none(replies: Iterable[Message], incidents: Sequence[Mapping[str, object]]) -> str:
    """Say why no train reply counts, given the error replies and the incidents of the round. At most three reasons."""
    reasons = Counter(explain_error(reply.error) for reply in replies if reply.has_error())
    reasons.update(str(each["reason"]) for each in incidents if each["kind"] == "rejected" and each["phase"] == TRAIN)
    told = [f"{reason} ({count} times)" if count > 1 else reason for reason, count in reasons.items()]
    return "; ".join(told[:3]) or why_absent(incidents)


class Quarantine:
    """Counts rejected replies and pauses nodes.

    Parameters
    ----------
    rules : ReplyRules
        When a reply is rejected and when a node is paused.
    ledger : Ledger
        Where each rejected reply is noted.
    """

    def __init__(self, rules: ReplyRules, ledger: Ledger) -> None:
        self.rules, self._ledger = rules, ledger
        self._strikes: Counter[int] = Counter()
        self._until: dict[int, int] = {}  # last round in which a node gets no messages
        self._odd: set[int] = set()  # nodes that have had their warning
        self.longest = 0.0
        """The largest median norm of the updates that counted in a round or the exploration."""

    def strike(self, node: int, phase: str, round_: int, reason: str) -> None:
        """Reject a reply. One to an evaluation is only noted: its node gets no strike."""
        log(WARNING, "%s, round %d: rejected the reply of node %d: %s", phase, round_, node, reason)
        self._ledger.note("rejected", node, phase, round_, reason)
        if phase == "evaluate":
            return
        self._strikes[node] += 1
        if self._strikes[node] >= self.rules.strikes:
            self._until[node] = last = round_ + self.rules.pause
            reason = f"{self._strikes[node]} replies in a row were rejected: no messages until round {last}"
            log(WARNING, "node %d: %s", node, reason)
            self._ledger.note("paused", node, phase, round_, reason)

    def judge_norms(self, updates: Mapping[int, Update], phase: str, round_: int) -> dict[int, str]:
        """Find the nodes whose updates are too large, with the reason. Log odd ones, remember the largest median."""
        far, odd = find_outliers(updates, self.rules.norm_factor, self.longest)
        for node, reason in odd.items():
            if node not in self._odd:
                log(WARNING, "%s, round %d: node %d counts, but %s (said once a node)", phase, round_, node, reason)
            self._ledger.note("odd", node, phase, round_, reason)
        self._odd |= odd.keys()
        counted = low_median(update.norm for node, update in updates.items() if node not in far)
        self.longest = max(self.longest, counted)
        return far

    def clear(self, node: int) -> None:
        """Note that a reply of this node counts: its strikes are forgotten."""
        self._strikes.pop(node, None)

    def active(self, nodes: Collection[int], round_: int, needed: int) -> list[int]:
        """Return the nodes that are not paused in this round, in order; all if fewer than ``needed`` would remain."""
        left = [node for node in nodes if self._until.get(node, round_ - 1) < round_]
        return left if len(left) >= needed else list(nodes)

    def suffices(self, count: int, noised: int, round_: int) -> bool:
        """Return whether ``count`` valid replies may change the model. Privacy noise is scaled for ``noised``."""
        least = self.rules.min_replies
        if count < noised:
            self.keep_model(round_, f"{count} replies count, and the noise is scaled for {noised}")
        elif count < least and least > 1:  # the strategy itself handles a round without replies
            self.keep_model(round_, f"{count} replies count, fewer than {least}")
        else:
            return True
        return False

    def keep_model(self, round_: int, reason: str) -> None:
        """Note that a round leaves the model as it was."""
        log(WARNING, "round %d: the model stays as it was: %s", round_, reason)
        self._ledger.note("unchanged", None, "train", round_, reason)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint. Nodes are named by partition, since their ids may change."""
        names = self._ledger.partitions
        return {
            "strikes": {names.get(node, node): count for node, count in self._strikes.items()},
            "until": {names.get(node, node): last for node, last in self._until.items()},
            "longest": self.longest,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        nodes = {name: node for node, name in self._ledger.partitions.items()}
        self._strikes = Counter({nodes.get(name, name): count for name, count in state["strikes"].items()})
        self._until = {nodes.get(name, name): last for name, last in state["until"].items()}
        self.longest = state["longest"]
