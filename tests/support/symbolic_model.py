"""A symbolic model: what a transformer reads, without what it computes. No torch, no numbers to round.

    key[0][p]      = H(token[p], p)                           H: a digest of 64 bits
    read[n][p]     = H(key[n][0], ..., key[n][p])             layer n attends: what it read, in order
    key[n + 1][p]  = read[n][p]
    next token     = H(read[last][p], the row's temperature, top_k, top_p, min_p, seed and position)

As in a model, each layer stores the keys of the whole step first, at their slots, and then reads them through the block
tables. A slot of the second layer holds a digest of a token, its position and everything attended before; so any wrong
slot, position, length or index, any stale, foreign or never-written block changes the tokens that come out.
"""

import functools
import pickle
from collections.abc import Sequence as Sequences
from itertools import pairwise

import numpy as np

from nanovllm.engine.model_input import PADDING_SLOT, ModelInput, prepare_decode, prepare_prefill
from nanovllm.engine.scheduler import ScheduledBatch
from nanovllm.sampling_params import SamplingParams

NUM_LAYERS = 2
NEVER_COMPUTED = -3  # of a query that no sequence claims


def digest(values: Sequences[float]) -> int:
    """64 bits that depend on each value and on their order; the same in every process."""
    return hash(tuple(values))


class SymbolicModel:
    """Cache and layers of one rank. A slot that was never written holds a number that no digest is."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cache = [[-1000 - slot for slot in range(num_blocks * block_size)] for _ in range(NUM_LAYERS)]

    def run(self, batch: ScheduledBatch) -> list[int]:
        """One digest for each of batch.sampled_sequences, from what is left of the batch after pickling: every rank
        but the first computes it so.
        """
        batch = pickle.loads(pickle.dumps(batch))
        prepare = prepare_prefill if batch.is_prefill else prepare_decode
        return self.compute(prepare(batch.sequences))

    def compute(self, inputs: ModelInput) -> list[int]:
        keys = [digest(pair) for pair in zip(inputs.input_ids.tolist(), inputs.positions.tolist(), strict=True)]
        for layer in self.cache:
            for slot, key in zip(inputs.slot_mapping.tolist(), keys, strict=True):
                if slot != PADDING_SLOT:
                    layer[slot] = key
            keys = self._attend(layer, keys, inputs)
        rows = inputs.sampling
        columns = (
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            (rows.seed_low + (rows.seed_high << 32)).view("uint64"),
            rows.position,
        )
        sampled = [keys[index] for index in (inputs.cu_seqlens_q[1:] - 1)[inputs.sample_indices].tolist()]
        return [digest(row) for row in zip(sampled, *(column.tolist() for column in columns), strict=True)]

    def _attend(self, layer: list[int], keys: list[int], inputs: ModelInput) -> list[int]:
        """What each query reads: of a prefill without cached keys the keys of this step, else those in the cache."""
        query_bounds = list(pairwise(inputs.cu_seqlens_q.tolist()))
        key_bounds = list(pairwise(inputs.cu_seqlens_k.tolist()))
        reads = [NEVER_COMPUTED] * len(keys)
        for row in inputs.sequence_order.tolist():
            first_query, last_query = query_bounds[row]
            num_queries = min(last_query - first_query, inputs.max_seqlen_q)
            num_keys = key_bounds[row][1] - key_bounds[row][0]
            assert num_keys == inputs.context_lens[row], "two ways to say how many keys there are"
            num_keys = min(num_keys, inputs.max_seqlen_k)
            if not inputs.reads_cache:
                seen = keys[slice(*key_bounds[row])]
            else:
                table, size = inputs.block_tables[row].tolist(), self.block_size
                seen = [layer[table[position // size] * size + position % size] for position in range(num_keys)]
            for query in range(num_queries):
                reads[first_query + query] = digest(seen[: num_keys - num_queries + query + 1])
        return reads


@functools.lru_cache(100_000)
def expected_digest(token_ids: tuple[int, ...], params: SamplingParams, seed: int) -> int:
    """The digest after these tokens by the formula, without cache, batch and blocks."""
    keys = [digest((token_id, position)) for position, token_id in enumerate(token_ids)]
    for _ in range(NUM_LAYERS):
        keys = [digest(keys[: position + 1]) for position in range(len(keys))]
    temperature, top_p, min_p = (float(np.float32(x)) for x in (params.temperature, params.top_p, params.min_p))
    return digest((keys[-1], temperature, params.top_k or 0, top_p, min_p, seed, len(token_ids)))
