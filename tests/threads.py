"""Work that several threads do at once."""

import threading
from collections.abc import Callable


def errors_in_threads(work: Callable[[], object], count: int = 4) -> list[Exception]:
    """Do ``work`` in so many threads at once, and return what went wrong in them."""
    failed: list[Exception] = []

    def aside() -> None:
        try:
            work()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=aside) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed
