"""grouped_gemm's table of tiles, and the layer in a CUDA graph. test_kernels.py tests the kernel."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.grouped_gemm_cases import NUM_TOKENS


def test_table_of_tiles_is_compiled_whole():
    from nanovllm.kernels.grouped_gemm import choose_tile_config

    for itemsize in (2, 4):
        compiled = {choose_tile_config(num_tokens * 8, 128, itemsize) for num_tokens in NUM_TOKENS}
        assert {choose_tile_config(num_tokens * 8, 128, itemsize) for num_tokens in range(1, 20_000)} == compiled


@pytest.mark.gpu
def test_layer_recorded_in_a_graph_follows_its_input():
    """Other tokens choose other experts, and nothing waits for the device."""
    from nanovllm.layers.moe import SparseMoeBlock
    from nanovllm.layers.triton_ops import TRITON_OPS
    from nanovllm.model_config import MoEConfig

    with torch.device("cuda"):
        layer = SparseMoeBlock(64, MoEConfig(16, 4, 32, True, layers=frozenset({0})), TRITON_OPS).bfloat16()
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3)
    x = torch.randn(12, 64, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = layer(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(recorded, layer(x))
