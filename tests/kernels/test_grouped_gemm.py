"""The tile sizes of grouped_gemm. test_kernels.py tests the kernel."""

import pytest

pytest.importorskip("triton")

from tests.kernels.grouped_gemm_cases import NUM_TOKENS


def test_the_compiled_cases_cover_every_tile_config():
    from nanovllm.kernels.grouped_gemm import choose_tile_config

    for itemsize in (2, 4):
        compiled = {choose_tile_config(num_tokens * 8, 128, itemsize) for num_tokens in NUM_TOKENS}
        assert {choose_tile_config(num_tokens * 8, 128, itemsize) for num_tokens in range(1, 20_000)} == compiled
