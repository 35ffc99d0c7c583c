"""nanovllm: a small LLM inference engine that anyone can read, and the test suite that proves it.

from nanovllm import LLM, SamplingParams
with LLM("Qwen/Qwen3-0.6B") as llm:
    print(llm.generate("Hello", SamplingParams.greedy(max_tokens=32))[0]["text"])
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
_MODULES = {
    "LLM": "llm",
    "Config": "config",
    "LLMEngine": "engine.llm_engine",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "StepOutput": "outputs",
    "StreamOutput": "outputs",
    "bundled_model_path": "assets",
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used, so that Ctrl-C during the imports reaches the command's handler."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
