"""Cases of attention kernels: sequences with their keys in a paged cache, or packed, in several layouts of memory."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch

from reference.packing import varlen_attention
from reference.paged_attention import paged_attention
from tests.support.attention_cases import running_sum
from tests.support.kernels.accuracy import assert_like_reference
from tests.support.kernels.guards import Guards
from tests.support.kernels.registry import meta

NO_BLOCK = 2**30  # fills the block tables: a kernel that follows it leaves the cache by far
FAR = 2**31


@dataclass(frozen=True)
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor | None

    def dense(self, guards: Guards) -> "Inputs":
        copies = {name: guards.read(tensor) for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **copies)

    def strided(self, guards: Guards) -> "Inputs":
        """Views: query, key and value of a packed qkv, or caches of a cache of 2 layers that stores head by head and a
        narrow table of a wide one. What lies between is NaN."""
        dtype, (num_tokens, num_heads, head_dim) = self.query.dtype, self.query.shape
        num_kv_heads = self.key.shape[-2]
        qkv = guards.unwritten(num_tokens, num_heads + 2 * num_kv_heads + 1, head_dim, dtype=dtype)
        query, key, value, _ = qkv.split([num_heads, num_kv_heads, num_kv_heads, 1], dim=1)
        tables = None
        if self.block_tables is not None:
            num_blocks, block_size, heads, _ = self.key.shape
            caches = guards.unwritten(2, num_blocks, 2, heads, block_size, head_dim, dtype=dtype)
            key, value = caches[:, :, 1].transpose(2, 3)
            wide = guards.unwritten(len(self.block_tables), 20, dtype=torch.int32)
            tables = wide[:, 3 : 3 + self.block_tables.shape[1]].copy_(self.block_tables)
        for view, tensor in zip((query, key, value), (self.query, self.key, self.value), strict=True):
            view.copy_(tensor)
        return replace(self.dense(guards), query=query, key=key, value=value, block_tables=tables)

    def strided_apart(self, guards: Guards) -> "Inputs":
        """As strided, but values lie in a cache of another layout than keys: token by token."""
        num_blocks, block_size, heads, head_dim = self.value.shape
        wide = guards.unwritten(2, num_blocks, block_size, heads + 1, head_dim, dtype=self.value.dtype)
        return replace(self.strided(guards), value=wide[1, :, :, 1:].copy_(self.value))

    def far(self, guards: Guards) -> "Inputs":
        """D52: the blocks, or the second of two packed tokens, lie beyond 2**31 elements, of which a CPU touches a few
        pages. Keys and values share one cache."""
        if self.block_tables is None:
            storage = torch.empty(FAR + 64, dtype=self.query.dtype, device=guards.device)
            views = [storage[start:].as_strided(self.query.shape, (FAR - 64, 32, 1)) for start in (0, 32, 64)]
            for view, tensor in zip(views, (self.query, self.key, self.value), strict=True):
                view.copy_(tensor)
            return replace(self, query=views[0], key=views[1], value=views[2])
        num_blocks = FAR // self.key[0].numel() + 8
        cache = torch.empty(num_blocks, *self.key.shape[1:], dtype=self.key.dtype, device=guards.device)
        first = num_blocks - len(self.key)
        cache[first:] = self.key
        return replace(self, key=cache, value=cache, block_tables=self.block_tables + first)

    def assert_right(self, kernel: str, output: torch.Tensor) -> None:
        """Off by at most RATIO (see accuracy.py) times the reference's error in the inputs' own dtype, and one unit in
        the last place.
        """
        assert output.shape == self.query.shape
        if not len(output):
            return
        bounds = self.cu_seqlens_q.tolist()

        def place(index: tuple[int, ...]) -> str:
            sequence = bisect_right(bounds, index[0]) - 1
            return f"sequence {sequence}, query {index[0] - bounds[sequence]}, head {index[1]}, dimension {index[2]}"

        def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if self.block_tables is None:
                return varlen_attention(query, key, value, self.cu_seqlens_q, self.cu_seqlens_k)
            return paged_attention(query, key, value, self.block_tables, self.context_lens, self.cu_seqlens_q)

        assert_like_reference(kernel, output, reference, (self.query, self.key, self.value), place)


@dataclass(frozen=True)
class AttentionCase:
    """A check of sequences of (number of queries, number of keys). block_size 0: key and value are packed.

    memory: one of the layouts of Inputs.
    """

    kernel: ClassVar[str]
    lengths: tuple[tuple[int, int], ...]
    block_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    query_size: float = 1.0
    memory: str = "dense"
    seed: int = 0

    @property
    def max_seqlen_q(self) -> int:
        return max((q_len for q_len, _ in self.lengths), default=0)

    def run(self, inputs: Inputs) -> torch.Tensor:
        """The kernel's output."""
        raise NotImplementedError

    def __call__(self, device: str) -> None:
        guards, plain = Guards(device), self.make_inputs(device)
        inputs = getattr(plain, self.memory)(guards)
        with guards:
            output = self.run(inputs)
        plain.assert_right(self.kernel, output)

    def make_inputs(self, device: str = "cpu") -> Inputs:
        generator = torch.Generator().manual_seed(self.seed)
        q_lens, k_lens = [q for q, _ in self.lengths], [k for _, k in self.lengths]
        query = torch.randn(sum(q_lens), self.num_heads, self.head_dim, generator=generator) * self.query_size
        integers = running_sum(q_lens), running_sum(k_lens), torch.tensor(k_lens, dtype=torch.int32)
        if self.block_size:
            key, value, tables = self._poisoned_caches(k_lens, device)
        else:
            shape = (sum(k_lens), self.num_kv_heads, self.head_dim)
            key, value = (torch.randn(shape, generator=generator).to(device, self.dtype) for _ in range(2))
            tables = None
        if self.memory == "far" and tables is not None:
            value = key
        return Inputs(query.to(device, self.dtype), key, value, *(one.to(device) for one in integers), tables)

    def _poisoned_caches(self, lengths: list[int], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(k_cache, v_cache, block_tables) of sequences of `lengths` keys, which are random.

        D53: every slot that no sequence owns is NaN. There are two blocks more than are used.
        """
        block_size, generator = self.block_size, torch.Generator().manual_seed(self.seed)
        num_blocks = [-(-length // block_size) for length in lengths]
        block_ids = torch.randperm(sum(num_blocks) + 2, generator=generator)
        block_tables = torch.full((len(lengths), max(num_blocks, default=0) + 1), NO_BLOCK, dtype=torch.int32)
        is_owned = torch.zeros(len(block_ids), block_size, dtype=torch.bool)
        for table, ids, length in zip(block_tables, block_ids.split([*num_blocks, 2]), lengths, strict=False):
            table[: len(ids)] = ids
            position = torch.arange(length)
            is_owned[ids[position // block_size], position % block_size] = True
        is_free = ~is_owned.to(device)[:, :, None, None]
        shape = (*is_owned.shape, self.num_kv_heads, self.head_dim)
        # Small caches are drawn on the CPU, so that a case is the same on every device; large ones where that is fast.
        drawn_on = "cpu" if prod(shape) < 2**20 else device
        generator = torch.Generator(drawn_on).manual_seed(self.seed)
        caches = [torch.randn(shape, generator=generator, device=drawn_on) for _ in "kv"]
        k_cache, v_cache = (cache.to(device, self.dtype).masked_fill_(is_free, torch.nan) for cache in caches)
        return k_cache, v_cache, block_tables.to(device)


def meta_qkv(
    dtype: torch.dtype = torch.float16, head_dim: int = 32, block_size: int = 16, num_heads: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(query, key, value, block_tables) of 300 tokens and 2 kv heads, without contents. block_size 0: packed."""
    query, key, value = meta(300, num_heads + 4, head_dim, dtype=dtype).split([num_heads, 2, 2], dim=1)
    if not block_size:
        return query, key, value, None
    key, value = meta(2, 4, 100, block_size, 2, head_dim, dtype=dtype)[:, 0]
    return query, key, value, meta(2, 4096 // block_size, dtype=torch.int32)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Its like, of which the last dimension is not contiguous."""
    return torch.empty((*tensor.shape, 2), dtype=tensor.dtype, device="meta")[..., 0]
