"""A small engine in nano-vllm's style that keeps every contract: the base of the planted faults. No model."""
