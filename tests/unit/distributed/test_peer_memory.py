"""PeerMemory, over a driver that notes what is allocated and opened. On GPUs: tests/distributed/test_gpu_ranks.py."""

import ctypes
from pathlib import Path
from typing import Any

import pytest

from nanovllm.distributed import peer_memory
from nanovllm.distributed.peer_memory import HANDLE_BYTES, PeerMemory, buffer_bytes, fits

INVALID_VALUE, PEER_ACCESS_UNSUPPORTED = 1, 217


class Driver:
    """libcuda.so.1 in one process: a handle is its buffer's address."""

    def __init__(self, failing: str = "", code: int = INVALID_VALUE) -> None:
        self.failing, self.code = failing, code
        self.allocated: dict[int, int] = {}
        self.opened: list[int] = []

    def __getattribute__(self, name: str) -> Any:
        failing = object.__getattribute__(self, "failing")
        return (lambda *_: self.code) if name == failing else object.__getattribute__(self, name)

    def cuMemAlloc_v2(self, pointer: Any, num_bytes: Any) -> int:
        address = 4096 * (1 + len(self.allocated))
        pointer._obj.value = address
        self.allocated[address] = num_bytes.value
        return 0

    def cuMemsetD16_v2(self, pointer: Any, value: Any, count: Any) -> int:
        assert (value.value, 2 * count.value) == (peer_memory.EMPTY, self.allocated[pointer.value])
        return 0

    def cuCtxSynchronize(self) -> int:
        return 0

    def cuIpcGetMemHandle(self, handle: Any, pointer: Any) -> int:
        ctypes.memmove(ctypes.addressof(handle._obj), bytes(ctypes.c_uint64(pointer.value)), 8)
        return 0

    def cuIpcOpenMemHandle_v2(self, pointer: Any, handle: Any, flags: Any) -> int:
        assert flags.value == 1
        pointer._obj.value = 2**40 + ctypes.c_uint64.from_buffer_copy(handle).value
        self.opened.append(pointer._obj.value)
        return 0

    def cuIpcCloseMemHandle(self, pointer: Any) -> int:
        self.opened.remove(pointer.value)
        return 0

    def cuMemFree_v2(self, pointer: Any) -> int:
        del self.allocated[pointer.value]
        return 0


def memories(driver: Driver) -> list[PeerMemory]:
    return [PeerMemory(rank, 3, driver, device="cpu") for rank in range(3)]


def test_each_rank_has_its_own_buffer_and_opens_the_others() -> None:
    driver = Driver()
    ranks = memories(driver)
    assert list(driver.allocated.values()) == [buffer_bytes(3)] * 3
    assert all(memory.connect([other.message for other in ranks]) for memory in ranks)
    assert ranks[1].buffers.addresses.tolist() == [2**40 + 4096, 2 * 4096, 2**40 + 3 * 4096]
    assert ranks[1].buffers.rank == 1
    ranks[1].abort()
    assert [memory.buffers.is_aborted.item() for memory in ranks] == [0, 1, 0]
    for memory in ranks:
        memory.close()
        memory.close()
    assert (driver.allocated, driver.opened) == ({}, [])


@pytest.mark.parametrize(
    "failing", ["cuMemAlloc_v2", "cuMemsetD16_v2", "cuCtxSynchronize", "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2"]
)
def test_what_the_driver_refuses_is_told_and_leaves_nothing(failing: str) -> None:
    driver = Driver(failing, PEER_ACCESS_UNSUPPORTED)
    ranks = memories(driver)
    assert not any(memory.connect([other.message for other in ranks]) for memory in ranks)
    for memory in ranks:
        memory.close()
    assert (driver.allocated, driver.opened) == ({}, [])


@pytest.mark.parametrize(("num_ranks", "num_bytes"), [(2, 2 * 2**20), (4, 2**20), (8, 3 * 2**20 // 7)])
def test_what_fits_the_slots_and_what_a_rank_may_send(num_ranks: int, num_bytes: int) -> None:
    assert fits(num_bytes, num_ranks)
    assert not fits(num_bytes + 1, num_ranks)


def test_a_rank_of_another_machine_is_not_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = Driver()
    here = PeerMemory(0, 2, driver, device="cpu")
    (tmp_path / "boot_id").write_bytes(b"another")
    monkeypatch.setattr(peer_memory, "BOOT_ID", tmp_path / "boot_id")
    there = PeerMemory(1, 2, driver, device="cpu")
    assert here.message[HANDLE_BYTES:] != there.message[HANDLE_BYTES:]
    assert not here.connect([here.message, there.message])
    assert driver.opened == []
