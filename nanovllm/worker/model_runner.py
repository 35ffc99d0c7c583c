"""ModelRunner: one rank's model and KV cache, and the computing of a step."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch

from nanovllm.config import Config
from nanovllm.context import Context, set_context
from nanovllm.engine.model_input import ModelInput, prepare_decode, prepare_prefill, prepare_warmup
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.layers.attention import Attention
from nanovllm.layers.attention_backend import choose_attention_backend
from nanovllm.layers.sampler import Sampler, SamplingTensors
from nanovllm.model_config import ModelConfig
from nanovllm.models.loader import load_model
from nanovllm.models.registry import build_model
from nanovllm.worker.kv_cache import block_bytes, num_blocks_on_cpu, num_blocks_that_fit


class ModelRunner:
    """Loads the model, warms it up, sizes the KV cache, runs steps.

    kv_cache: [2, num_layers, num_kv_cache_blocks, block_size, num_kv_heads, head_dim], keys and values.
    Raises ValueError for a device that is not there and for memory that does not suffice; everything the model
    loader raises passes through. torch's default dtype and device are as before, whatever happens.
    """

    def __init__(self, config: Config, model_config: ModelConfig, model_dir: Path) -> None:
        self.config = config
        self.model_config = model_config if config.dtype == "auto" else replace(model_config, dtype=config.dtype)
        self.device = _resolve_device(config.device)
        self.dtype: torch.dtype = getattr(torch, self.model_config.dtype)
        backend = choose_attention_backend(
            config.attention_backend, self.device, self.dtype, model_config.head_dim, config.kv_cache_block_size
        )
        with self.device:
            self.model = build_model(self.model_config, backend)
        load_model(self.model, model_dir)
        self.model.eval()
        self.sampler = Sampler()
        if self.device.type == "cuda":
            self.warmup_model()
        self.num_kv_cache_blocks = config.num_kv_cache_blocks or self._num_blocks_that_fit()
        self.kv_cache = self.allocate_kv_cache()

    def warmup_model(self) -> None:
        """Run the largest step there can be, so that its memory is known and its kernels are compiled."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._launch(
            prepare_warmup(
                self.config.max_num_batched_tokens,
                self.config.max_model_len,
                self.config.max_num_seqs,
                self.config.kv_cache_block_size,
            )
        )
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def allocate_kv_cache(self) -> torch.Tensor:
        """The cache tensor, bound to the model's attention layers. Never-written slots hold what was in memory."""
        model = self.model_config
        kv_cache = torch.empty(
            (
                2,
                model.num_hidden_layers,
                self.num_kv_cache_blocks,
                self.config.kv_cache_block_size,
                model.num_key_value_heads,
                model.head_dim,
            ),
            dtype=self.dtype,
            device=self.device,
        )
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        for layer, k_cache, v_cache in zip(layers, kv_cache[0], kv_cache[1], strict=True):
            layer.bind_kv_cache(k_cache, v_cache)
        return kv_cache

    def _num_blocks_that_fit(self) -> int:
        model, config = self.model_config, self.config
        bytes_per_block = block_bytes(
            model.num_hidden_layers,
            config.kv_cache_block_size,
            model.num_key_value_heads,
            model.head_dim,
            self.dtype.itemsize,
        )
        if self.device.type != "cuda":
            return num_blocks_on_cpu(
                psutil.virtual_memory().available,
                bytes_per_block,
                config.max_num_seqs,
                math.ceil(config.max_model_len / config.kv_cache_block_size),
            )
        free, total = torch.cuda.mem_get_info(self.device)
        stats = torch.cuda.memory_stats(self.device)
        return num_blocks_that_fit(
            total,
            config.gpu_memory_utilization,
            used=total - free,
            peak=stats["allocated_bytes.all.peak"],
            current=stats["allocated_bytes.all.current"],
            bytes_per_block=bytes_per_block,
        )

    # --- one step ---

    def run(self, batch: ScheduledBatch) -> list[int]:
        """Compute `batch`; the new token ids of batch.sampled_sequences, in their order."""
        prepare = prepare_prefill if batch.is_prefill else prepare_decode
        return self._launch(prepare(batch.sequences)).tolist()

    @torch.inference_mode()
    def _launch(self, model_input: ModelInput) -> torch.Tensor:
        """Token ids [num_samples] int64, on the device: a GPU may still be computing them."""
        if not len(model_input.sample_indices):  # every prompt in the batch has another chunk to come
            self.run_model(model_input)
            return torch.empty(0, dtype=torch.int64)
        logits = self.model.compute_logits(self.run_model(model_input)[self._tensor(model_input.sample_indices)])
        return self.sampler(logits, SamplingTensors.from_rows(model_input.sampling, self.device))

    @torch.inference_mode()
    def run_model(self, model_input: ModelInput) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] of one forward pass; writes the KV cache."""
        with set_context(self._context(model_input)):
            return self.model(self._tensor(model_input.input_ids), self._tensor(model_input.positions))

    def _context(self, model_input: ModelInput) -> Context:
        block_tables = model_input.block_tables
        return Context(
            is_prefill=model_input.is_prefill,
            slot_mapping=self._tensor(model_input.slot_mapping),
            cu_seqlens_q=self._tensor(model_input.cu_seqlens_q),
            cu_seqlens_k=self._tensor(model_input.cu_seqlens_k),
            max_seqlen_q=model_input.max_seqlen_q,
            max_seqlen_k=model_input.max_seqlen_k,
            context_lens=self._tensor(model_input.context_lens),
            block_tables=None if block_tables is None else self._tensor(block_tables),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        """Drop model and cache, and give their memory back to the device."""
        del self.model, self.kv_cache
        gc.collect()  # modules refer to each other in cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _resolve_device(name: str) -> torch.device:
    """torch.device of Config.device. Raises ValueError for cuda where there is none."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("device must be 'cpu' on a machine where torch finds no GPU, got 'cuda'; use 'auto' or 'cpu'")
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
