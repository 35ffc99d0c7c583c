"""The engine's functions that compute what a file of reference/ explains."""

# File of reference/ -> (path under nanovllm/, function or class in it, what it does).
ENGINE: dict[str, tuple[tuple[str, str, str], ...]] = {
    "attention": (
        (
            "layers/attention.py",
            "Attention",
            "is the layer: it stores new keys and values, then calls an attention backend.",
        ),
        ("attention/torch.py", "_causal_attention", "is this formula in PyTorch, the backend of the CPU."),
        ("kernels/varlen_attention.py", "varlen_attention_kernel", "is the Triton kernel of prefill."),
    ),
    "packing": (
        ("engine/model_input.py", "prepare_prefill", "packs the scheduled tokens of a step."),
        ("context.py", "Context", "carries the boundaries to the attention layers."),
    ),
    "slot_mapping": (("engine/model_input.py", "_slots", "computes the slots of all tokens of a step at once."),),
    "store_kvcache": (
        ("layers/torch_ops.py", "store_kvcache", "is the store in PyTorch."),
        ("kernels/store_kvcache.py", "store_kvcache_kernel", "is the Triton kernel."),
        ("kernels/qk_norm_rope_store.py", "qk_norm_rope_store_kernel", "does norm, rotation and store at once."),
    ),
    "paged_attention": (
        ("attention/torch.py", "TorchAttentionBackend.decode", "gathers the blocks, as here."),
        ("kernels/paged_attention.py", "paged_attention_kernel", "walks the block table and copies nothing."),
        ("kernels/varlen_attention.py", "varlen_attention_kernel", "does the same for many queries a sequence."),
    ),
    "shared_prefix_attention": (
        ("engine/shared_prefix.py", "find_shared_prefixes", "finds sequences that begin with the same blocks."),
        ("kernels/shared_prefix_attention.py", "shared_prefix_attention_kernel", "reads a shared key once for many."),
        ("kernels/paged_attention.py", "paged_attention_kernel", "reads each sequence's own keys and merges."),
    ),
    "block_hash": (
        ("engine/block_manager.py", "block_hash", "hashes with the xxhash package."),
        ("engine/block_manager.py", "BlockManager._find", "compares tokens and parents after the hash."),
    ),
    "block_manager": (
        ("engine/block_manager.py", "BlockManager.allocate", "takes hits first, then free blocks."),
        ("engine/block_manager.py", "BlockManager.deallocate", "frees blocks in the order of their reuse."),
        ("engine/block_manager.py", "BlockManager.cache_full_blocks", "enters full blocks into the prefix cache."),
    ),
    "scheduler": (
        ("engine/scheduler.py", "Scheduler.schedule", "decides the next step."),
        ("engine/scheduler.py", "Scheduler._schedule_prefill", "has rules 1 and 2."),
        ("engine/scheduler.py", "Scheduler._schedule_decode", "has rule 3."),
    ),
    "postprocess": (
        ("engine/scheduler.py", "Scheduler.postprocess", "processes the tokens of a step."),
        ("engine/finish_check.py", "finish_cause", "decides why a sequence ends."),
    ),
    "linear": (
        ("layers/linear.py", "ReplicatedLinear", "is a layer that every rank holds in full."),
        ("layers/linear.py", "MergedColumnParallelLinear", "holds several matrices as one."),
        ("kernels/skinny_linear.py", "skinny_linear_kernel", "is the Triton kernel for at most 16 tokens."),
    ),
    "rms_norm": (
        ("layers/layernorm.py", "RMSNorm", "is the layer."),
        ("layers/torch_ops.py", "rms_norm", "is the norm in PyTorch."),
        ("kernels/rms_norm.py", "rms_norm_kernel", "is the Triton kernel, with the residual too."),
    ),
    "rotary_embedding": (
        ("layers/rotary_embedding.py", "inverse_frequencies", "computes the frequencies of every rope type."),
        ("layers/torch_ops.py", "apply_rotary_embedding", "turns the pairs in PyTorch."),
        ("kernels/rotary_embedding.py", "rotary_embedding_kernel", "is the Triton kernel."),
    ),
    "silu_and_mul": (
        ("layers/torch_ops.py", "silu_and_mul", "is the activation in PyTorch."),
        ("kernels/silu_and_mul.py", "silu_and_mul_kernel", "is the Triton kernel."),
        (
            "kernels/skinny_linear.py",
            "norm_skinny_linear",
            "does the norm and the product before it too, for few tokens.",
        ),
    ),
    "moe": (
        ("layers/moe.py", "SparseMoeBlock", "is the layer."),
        ("layers/torch_ops.py", "choose_experts", "is the router."),
        ("kernels/moe_routing.py", "moe_routing", "sorts tokens by expert on the GPU."),
        ("kernels/grouped_gemm.py", "grouped_gemm_kernel", "multiplies each expert with its tokens."),
    ),
    "tensor_parallel": (
        ("layers/linear.py", "MergedColumnParallelLinear", "holds some of the outputs of each of its matrices."),
        ("layers/linear.py", "RowParallelLinear", "holds some of the inputs, and ends with the all-reduce."),
        ("layers/embedding.py", "VocabParallelEmbedding", "holds some of the vocabulary."),
        ("distributed/tensor_parallel.py", "TensorParallel", "has the collectives of the ranks."),
        ("kernels/all_reduce.py", "all_reduce_kernel", "adds up the ranks' parts on their GPUs."),
    ),
    "philox": (
        ("layers/philox.py", "philox", "is the generator in PyTorch."),
        ("kernels/sampling.py", "philox_words", "is the generator in Triton."),
    ),
    "sampling": (
        ("layers/sampler.py", "Sampler", "samples every row of a step."),
        ("layers/sampler.py", "allowed_mask", "applies the filters."),
        ("kernels/sampling.py", "sampling_tile_kernel", "runs the race in one pass over the logits."),
    ),
    "checkpoint": (
        ("models/loader.py", "load_model", "loads the weights, each rank its shard."),
        ("model_config.py", "read_model_config", "reads config.json."),
    ),
    "transformer": (
        ("models/decoder.py", "DecoderForCausalLM", "is the model, built from an Architecture."),
        ("models/qwen3.py", "", "is one architecture: only what differs from the others."),
    ),
    "generate": (
        ("engine/llm_engine.py", "LLMEngine.generate", "is the same function for many prompts, fast."),
        ("engine/engine_core.py", "EngineCore.advance", "is one step."),
    ),
}
