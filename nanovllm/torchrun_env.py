"""The rank of this process, read from the environment variables that torchrun sets for the processes it starts."""

import os
import re
from dataclasses import dataclass

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_UNSET = "start the program with torchrun, or unset RANK"


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
    numbers = {name: _read_number(name) for name in _VARIABLES[:4]}
    env = TorchrunEnv(*numbers.values())
    if env.size == 1:  # some clusters set the variables for every program
        return None
    if not (env.rank < env.size and env.local_rank < env.local_size <= env.size):
        values = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise ValueError(
            "RANK must be below WORLD_SIZE, and LOCAL_RANK below LOCAL_WORLD_SIZE, as torchrun sets them, got "
            f"{values}; {_UNSET}"
        )
    return env


def _read_number(name: str) -> int:
    text = os.environ[name]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(
            f"the environment variable {name} must be an integer, as torchrun sets it, got {text!r}; {_UNSET}"
        )
    return int(text)
