"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): as Llama, with a bias on q, k and v, which ModelConfig states."""

from nanovllm.models.decoder import DecoderForCausalLM


class Qwen2ForCausalLM(DecoderForCausalLM):
    pass
