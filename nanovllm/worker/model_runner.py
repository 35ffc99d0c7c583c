"""ModelRunner: one rank's model and KV cache, and the computing of a step.

It is one file of over 300 lines because loading, warming up, sizing the cache and running share the model, the cache
and the graphs.
"""

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from nanovllm.attention.backend import AttentionRequirements
from nanovllm.config import Config
from nanovllm.context import Context, set_context
from nanovllm.distributed.placement import resolve_device
from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.engine.model_input import ModelInput, prepare_decode, prepare_decode_async, prepare_prefill
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.layers.attention import Attention
from nanovllm.layers.sampler import Sampler
from nanovllm.layers.select_ops import select_ops
from nanovllm.model_config import ModelConfig
from nanovllm.models.decoder import build_model
from nanovllm.models.loader import load_model
from nanovllm.sampling_metadata import SamplingMetadata
from nanovllm.worker.async_output import AsyncModelOutput
from nanovllm.worker.cpu_threads import choose_num_threads, torch_threads
from nanovllm.worker.cuda_graph import CUDAGraphRunner, graph_batch_sizes
from nanovllm.worker.kv_cache import block_bytes, cache_too_large, num_blocks_on_cpu, num_blocks_that_fit
from nanovllm.worker.torch_state import gpu_lock, plain_torch_state
from nanovllm.worker.warmup import prefill_warmup_shapes, prepare_profile_run

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence

BYTES_PER_GRAPH = 8 * 2**20  # of the driver, for one recorded graph beside its tensors


