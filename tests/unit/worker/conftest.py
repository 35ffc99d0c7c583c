"""CUDA graphs without a GPU: a fake graph repeats the captured function on the buffers of the capture.

tests/e2e/test_gpu_graphs.py shows that real graphs do the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from nanovllm.worker import cuda_graph

Captures = list[tuple[Mock, Any]]  # each graph, with the memory pool that it was captured into


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    captures: Captures = []

    @contextmanager
    def record(graph: Mock, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (stream, capture_error_mode) == ("the capture stream of cpu", "thread_local")
        captures.append((graph, pool))
        yield

    capture = cuda_graph.capture

    def capture_to_repeat(compute: Callable[[], torch.Tensor], *arguments: Any) -> Any:
        graph, logits = capture(compute, *arguments)
        graph.replay.side_effect = lambda: logits.copy_(compute())
        return graph, logits

    zeros, to = torch.zeros, torch.Tensor.to
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: to(self, *args).clone())  # a device's own memory
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Mock(**{"pool.return_value": "the pool of the largest"}))
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(cuda_graph, "capture", capture_to_repeat)
    monkeypatch.setattr(cuda_graph, "_warm_up", lambda compute, stream: None)
    monkeypatch.setattr(cuda_graph, "_capture_stream", "the capture stream of {}".format)
    return captures
