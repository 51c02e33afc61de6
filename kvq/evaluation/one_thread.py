"""Computing on one thread, for work of many small operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread within the block.

    An operation on a few thousand numbers gains nothing from a second thread, and waits for it where other processes
    want the cores too: the optimizer of hqq took 4 to 40 times as long on two threads of a busy machine.

    This is for a program that owns its process, as a command does. A backend must not do it for one call: a thread of
    the user's that first computes within the block keeps one thread for good, since torch hands the number on then.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
