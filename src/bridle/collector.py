"""Python's search for garbage, kept out of what makes many objects and no garbage."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uncollected(*, lasting: bool = False) -> Generator[None]:
    """Make objects without the search, which would look through all of them again and again.

    Args:
        lasting: whether they stay to the end, as imported modules do: then they are left out of every later search.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if lasting:
            gc.freeze()
        if before:
            gc.enable()
