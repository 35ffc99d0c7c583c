"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783): the decoder as it is; config says which projections have a bias."""

from nanovllm.models.decoder import DecoderForCausalLM


class LlamaForCausalLM(DecoderForCausalLM):
    pass
