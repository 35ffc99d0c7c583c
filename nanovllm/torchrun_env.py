"""The rank of this process, read from the environment variables that torchrun sets for the processes it starts."""

import os
import re
from dataclasses import dataclass

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class TorchrunEnv:
    """This process is `rank` of `size` ranks, and local_rank of the local_size ranks on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def read_torchrun_env() -> TorchrunEnv | None:
    """None unless torchrun started this process as one of several.

    Raises ValueError when all the variables are set and their values are not those of a rank.
    """
    if any(name not in os.environ for name in _VARIABLES):
        return None
    values = {name: os.environ[name] for name in _VARIABLES[:4]}
    if all(re.fullmatch("[0-9]{1,9}", value) for value in values.values()):
        env = TorchrunEnv(*map(int, values.values()))
        if env.size == 1:  # some clusters set the variables for every program
            return None
        if env.rank < env.size and env.local_rank < env.local_size <= env.size:
            return env
    given = ", ".join(f"{name}={value!r}" for name, value in values.items())
    raise ValueError(
        "RANK must be an integer below WORLD_SIZE, and LOCAL_RANK one below LOCAL_WORLD_SIZE, as torchrun sets them, "
        f"got {given}; start the program with torchrun, or unset RANK"
    )
