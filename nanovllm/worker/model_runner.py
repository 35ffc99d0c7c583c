"""ModelRunner: one rank's model and KV cache, and the computation of a step.

It is one class, and so one file, because start-up and steps share the model, the cache and the graphs.
"""

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend, AttentionRequirements, KVCache
from nanovllm.config import Config
from nanovllm.context import Context, set_context
from nanovllm.distributed.placement import resolve_device
from nanovllm.distributed.tensor_parallel import SINGLE_RANK, TensorParallel
from nanovllm.engine.model_input import ModelInput, prepare_decode, prepare_decode_async, prepare_prefill
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.layers.attention import Attention
from nanovllm.layers.packed_weights import pack_weights
from nanovllm.layers.sampler import Sampler, to_device
from nanovllm.layers.select_ops import select_ops
from nanovllm.model_config import ModelConfig
from nanovllm.models.decoder import build_model, one_layer_of_each_kind
from nanovllm.models.loader import load_model, warn_of_non_finite
from nanovllm.worker.async_output import AsyncModelOutput
from nanovllm.worker.cpu_threads import choose_num_threads, mean_layer_parameters, torch_threads
from nanovllm.worker.cuda_graph import (
    CaptureOptions,
    CUDAGraphRunner,
    GraphSizes,
    graph_batch_sizes,
    shared_prefix_batch_sizes,
)
from nanovllm.worker.kv_cache import empty_cache, num_blocks_on_cpu, num_blocks_that_fit
from nanovllm.worker.prefill_graph import PrefillGraphRunner, prefill_graph_sizes
from nanovllm.worker.torch_state import gpu_lock, plain_torch_state
from nanovllm.worker.warmup import dummy_decode, dummy_prefill, prefill_warmup_shapes, prepare_profile_run

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence

DRIVER_BYTES_PER_GRAPH = 8 * 2**20  # device memory of the driver for each captured graph, besides the graph's tensors


