"""How much room moe_routing makes. test_kernels.py tests the kernel."""

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("num_assignments", "num_experts", "block_size"), [(1, 1, 1), (9, 4, 4), (3, 7, 2), (40, 3, 16), (17, 16, 4)]
)
def test_no_routing_needs_more_blocks_than_there_is_room_for(num_assignments, num_experts, block_size):
    """And one needs as many: tried for every way of spreading the assignments, largest expert first."""
    from nanovllm.kernels.moe_routing import max_num_blocks

    def most(left: int, experts: int, at_most: int) -> int:
        if left == 0 or experts == 0:
            return 0 if left == 0 else -1000
        return max(
            -(-own // block_size) + most(left - own, experts - 1, own) for own in range(1, min(left, at_most) + 1)
        )

    assert max_num_blocks(num_assignments, num_experts, block_size) == most(
        num_assignments, num_experts, num_assignments
    )
