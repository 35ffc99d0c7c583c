"""What torchrun (or whoever starts the processes as it does) says about this process, read off the environment."""

import os
from dataclasses import dataclass

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process is `rank` of `size`, and local_rank of the local_size on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def read_launch() -> Launch | None:
    """None unless this process was started as one of several."""
    if any(name not in os.environ for name in _VARIABLES):
        return None
    launch = Launch(*(int(os.environ[name]) for name in _VARIABLES[:4]))
    return launch if launch.size > 1 else None
