"""Config: an engine's options."""

import os
from dataclasses import dataclass

from transformers import AutoConfig


@dataclass
class Config:
    model: str
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    tensor_parallel_size: int = 1
    hf_config: AutoConfig | None = None
    eos: int = -1
    kvcache_block_size: int = 256
    num_kvcache_blocks: int = -1
    prefills_in_a_row: int = 4  # an option that upstream does not have

    def __post_init__(self):
        if not os.path.isdir(self.model):
            raise ValueError(f"no folder {self.model}")
        if self.kvcache_block_size % 256:
            raise ValueError("kvcache_block_size must be a multiple of 256")
        self.hf_config = AutoConfig.from_pretrained(self.model)
        self.max_model_len = min(self.max_model_len, self.hf_config.max_position_embeddings)
