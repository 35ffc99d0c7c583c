"""Ranks over NCCL that share a GPU, so that more ranks are tested than there are GPUs: `pytest --share-gpus`."""

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest

from nanovllm.distributed.placement import RankPlacement
from nanovllm.executor import multiproc


def share_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, engines of this process use NCCL for ranks that share a GPU too; without this, they use gloo.

    NCCL refuses two ranks of one host on one GPU. With an NCCL_HOSTID of its own, each rank is on another host for
    NCCL, which connects them by sockets. Kernels that wait for each other take turns on the GPU, so a step is slow.
    """
    _pretend(0, monkeypatch.setenv, monkeypatch.setattr)
    monkeypatch.setattr(multiproc, "worker_main", functools.partial(_worker, multiproc.worker_main))


def _worker(work: Callable[..., None], spec: Any, placement: RankPlacement, *rest: Any) -> None:
    _pretend(placement.rank, os.environ.__setitem__, setattr)
    work(spec, placement, *rest)


def _pretend(rank: int, set_variable: Callable[[str, str], None], set_attribute: Callable[..., None]) -> None:
    set_variable("NCCL_HOSTID", f"rank{rank}")
    set_variable("NCCL_SOCKET_IFNAME", "lo")
    set_variable("NCCL_IB_DISABLE", "1")
    set_attribute(RankPlacement, "has_own_gpu", property(lambda placement: placement.gpu is not None))
