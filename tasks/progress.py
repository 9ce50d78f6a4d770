"""How long work tells how far it is: what the commands take, and the command line's bar is."""

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""Called with a label, what is done and what there is."""


def quiet(label: str, done: int, total: int) -> None:
    """No report of progress."""
