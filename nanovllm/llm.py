"""LLM: the class that users import."""

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    """Text in, text out: `LLM("Qwen/Qwen3-0.6B").generate("Hello")[0]["text"]`. See LLMEngine."""
