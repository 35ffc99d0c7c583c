"""PeerMemory: a buffer on each rank's GPU into which the kernels of all other ranks write. See kernels.all_reduce.

CUDA's driver is called directly, because torch's symmetric memory numbers its exchanges within a process: rank 0's
second engine would wait for new processes that have counted less.
"""

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nanovllm.distributed.tensor_parallel import TensorParallel

MAX_PROGRAMS = 2048  # of 64 threads each with two ranks: all of a launch run at once on an A100 or H100
SLOT_BYTES = 1024
EMPTY = 0x8000  # of each 16 bits: -0.0 in half precision, and a number near zero that float32 sums do not miss
MAX_SENT_BYTES = 3 * 2**20  # by each rank: as measured, NCCL is as fast or faster for more
HANDLE_BYTES = 64  # cuda.h: CU_IPC_HANDLE_SIZE
LAZY_ENABLE_PEER_ACCESS = 1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # tells machines apart


def buffer_bytes(num_ranks: int) -> int:
    """Of one rank's buffer: [2, num_ranks, MAX_PROGRAMS] slots."""
    return 2 * num_ranks * MAX_PROGRAMS * SLOT_BYTES


def fits(num_bytes: float, num_ranks: int) -> bool:
    """Whether an all-reduce of num_bytes is small enough for the buffers, and for its kernel to be as fast as NCCL."""
    return num_bytes <= MAX_PROGRAMS * SLOT_BYTES and (num_ranks - 1) * num_bytes <= MAX_SENT_BYTES


@dataclass(frozen=True)
class PeerBuffers:
    """What the kernel of a rank is given.

    addresses: [num_ranks] int64 on the device, of every rank's buffer, of buffer_bytes, EMPTY at first.
    counts: [MAX_PROGRAMS] int32 on the device, the launches of each program so far.
    is_aborted: [1] int32 in page-locked memory of the host; not 0 ends the kernels that wait.
    """

    rank: int
    addresses: torch.Tensor
    counts: torch.Tensor
    is_aborted: torch.Tensor


class _Handle(ctypes.Structure):  # opens a buffer in another process; a structure, since CUDA takes it by value
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


class PeerMemoryError(Exception):
    """A rank has no buffer that another can write into."""


class PeerMemory:
    """This rank's buffer, and its access to those of the others once connect() has returned True.

    message: what the other ranks need; b"" if there is no buffer.
    """

    buffers: PeerBuffers

    def __init__(self, rank: int, num_ranks: int, driver: Any, device: str = "cuda") -> None:
        """driver: libcuda.so.1, loaded by ctypes."""
        self._rank, self._driver, self._device = rank, driver, device
        self._own = ctypes.c_uint64()
        self._opened: list[ctypes.c_uint64] = []
        self.message = b""
        num_bytes, handle = buffer_bytes(num_ranks), _Handle()
        with suppress(PeerMemoryError):
            self._call("cuMemAlloc_v2", ctypes.byref(self._own), ctypes.c_size_t(num_bytes))
            self._call("cuMemsetD16_v2", self._own, ctypes.c_ushort(EMPTY), ctypes.c_size_t(num_bytes // 2))
            self._call("cuCtxSynchronize")
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), self._own)
            self.message = bytes(handle) + BOOT_ID.read_bytes()

    def connect(self, messages: list[bytes]) -> bool:
        """Whether this rank can write into the buffers of all ranks, whose messages these are, in rank order."""
        try:
            addresses = [
                self._own.value if rank == self._rank else self._open(message) for rank, message in enumerate(messages)
            ]
        except PeerMemoryError:
            return False
        self.buffers = PeerBuffers(
            self._rank,
            torch.tensor(addresses, dtype=torch.int64, device=self._device),
            torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=self._device),
            torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=self._device == "cuda"),
        )
        return True

    def _open(self, message: bytes) -> int:
        if not message or not self.message or message[HANDLE_BYTES:] != self.message[HANDLE_BYTES:]:
            raise PeerMemoryError("one of the two ranks has no buffer, or they are on different machines")
        address, handle = ctypes.c_uint64(), _Handle.from_buffer_copy(message)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(LAZY_ENABLE_PEER_ACCESS))
        self._opened.append(address)
        return address.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            raise PeerMemoryError(f"{name} failed with CUDA's error {code}")

    def abort(self) -> None:
        """End the kernels that wait for another rank, now and from now on."""
        self.buffers.is_aborted.fill_(1)

    def close(self) -> None:
        """Free the buffer, and the access to the others. No kernel may use them any more. May be called again."""
        for address in self._opened:
            self._driver.cuIpcCloseMemHandle(address)
        self._opened.clear()
        if self._own.value:
            self._driver.cuMemFree_v2(self._own)  # waits for the device
            self._own.value = 0


def connect_peer_memory(tp: "TensorParallel") -> PeerMemory | None:
    """This rank's PeerMemory; None on every rank if one of them cannot write into another's memory: because of the
    machine's topology, because the ranks are on several machines, or because the GPUs are not NVIDIA's. All ranks call
    it.
    """
    if torch.version.hip is not None:
        return None
    memory = PeerMemory(tp.rank, tp.size, ctypes.CDLL("libcuda.so.1"))
    is_connected = False
    try:
        can_write = memory.connect(_exchange(tp, memory.message))
        is_connected = tp.all_reduce_min(can_write) == 1
    finally:
        if not is_connected:
            memory.close()
    return memory if is_connected else None


def _exchange(tp: "TensorParallel", message: bytes) -> list[bytes]:
    """The messages of all ranks, in rank order; at most 255 bytes each."""
    sent = torch.zeros(256, dtype=torch.uint8, device="cpu")
    sent[: len(message) + 1] = torch.tensor([len(message), *message], dtype=torch.uint8, device="cpu")
    return [bytes(numbers[1 : 1 + numbers[0]]) for numbers in (x.tolist() for x in tp.all_gather(sent.cuda()))]
