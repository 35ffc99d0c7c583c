"""How many threads compute a step on the CPU: as many as there are free cores, and one for a small model.

The numbers come from tools/measure_cpu_threads.py.
"""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from nanovllm.model_config import ModelConfig

# Of a layer's matrices, for each thread. A matrix of a layer with fewer is multiplied in less time than threads take to
# start and to wait for each other: on two cores the bundled model (0.2 million) gains nothing from the second one.
PARAMETERS_PER_THREAD = 1_000_000

logger = logging.getLogger("nanovllm")


def choose_num_threads(model: ModelConfig, num_ranks: int = 1) -> int | None:
    """Threads for each of num_ranks ranks that share this machine's cores; logs the choice.

    None: leave torch's own number, since the user has set OMP_NUM_THREADS or MKL_NUM_THREADS.
    """
    if user_has_chosen(os.environ):
        return None
    cores = available_cores()
    number = num_threads_for(cores, mean_layer_parameters(model), num_ranks)
    few = max(1, cores // num_ranks)
    reason = "small model" if number < few else f"{num_ranks} ranks" if num_ranks > 1 else "all that are available"
    logger.info("CPU threads: %d of %d cores (%s)", number, cores, reason)
    return number


def user_has_chosen(environment: Mapping[str, str]) -> bool:
    return any(environment.get(name, "").strip() for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))


def num_threads_for(cores: int, layer_parameters: float, num_ranks: int) -> int:
    """At least 1. layer_parameters: of the whole model's mean layer, which the ranks divide."""
    return max(1, min(cores // num_ranks, int(layer_parameters / num_ranks / PARAMETERS_PER_THREAD)))


def mean_layer_parameters(model: ModelConfig) -> float:
    """Of the matrices that one token is multiplied with, the mean over all layers and the output layer."""
    attention = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    mlp = 3 * model.hidden_size * model.intermediate_size
    num_moe = 0 if model.moe is None else len(model.moe.layers)
    total = model.num_hidden_layers * attention + (model.num_hidden_layers - num_moe) * mlp
    if model.moe is not None:
        experts = model.moe.num_experts_per_tok * model.moe.moe_intermediate_size
        total += num_moe * 3 * model.hidden_size * experts
    return (total + model.hidden_size * model.vocab_size) / (model.num_hidden_layers + 1)


# --- cores ---


def available_cores() -> int:
    """Physical cores that this process may use: those of its affinity, within the container's CPU quota."""
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        cores = physical_cores(cpus)
    else:
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_cores(cpus: Iterable[int], root: Path = Path("/")) -> int:
    """Cores among the logical CPUs `cpus`: hyper-threads of one core count once. All of them if Linux does not say."""
    return len({_siblings(root, cpu) for cpu in cpus})


def _siblings(root: Path, cpu: int) -> str:
    """The logical CPUs of its core, as Linux writes them."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the cgroups of this process may use at once, the least of all that contain it; None without a limit.

    root: where /proc and /sys/fs/cgroup lie. Reads cgroup v2's cpu.max and v1's cpu.cfs_quota_us. In a container the
    path in /proc/self/cgroup may be the host's, while the files lie at the mount itself: that is looked at too.
    """
    quotas = [quota for folder in _cgroup_folders(root) if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def _cgroup_folders(root: Path) -> list[Path]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [root / "sys/fs/cgroup" / name for name in ([controllers, "cpu"] if controllers else ["", "unified"])]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [mount.joinpath(*parts[:depth]) for mount in mounts for depth in range(len(parts) + 1)]
    return folders


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if quota != "max" and float(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


# --- torch ---

_lock = threading.Lock()
_num_inside = 0
_number_outside = 1


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Within it torch computes with `number` threads; None changes nothing. It takes a microsecond.

    torch's number belongs to the process, and a thread that uses torch for the first time takes what it finds. So the
    number to return to is the one before the first of several threads came in.
    """
    global _num_inside, _number_outside
    if number is None:
        yield
        return
    with _lock:
        if _num_inside == 0:
            _number_outside = torch.get_num_threads()
        _num_inside += 1
        torch.set_num_threads(number)
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            torch.set_num_threads(_number_outside)
