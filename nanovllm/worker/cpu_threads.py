"""The number of threads that compute a step on the CPU: one per available core, fewer for a small model.

tools/measure_cpu_threads.py measures what the choice rests on.
"""

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from nanovllm.model_config import ModelConfig
from nanovllm.parameter_counts import parameters_per_token

# Parameters of a layer's matrices for each thread. With fewer, threads take longer to start and to wait for each other
# than the multiplication takes: on two cores the bundled model (0.2 million) gains nothing from a second thread.
PARAMETERS_PER_THREAD = 1_000_000

logger = logging.getLogger("nanovllm")


def choose_num_threads(model: ModelConfig, num_ranks: int = 1) -> int | None:
    """The number of threads for each of num_ranks ranks that share this host's cores; logs the choice.

    None if the user has set OMP_NUM_THREADS or MKL_NUM_THREADS, which torch reads itself.
    """
    if any(os.environ.get(name, "").strip() for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return None
    cores = available_cores()
    cores_per_rank = max(1, cores // num_ranks)
    number = max(1, min(cores_per_rank, int(mean_layer_parameters(model) / num_ranks / PARAMETERS_PER_THREAD)))
    all_used = f"{num_ranks} ranks" if num_ranks > 1 else "all that are available"
    reason = "small model" if number < cores_per_rank else all_used
    logger.info("CPU threads: %d of %d cores (%s)", number, cores, reason)
    return number


def mean_layer_parameters(model: ModelConfig) -> float:
    """The mean number of parameters that one token is multiplied with, over all layers and the output layer.

    Routers of experts are not counted.
    """
    num_routed = 0 if model.moe is None else len(model.moe.layers) * model.moe.num_experts
    parameters = parameters_per_token(model) + model.hidden_size * (model.vocab_size - num_routed)
    return parameters / (model.num_hidden_layers + 1)


# --- cores ---


def available_cores() -> int:
    """The number of physical cores that this process may use: those of its affinity, within the container's quota."""
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
        cores = physical_cores(cpus)
    else:
        cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_cores(cpus: Iterable[int], root: Path = Path("/")) -> int:
    """The number of cores of the logical CPUs `cpus`; a CPU whose siblings Linux does not list counts as a core."""
    return len({_siblings(root, cpu) for cpu in cpus})


def _siblings(root: Path, cpu: int) -> str:
    """The logical CPUs of the same core, such as "0,4"."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The smallest CPU quota of the cgroups that contain this process, in CPUs; None without a limit.

    root: the folder of /proc and /sys/fs/cgroup. Reads cgroup v2's cpu.max and v1's cpu.cfs_quota_us. In a container
    /proc/self/cgroup may hold the host's path, while the files are at the mount itself; so every parent is read too.
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
    """torch computes with `number` threads in the `with` block; None changes nothing. Takes a microsecond.

    torch's number of threads belongs to the process. So if the blocks of several threads overlap, each of them restores
    the number that was set before the first one began.
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
