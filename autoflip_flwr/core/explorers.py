"""How many nodes explore. It needs no NumPy, so that the command line can ask, too."""

SEVERAL = 5
"""So many nodes are asked at least where their share is left open."""


def asked_among(nodes: int, share: float | None, least: int) -> int:
    """Return how many of so many connected nodes are asked in round 0.

    Parameters
    ----------
    nodes : int
        Number of connected nodes.
    share : float | None
        Share of them that is asked; ``None``: a quarter, but at least :data:`SEVERAL`.
    least : int
        Number of replies that are needed.
    """
    some = max(SEVERAL, round(nodes / 4)) if share is None else round(share * nodes)
    return min(nodes, max(least, some))
