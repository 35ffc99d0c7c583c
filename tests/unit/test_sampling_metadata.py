"""SamplingMetadata: which rows need which work, and what arrives on the device."""

import numpy as np
import pytest
import torch

from nanovllm.layers.sampler import to_device
from nanovllm.sampling_metadata import make_sampling_metadata
from tests.support.sampler_draws import make_rows


def test_each_row_is_greedy_plain_or_filtered() -> None:
    """top_k 0, top_p 1 and min_p 0 filter nothing; top_k 1 is greedy, whatever the other filters are."""
    rows = make_rows(6, top_k=[0, 1, 2, 0, 0, 1], top_p=[1, 1, 1, 0.9, 1, 0.9], min_p=[0, 0, 0, 0, 0.1, 0.1])
    metadata = make_sampling_metadata(**vars(rows))
    assert metadata.filtered_rows.tolist() == [2, 3, 4]
    assert metadata.takes_argmax.tolist() == [False, True, True, True, True, True]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7])
def test_the_device_gets_every_field(num_rows: int, device: str) -> None:
    """Also for numbers of rows at which the fields of a packed buffer could be misaligned."""
    row = np.arange(num_rows)
    fields = {"temperature": row + 0.5, "top_k": row, "top_p": 1 / (row + 1), "min_p": row / 8, "position": row * 2**40}
    metadata = make_sampling_metadata(**vars(make_rows(num_rows, seed=2**64 - 1, **fields)))
    tensors = to_device(metadata, device)
    for name, array in vars(metadata).items():
        tensor = getattr(tensors, name)
        assert tensor.device.type == device
        assert torch.equal(tensor.cpu(), torch.from_numpy(array)), name
        assert tensor.dtype == torch.from_numpy(array).dtype