class ModelRunner:
    """Loads the model, warms it up, sizes the KV cache, runs steps.

    tp: which of the ranks this is. num_ranks_per_device: ranks that use its device's memory. The number of KV blocks
    is the minimum over all ranks. on_tensor_loaded is called repeatedly while weights are loaded, and may raise.
    kv_cache: [2, num_layers, num_kv_cache_blocks, block_size, num_kv_heads, head_dim], this rank's keys and values.
    Raises ValueError for a device that is not there and for memory that does not suffice; everything the model
    loader raises passes through. What surrounds the call in torch (plain_torch_state) changes nothing here, and is as
    before, whatever happens.
    """

    def __init__(
        self,
        config: Config,
        model_config: ModelConfig,
        model_dir: Path,
        tp: TensorParallel = SINGLE_RANK,
        num_ranks_per_device: int = 1,
        on_tensor_loaded: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.tp = tp
        self.num_ranks_per_device = num_ranks_per_device
        self.model_config = model_config if config.dtype == "auto" else replace(model_config, dtype=config.dtype)
        self.device = resolve_device(config.device)
        self.dtype: torch.dtype = getattr(torch, self.model_config.dtype)
        with plain_torch_state(self.device, is_inference=False):
            self._start(model_dir, on_tensor_loaded)

    def _start(self, model_dir: Path, on_tensor_loaded: Callable[[], None] | None) -> None:
        config, model_config, tp = self.config, self.model_config, self.tp
        requirements = AttentionRequirements(self.device, self.dtype, model_config.head_dim, config.kv_cache_block_size)
        ops = select_ops(config.attention_backend, requirements)
        self.num_threads = (
            choose_num_threads(model_config, self.num_ranks_per_device) if self.device.type == "cpu" else None
        )
        with self.device:
            self.model = build_model(self.model_config, ops, tp)
        self.num_kv_heads = self._attention_layers()[0].num_kv_heads
        load_model(self.model, model_dir, use_tqdm=tp.rank == 0, on_tensor_loaded=on_tensor_loaded)
        self.model.eval()
        self.sampler = Sampler(ops.sample_unfiltered)
        self.graphs: CUDAGraphRunner | None = None
        is_graph_safe = tp.is_graph_safe and ops.is_graph_safe
        is_captured = self.device.type == "cuda" and not config.enforce_eager and is_graph_safe
        if self.device.type == "cuda":
            self.warmup_model()
        if config.num_kv_cache_blocks is None:
            graph_bytes = self._measure_graph_bytes() if is_captured else 0
            tp.barrier()  # ranks that share a device measure when all have taken what they need
            self.num_kv_cache_blocks = tp.all_reduce_min(self._num_blocks_that_fit(graph_bytes))
        else:
            self.num_kv_cache_blocks = config.num_kv_cache_blocks
        self.kv_cache = self.allocate_kv_cache()
        if self.device.type == "cuda":
            self._compile_kinds_of_prefill()
        if is_captured:
            self.graphs = self._capture_graphs(graph_batch_sizes(config.max_num_seqs))
        if self.device.type == "cuda":
            gc.collect()  # 0.2 s for all that torch and transformers made: else some request waits for it

    def warmup_model(self) -> None:
        """Run the largest step there can be, so that its memory is known and its kernels are compiled."""
        with gpu_lock:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._launch(
                prepare_profile_run(
                    self.config.max_num_batched_tokens,
                    self.config.max_model_len,
                    self.config.max_num_seqs,
                    self.config.kv_cache_block_size,
                )
            )
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _compile_kinds_of_prefill(self) -> None:
        """So that no request waits for the compiler: warmup_model, before there is a cache, meets one kind only."""
        config = self.config
        for model_input in prefill_warmup_shapes(
            config.max_num_batched_tokens,
            config.max_model_len,
            config.max_num_seqs,
            self.num_kv_cache_blocks,
            config.kv_cache_block_size,
        ):
            self._launch(model_input)
        with gpu_lock:
            torch.cuda.synchronize(self.device)

    def allocate_kv_cache(self) -> torch.Tensor:
        """The cache tensor, bound to the model's attention layers. Never-written slots hold what was in memory."""
        model = self.model_config
        shape = (
            2,
            model.num_hidden_layers,
            self.num_kv_cache_blocks,
            self.config.kv_cache_block_size,
            self.num_kv_heads,
            model.head_dim,
        )
        num_bytes = math.prod(shape) * self.dtype.itemsize
        try:
            if self.device.type == "cpu" and num_bytes > psutil.virtual_memory().total:
                raise MemoryError  # Linux would lend more than there is, and kill the process when it is used
            kv_cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        except (RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
            is_given = self.config.num_kv_cache_blocks is not None
            raise cache_too_large(self.num_kv_cache_blocks, num_bytes, str(self.device), is_given) from error
        for layer, k_cache, v_cache in zip(self._attention_layers(), kv_cache[0], kv_cache[1], strict=True):
            layer.bind_kv_cache(k_cache, v_cache)
        return kv_cache

    def _attention_layers(self) -> list[Attention]:
        return [module for module in self.model.modules() if isinstance(module, Attention)]

    def _num_blocks_that_fit(self, graph_bytes: int) -> int:
        model, config = self.model_config, self.config
        bytes_per_block = self.num_ranks_per_device * block_bytes(
            model.num_hidden_layers,
            config.kv_cache_block_size,
            self.num_kv_heads,
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
        current = stats["allocated_bytes.all.current"]
        return num_blocks_that_fit(
            total,
            config.gpu_memory_utilization,
            used=total - free + self.num_ranks_per_device * graph_bytes,
            peak=current + self.num_ranks_per_device * (stats["allocated_bytes.all.peak"] - current),
            current=current,
            bytes_per_block=bytes_per_block,
        )

    # --- CUDA graphs ---

    @torch.inference_mode()
    def _capture_graphs(self, batch_sizes: list[int], use_tqdm: bool = True) -> CUDAGraphRunner:
        def forward(input_ids: torch.Tensor, positions: torch.Tensor, context: Context) -> torch.Tensor | None:
            with set_context(context):
                return self.model.compute_logits(self.model(input_ids, positions))

        max_blocks_per_seq = math.ceil(self.config.max_model_len / self.config.kv_cache_block_size)
        use_tqdm = use_tqdm and self.tp.rank == 0
        return CUDAGraphRunner(
            forward, batch_sizes, max_blocks_per_seq, self.config.max_model_len, self.device, use_tqdm
        )

    def _measure_graph_bytes(self) -> int:
        """Device memory that the graphs will hold, read off the largest, captured over a cache of one block.

        The smaller ones share its memory; what each holds besides is the driver's, about BYTES_PER_GRAPH.
        """
        batch_sizes = graph_batch_sizes(self.config.max_num_seqs)
        self.num_kv_cache_blocks = 1
        with gpu_lock:
            cache = self.allocate_kv_cache()
            free_before, _ = torch.cuda.mem_get_info(self.device)
            graphs = self._capture_graphs(batch_sizes[-1:], use_tqdm=False)
            torch.cuda.synchronize(self.device)
            free_after, _ = torch.cuda.mem_get_info(self.device)
            graphs.close()
            del cache, graphs
            torch.cuda.empty_cache()
        return free_before - free_after + BYTES_PER_GRAPH * len(batch_sizes)

    # --- one step ---

    # Sequences -> ModelInput: pure functions, the same on every rank, so that the ranks cannot disagree.
    prepare_prefill = staticmethod(prepare_prefill)
    prepare_decode = staticmethod(prepare_decode)
    prepare_decode_async = staticmethod(prepare_decode_async)

    def run(self, batch: ScheduledBatch) -> list[int]:
        """Compute `batch`; the new token ids of batch.sampled_sequences, in their order (none on ranks but 0)."""
        with plain_torch_state(self.device, is_inference=True):
            return self._launch(self._prepare(batch)).tolist()

    def launch(
        self,
        batch: ScheduledBatch,
        previous_sequences: "tuple[Sequence, ...] | None" = None,
        previous_tokens: torch.Tensor | None = None,
    ) -> AsyncModelOutput:
        """As run, but does not wait.

        previous_sequences: those that the step submitted last samples, when `batch` is what Scheduler.schedule_next_async
            chose to follow it. previous_tokens: their token ids, int64, on the device; on ranks other than 0 None, as
            rank 0 broadcasts them.
        """
        with plain_torch_state(self.device, is_inference=True):
            if previous_sequences is None:
                return AsyncModelOutput(batch, self._launch(self._prepare(batch)))
            model_input = self.prepare_decode_async(batch.sequences, previous_sequences)
            return AsyncModelOutput(batch, self._launch(model_input, len(previous_sequences), previous_tokens))

    def _prepare(self, batch: ScheduledBatch) -> ModelInput:
        return (self.prepare_prefill if batch.is_prefill else self.prepare_decode)(batch.sequences)

    @torch.inference_mode()
    def _launch(
        self, model_input: ModelInput, num_previous: int = 0, previous_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token ids [num_samples] int64, on the device: a GPU may still be computing them.

        previous_tokens: the num_previous token ids of the step before, on rank 0, when model_input has unknown tokens.
        """
        with torch_threads(self.num_threads), gpu_lock if self.device.type == "cuda" else nullcontext():
            sampled_before = None
            if model_input.input_ids_source is not None:
                if previous_tokens is None:
                    previous_tokens = torch.empty(num_previous, dtype=torch.int64, device=self.device)
                sampled_before = self.tp.broadcast(previous_tokens)
            logits = self._sampled_logits(model_input, sampled_before)
            if logits is None:
                return torch.empty(0, dtype=torch.int64)
            return self.sampler(logits, to_device(model_input.sampling, self.device))

    def _sampled_logits(self, model_input: ModelInput, sampled_before: torch.Tensor | None) -> torch.Tensor | None:
        """[num_samples, vocab_size]; None on ranks but 0, and when every prompt has another chunk to come."""
        input_ids = None if model_input.input_ids_source is None else self._input_ids(model_input, sampled_before)
        if self.graphs is not None and self.graphs.can_replay(model_input):
            return self.graphs.replay(model_input, input_ids)
        hidden_states = self.run_model(model_input, input_ids)
        if not len(model_input.sample_indices):
            return None
        return self.model.compute_logits(hidden_states[self._tensor(model_input.sample_indices)])

    def _input_ids(self, model_input: ModelInput, sampled_before: torch.Tensor | None) -> torch.Tensor:
        """model_input.input_ids on the device, with those of the unknown tokens."""
        assert model_input.input_ids_source is not None
        assert sampled_before is not None
        rows = self._tensor(model_input.input_ids_source)
        return torch.where(rows >= 0, sampled_before[rows.clamp(min=0)], self._tensor(model_input.input_ids))

    @torch.inference_mode()
    def run_model(self, model_input: ModelInput, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] of one forward pass; writes the KV cache. input_ids: instead of
        model_input's.
        """
        if input_ids is None:
            input_ids = self._tensor(model_input.input_ids)
        with set_context(self._context(model_input)):
            return self.model(input_ids, self._tensor(model_input.positions))

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
            sequence_order=self._tensor(model_input.sequence_order),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        """Drop graphs, model and cache, and give their memory back to the device."""
        is_gpu = self.device.type == "cuda"
        with gpu_lock if is_gpu else nullcontext():
            if is_gpu and self.tp.size == 1:
                with suppress(RuntimeError):  # a step's own error, which was said or is of no interest any more
                    torch.cuda.synchronize(self.device)  # a launched step may still use them
            if self.graphs is not None:
                self.graphs.close()
                self.graphs = None
            del self.model, self.kv_cache
            gc.collect()  # modules refer to each other in cycles
            if is_gpu:
                torch.cuda.empty_cache()