class ModelRunner:
    """Loads the model, profiles memory, allocates the KV cache, warms up, captures CUDA graphs; then runs batches.

    tp: this rank and its group. num_ranks_per_device: the number of ranks that share the device's memory.
    on_tensor_loaded: called after each tensor that is loaded; may raise.
    num_kv_cache_blocks: the user's number, or as many as fit on every rank.
    kv_cache: [2, num_layers, num_kv_cache_blocks, block_size, num_kv_heads, head_dim], this rank's keys and values.
    graphs: of decode, None if decode runs eagerly. prefill_graphs: None if every prefill runs eagerly.
    Raises ValueError for a device that does not exist and for too little memory, and the errors of load_model.
    The caller's torch settings neither change the result nor are changed (see plain_torch_state).
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
        self._limits = (config.max_num_batched_tokens, config.max_model_len, config.max_num_seqs)
        self.tp = tp
        self.num_ranks_per_device = num_ranks_per_device
        self.model_config = model_config if config.dtype == "auto" else replace(model_config, dtype=config.dtype)
        self.device = resolve_device(config.device)
        self.dtype: torch.dtype = getattr(torch, self.model_config.dtype)
        self.graphs: CUDAGraphRunner | None = None
        self.prefill_graphs: PrefillGraphRunner | None = None
        self._shared_tokens: Tensor | None = None  # of the last step, if every rank has them
        self._unchecked_dir: Path | None = None  # of the checkpoint, until logits of a request have been checked
        with plain_torch_state(self.device, is_inference=False):
            self.load_model(model_dir, on_tensor_loaded)
            self.block_size = self._choose_block_size()
            self.graph_sizes = self._choose_graph_sizes()
            if self.device.type == "cuda":
                self.compile_kernels()
            self.num_kv_cache_blocks = self.profile_memory()
            self.kv_cache = self.allocate_kv_cache(self.num_kv_cache_blocks)
            if self.device.type == "cuda":
                self.warmup_model()
            if self.can_capture:
                self.capture_graphs(self.graph_sizes)
            if self.device.type == "cuda":
                gc.collect()  # 0.2 s of import-time garbage; otherwise the first automatic collection delays a request
        self._unchecked_dir = model_dir if tp.rank == 0 else None

    def load_model(self, model_dir: Path, on_tensor_loaded: Callable[[], None] | None) -> None:
        """Choose the attention backend and the number of threads, and build the model with its weights."""
        config, model_config = self.config, self.model_config
        requirements = AttentionRequirements(self.device, self.dtype, model_config.head_dim, config.kv_cache_block_size)
        self.ops = ops = select_ops(config.attention_backend, requirements)
        self.num_threads = (
            choose_num_threads(model_config, self.num_ranks_per_device) if self.device.type == "cpu" else None
        )
        with self.device:
            self.model = build_model(model_config, ops, self.tp)
        self.num_kv_heads = self._attention_layers()[0].num_kv_heads
        load_model(self.model, model_dir, use_tqdm=self.tp.rank == 0, on_tensor_loaded=on_tensor_loaded)
        pack_weights(self.model.eval(), ops)
        self.sampler = Sampler(ops.sample_unfiltered, self.tp)
        self.shares_prefixes = ops.attention.shares_prefixes
        is_graph_safe = self.tp.is_graph_safe and ops.attention.is_graph_safe
        self.can_capture = self.device.type == "cuda" and not config.enforce_eager and is_graph_safe

    def _attention_layers(self) -> list[Attention]:
        return [module for module in self.model.modules() if isinstance(module, Attention)]

    def _choose_block_size(self) -> int:
        """The user's choice, or the largest of the ranks' defaults, which are powers of two; equal on all ranks."""
        if self.config.kv_cache_block_size is not None:
            return self.config.kv_cache_block_size
        if self.config.num_kv_cache_blocks is not None:
            return AttentionBackend.default_block_size  # nano-vllm's: the number of blocks was chosen for this size
        return -self.tp.all_reduce_min(-self.ops.attention.default_block_size)

    def _choose_graph_sizes(self) -> GraphSizes:
        config, decode_sizes = self.config, graph_batch_sizes(self.config.max_num_seqs)
        return GraphSizes(
            decode=decode_sizes,
            shared_prefix=shared_prefix_batch_sizes(decode_sizes) if self.shares_prefixes else [],
            prefill=prefill_graph_sizes(
                config.max_num_batched_tokens, mean_layer_parameters(self.model_config) / self.tp.size
            ),
        )

    def compile_kernels(self) -> None:
        """Compile the kernels of all kinds of steps in parallel; one after another they would take half a minute.

        A kernel that is not compiled here is compiled at its first launch, in warmup_model or before a graph's capture.
        """
        if self.ops.compile_ahead is not None:
            self.ops.compile_ahead(self._run_all_kinds_of_steps)

    def _run_all_kinds_of_steps(self) -> None:
        config, block_size, batch_sizes = self.config, self.block_size, self.graph_sizes.decode
        num_blocks = config.num_kv_cache_blocks or math.ceil(config.max_model_len / block_size)
        self.allocate_kv_cache(1)  # its strides matter; no kernel reads or writes it
        with one_layer_of_each_kind(self.model):
            self._run_all_kinds_of_prefills(num_blocks)  # first, as their attention takes longest to compile
            for batch_size in batch_sizes:
                if batch_size.bit_count() == 1 or batch_size == batch_sizes[-1]:  # others launch the same kernels
                    self._execute(dummy_decode(batch_size, block_size))
            for batch_size in self.graph_sizes.shared_prefix:
                self._execute(dummy_decode(batch_size, block_size, shares_prefix=True))
        for layer in self._attention_layers():
            layer.kv_cache = None
        with one_layer_of_each_kind(self.model):
            self._execute(prepare_profile_run(*self._limits, block_size))

    def _run_all_kinds_of_prefills(self, num_blocks: int) -> None:
        for query_lens, num_cached_tokens in prefill_warmup_shapes(*self._limits, num_blocks, self.block_size):
            self._execute(dummy_prefill(query_lens, num_cached_tokens, self.block_size))

    def profile_memory(self) -> int:
        """The number of KV blocks: the user's, or as many as fit on every rank. A GPU first runs the largest step."""
        if self.device.type == "cuda":
            self._run_largest_step()
        if self.config.num_kv_cache_blocks is not None:
            return self.config.num_kv_cache_blocks
        graph_bytes = self._measure_graph_bytes() if self.can_capture else 0
        self.tp.barrier()  # ranks that share a device read its free memory after all of them have allocated theirs
        return self.tp.all_reduce_min(self._num_blocks_that_fit(graph_bytes))

    def _run_largest_step(self) -> None:
        with gpu_lock:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._execute(prepare_profile_run(*self._limits, self.block_size))
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def _measure_graph_bytes(self) -> int:
        """Device memory of all graphs: the pool of the largest, which the others share, and the driver's per graph."""
        largest = GraphSizes(*(sizes[-1:] for sizes in self.graph_sizes))
        with gpu_lock:
            self.allocate_kv_cache(1)
            free_before, _ = torch.cuda.mem_get_info(self.device)
            self.capture_graphs(largest, use_tqdm=False)
            torch.cuda.synchronize(self.device)
            free_after, _ = torch.cuda.mem_get_info(self.device)
            self._close_graphs()
            torch.cuda.empty_cache()
        return free_before - free_after + DRIVER_BYTES_PER_GRAPH * sum(map(len, self.graph_sizes))

    def _num_blocks_that_fit(self, graph_bytes: int) -> int:
        config = self.config
        bytes_per_block = self.num_ranks_per_device * math.prod(self._cache_shape(1)) * self.dtype.itemsize
        if self.device.type != "cuda":
            available = psutil.virtual_memory().available
            max_blocks_per_seq = math.ceil(config.max_model_len / self.block_size)
            return num_blocks_on_cpu(available, bytes_per_block, config.max_num_seqs, max_blocks_per_seq)
        free, total = torch.cuda.mem_get_info(self.device)
        stats = torch.cuda.memory_stats(self.device)
        step_bytes = stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"]
        return num_blocks_that_fit(
            total,
            config.gpu_memory_utilization,
            used=total - free + self.num_ranks_per_device * graph_bytes,
            step_bytes=self.num_ranks_per_device * step_bytes,
            bytes_per_block=bytes_per_block,
        )

    def _cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        model = self.model_config
        return (2, model.num_hidden_layers, num_blocks, self.block_size, self.num_kv_heads, model.head_dim)

    def allocate_kv_cache(self, num_blocks: int) -> Tensor:
        """The cache tensor, bound to the model's attention layers. Slots that were never written are uninitialised."""
        is_given = self.config.num_kv_cache_blocks is not None
        kv_cache = empty_cache(self._cache_shape(num_blocks), self.dtype, self.device, is_given)
        for layer, k_cache, v_cache in zip(self._attention_layers(), kv_cache[0], kv_cache[1], strict=True):
            layer.kv_cache = KVCache(k_cache, v_cache)
        return kv_cache

    def warmup_model(self) -> None:
        """Compile the kernels of every kind of prefill on a GPU, so that no request waits for the compiler."""
        with one_layer_of_each_kind(self.model):
            self._run_all_kinds_of_prefills(self.num_kv_cache_blocks)
        with gpu_lock:
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def capture_graphs(self, sizes: GraphSizes, use_tqdm: bool = True) -> None:
        """Capture graphs of decode, and of prefill if sizes.prefill is not empty, with the KV cache that is bound."""
        options = CaptureOptions(
            forward=self._logits,
            shortened=partial(one_layer_of_each_kind, self.model),
            max_model_len=self.config.max_model_len,
            max_blocks_per_seq=math.ceil(self.config.max_model_len / self.block_size),
            device=self.device,
            use_tqdm=use_tqdm and self.tp.rank == 0,
        )
        self.graphs = CUDAGraphRunner(options, self.sampler.sample_unfiltered, sizes, self.config.max_num_seqs)
        if sizes.prefill:
            self.prefill_graphs = PrefillGraphRunner(options, sizes.prefill, self.graphs.pool)

    def _close_graphs(self) -> None:
        for graphs in (self.graphs, self.prefill_graphs):
            if graphs is not None:
                graphs.close()
        self.graphs = self.prefill_graphs = None

    def _logits(
        self, input_ids: Tensor, positions: Tensor, context: Context, last_tokens: Tensor | None = None
    ) -> Tensor:
        # A method, not a closure: a traceback keeps the closures of its functions, and with them the model's memory.
        with set_context(context):
            return self.model.compute_logits(self.model(input_ids, positions, last_tokens))

    # --- one step: sequences -> ModelInput -> logits -> token ids ---

    prepare_prefill = staticmethod(prepare_prefill)
    prepare_decode = staticmethod(prepare_decode)
    prepare_decode_async = staticmethod(prepare_decode_async)

    def run(
        self,
        batch: ScheduledBatch,
        previous_sequences: "tuple[Sequence, ...] | None" = None,
        previous_token_ids: Tensor | None = None,
    ) -> AsyncModelOutput:
        """Submit the step. Returns the new token ids of batch.sampled_sequences, in their order, which the device may
        still be computing. Only rank 0 has those of filtered rows.

        previous_sequences: the sampled sequences of the step before, if Scheduler.schedule_next_async chose `batch`
            while that step's tokens were not known. previous_token_ids: these tokens, int64, on the device; None on
            ranks other than 0, to which rank 0 broadcasts them.
        """
        with plain_torch_state(self.device, is_inference=True):
            if batch.is_prefill:
                model_input = self.prepare_prefill(batch.sequences)
            elif previous_sequences is None:
                model_input = self.prepare_decode(batch.sequences, self.shares_prefixes)
            else:
                model_input = self.prepare_decode_async(batch.sequences, previous_sequences, self.shares_prefixes)
                if previous_token_ids is None:
                    previous_token_ids = torch.empty(len(previous_sequences), dtype=torch.int64, device=self.device)
            return AsyncModelOutput(batch, self._execute(model_input, previous_token_ids))

    @torch.inference_mode()
    def _execute(self, model_input: ModelInput, previous_token_ids: Tensor | None = None) -> Tensor:
        """Token ids [num_samples] int64 on the device, which may still be computing them.

        previous_token_ids: those of the step before, which model_input.input_ids_source refers to. Rank 0 broadcasts
            them to the other ranks, unless every rank has them already.
        """
        with torch_threads(self.num_threads), gpu_lock if self.device.type == "cuda" else nullcontext():
            if previous_token_ids is not None and model_input.input_ids_source is not None:
                if self._shared_tokens is not None:
                    previous_token_ids = self._shared_tokens
                else:
                    previous_token_ids = self.tp.broadcast(previous_token_ids)
            token_ids = self._sample(model_input, previous_token_ids)
            self._shared_tokens = None if len(model_input.sampling.filtered_rows) else token_ids
            return token_ids

    def _sample(self, model_input: ModelInput, previous_token_ids: Tensor | None) -> Tensor:
        if self.graphs is None or not self.graphs.can_replay(model_input):
            logits = self._compute_logits(model_input, previous_token_ids)
            if logits is None:
                return torch.empty(0, dtype=torch.int64)
            if self._unchecked_dir is not None:
                self._check_finite(logits, self._unchecked_dir)
            return self.sampler(logits, to_device(model_input.sampling, self.device))
        logits, token_ids = self.graphs.replay(model_input, previous_token_ids)
        if len(model_input.sampling.filtered_rows):
            self.sampler.sample_filtered(logits, to_device(model_input.sampling, self.device), token_ids)
        return token_ids

    def _check_finite(self, logits: Tensor, model_dir: Path) -> None:
        """Log a warning if no logit of the first row is finite: the sampler takes token 0, often an empty text."""
        self._unchecked_dir = None  # only the first step that samples is checked, since this waits for the device
        if not logits[0].isfinite().any():
            warn_of_non_finite(model_dir, self.dtype)

    def _compute_logits(self, model_input: ModelInput, previous_token_ids: Tensor | None) -> Tensor | None:
        """[num_samples, V/size], this rank's columns; None if this step samples no sequence."""
        sampled = model_input.sample_indices
        if self.prefill_graphs is not None and self.prefill_graphs.can_replay(model_input):
            logits = self.prefill_graphs.replay(model_input)
            return logits[self._tensor(sampled)] if len(sampled) else None
        input_ids, last_tokens = self._tensor(model_input.input_ids), None
        if model_input.input_ids_source is not None:
            assert previous_token_ids is not None
            source = self._tensor(model_input.input_ids_source)
            input_ids = torch.where(source >= 0, previous_token_ids[source.clamp(min=0)], input_ids)
        if model_input.is_prefill:
            last_tokens = self._tensor(model_input.cu_seqlens_q[1:].astype(np.int64) - 1)
        hidden_states = self.run_model(model_input, input_ids, last_tokens)
        if not len(sampled):
            return None
        return self.model.compute_logits(hidden_states[self._tensor(sampled)])

    @torch.inference_mode()
    def run_model(
        self, model_input: ModelInput, input_ids: Tensor | None = None, last_tokens: Tensor | None = None
    ) -> Tensor:
        """Hidden states [num_tokens, hidden_size] of one forward pass, which writes the KV cache.

        input_ids: [num_tokens] int64 on the device, in place of model_input.input_ids. last_tokens: as in
            DecoderForCausalLM.forward.
        """
        if input_ids is None:
            input_ids = self._tensor(model_input.input_ids)
        with set_context(self._context(model_input)):
            return self.model(input_ids, self._tensor(model_input.positions), last_tokens)

    def _context(self, model_input: ModelInput) -> Context:
        shared = model_input.shared_prefixes
        return Context(
            is_prefill=model_input.is_prefill,
            slot_mapping=self._tensor(model_input.slot_mapping),
            cu_seqlens_q=self._tensor(model_input.cu_seqlens_q),
            cu_seqlens_k=self._tensor(model_input.cu_seqlens_k),
            max_seqlen_q=model_input.max_seqlen_q,
            max_seqlen_k=model_input.max_seqlen_k,
            context_lens=self._tensor(model_input.context_lens),
            block_tables=self._tensor(model_input.block_tables) if model_input.reads_cache else None,
            sequence_order=self._tensor(model_input.sequence_order),
            shared_prefix_order=None if shared is None else self._tensor(shared.order),
            shared_prefix_lens=None if shared is None else self._tensor(shared.lens),
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def close(self) -> None:
        """Drop graphs, model and cache, and return their memory to the device."""
        is_gpu = self.device.type == "cuda"
        with gpu_lock if is_gpu else nullcontext():
            if is_gpu and self.tp.size == 1:
                with suppress(RuntimeError):  # the error of a submitted step, which token_ids() raises
                    torch.cuda.synchronize(self.device)  # a submitted step may still use the model and the cache
            self._close_graphs()
            self._shared_tokens = None
            del self.model, self.kv_cache
            gc.collect()  # modules refer to each other in cycles
            if is_gpu:
                torch.cuda.empty_cache()
