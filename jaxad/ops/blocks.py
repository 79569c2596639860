"""How many devices share the rows of what is being traced, for ops that go through their rows in blocks.

An op is written for all rows and does not see how they are split over devices. A block that suits one device is then a
sliver on each of many: 4,096 rows over 256 chips are 16 for each, and the loop has 256 times the turns. So drivers say
over how many devices they split a batch, and the ops make their blocks that much larger.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_devices: contextvars.ContextVar[int] = contextvars.ContextVar("jaxad_devices_of_rows", default=1)


@contextlib.contextmanager
def rows_over(devices: int) -> Iterator[None]:
    """Says, while tracing, that the rows of a batch are split over this many devices."""
    token = _devices.set(devices)
    try:
        yield
    finally:
        _devices.reset(token)


def devices_of_rows() -> int:
    """Over how many devices the rows of a batch are split; 1 unless `rows_over` says otherwise."""
    return _devices.get()
