"""The bytes that a kernel must move and the operations it must do, and how long the GPU needs for them at best.

tests/kernels/NAME_cases.py says what kernel NAME must move and do. The counts are a minimum for every implementation:
each input, weights included, is read once and each output written once; tables of integers are left out, since they are
small. A multiplication and an addition are two operations.
"""

from typing import NamedTuple


class Work(NamedTuple):
    """bytes_read, bytes_written, and operations on the matrix units (others are too few to matter)."""

    bytes_read: int
    bytes_written: int = 0
    operations: int = 0

    @property
    def num_bytes(self) -> int:
        return self.bytes_read + self.bytes_written


class Ceilings(NamedTuple):
    """What the GPU reached in this very run: bytes a second of copying (read plus written) and of reading alone, and
    bfloat16 operations a second of a matrix product.
    """

    copy: float
    read: float
    matmul: float


class Floor(NamedTuple):
    """The least time in seconds, and the name of the ceiling that sets it."""

    seconds: float
    ceiling: str


def floor(work: Work, ceilings: Ceilings) -> Floor:
    """The larger of the times that bytes and operations take at their ceilings.

    The bytes written, and as many of the bytes read, take the time of a copy, which reads half and writes half of what
    it moves; the rest takes the time of reading. The name is that of the larger part.
    """
    copied = min(2 * work.bytes_written, work.num_bytes)
    moving = copied / ceilings.copy + (work.num_bytes - copied) / ceilings.read
    computing = work.operations / ceilings.matmul
    if computing > moving:
        return Floor(computing, "matmul")
    return Floor(moving, "copy" if 2 * copied > work.num_bytes else "read")
