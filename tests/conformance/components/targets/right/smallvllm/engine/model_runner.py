"""ModelRunner: prepares the tensors of a step."""

import torch
import torch.distributed as dist
from flash_attn import flash_attn_varlen_func
from smallvllm.engine.sequence import Sequence
from smallvllm.utils.context import set_context


class ModelRunner:
    def __init__(self, config):
        dist.init_process_group("nccl", world_size=1, rank=0)
        torch.cuda.set_device(0)
        self.attention = flash_attn_varlen_func
        self.block_size = config.kvcache_block_size

    def tensor(self, values: list, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, pin_memory=True).cuda(non_blocking=True)

    def slot(self, seq: Sequence, position: int) -> int:
        return seq.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def block_tables(self, seqs: list[Sequence]) -> torch.Tensor:
        width = max(len(seq.block_table) for seq in seqs)
        return self.tensor([seq.block_table + [-1] * (width - len(seq.block_table)) for seq in seqs])

    def prepare_prefill(self, seqs: list[Sequence]):
        input_ids, positions, slots, cu_seqlens_q, cu_seqlens_k = [], [], [], [0], [0]
        for seq in seqs:
            start = seq.num_cached_tokens
            end = start + seq.num_scheduled_tokens
            input_ids += seq.token_ids[start:end]
            positions += range(start, end)
            slots += [self.slot(seq, position) for position in range(start, end)]
            cu_seqlens_q.append(cu_seqlens_q[-1] + end - start)
            cu_seqlens_k.append(cu_seqlens_k[-1] + end)
        has_cached_keys = any(seq.num_cached_tokens for seq in seqs)
        set_context(
            True,
            cu_seqlens_q=self.tensor(cu_seqlens_q),
            cu_seqlens_k=self.tensor(cu_seqlens_k),
            slot_mapping=self.tensor(slots),
            block_tables=self.block_tables(seqs) if has_cached_keys else None,
        )
        return self.tensor(input_ids, torch.int64), self.tensor(positions, torch.int64)

    def prepare_decode(self, seqs: list[Sequence]):
        """The placeholder of this step's own token is not computed yet."""
        lengths = [len(seq) + max(seq.num_output_placeholders - 1, 0) for seq in seqs]
        positions = [length - 1 for length in lengths]
        slots = [self.slot(seq, length - 1) for seq, length in zip(seqs, lengths, strict=True)]
        context_lens = list(lengths)
        set_context(
            False,
            slot_mapping=self.tensor(slots),
            context_lens=self.tensor(context_lens),
            block_tables=self.block_tables(seqs),
        )
        return self.tensor([seq.last_token for seq in seqs], torch.int64), self.tensor(positions, torch.int64)

    def prepare_sample(self, seqs: list[Sequence]):
        return self.tensor([seq.temperature for seq in seqs], torch.float32)
