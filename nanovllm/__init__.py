"""nanovllm: a small LLM inference engine that anyone can read, and the test suite that proves it.

from nanovllm import LLM, SamplingParams
with LLM("Qwen/Qwen3-0.6B") as llm:
    print(llm.generate("Hello", SamplingParams.greedy(max_tokens=32))[0]["text"])
"""

from nanovllm.assets import bundled_model_path
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput, StepOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Config",
    "LLMEngine",
    "RequestOutput",
    "SamplingParams",
    "StepOutput",
    "StreamOutput",
    "bundled_model_path",
]
