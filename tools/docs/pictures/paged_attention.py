"""What the newest token of each of two sequences reads: its block table names the blocks, each slot has a weight.

The weights in percent are those of paged_attention(). Grey slots are not read: no sequence owns them, or they come
after its last token.
"""

import torch

from reference.paged_attention import paged_attention
from tools.docs.svg import Drawing

BLOCK_SIZE, NUM_BLOCKS = 4, 6
TABLES, CONTEXT_LENS = [[4, 1, 3], [0, 5]], [10, 6]


def draw() -> Drawing:
    weight = weights()
    drawing = Drawing(372, 294, "Two sequences read their keys from one cache, block by block")
    owner = {block: b for b, table in enumerate(TABLES) for block in table}
    where = {}
    for block in range(NUM_BLOCKS):
        left, top = 12 + (block % 3) * 122, 172 + (block // 3) * 58
        where[block] = (left + 54, top - 20)
        drawing.text(
            left + 54, top - 6, f"block {block}", f"{'ab'[owner[block]]} small" if block in owner else "faint small"
        )
        for offset in range(BLOCK_SIZE):
            slot = block * BLOCK_SIZE + offset
            b = next((b for b in range(2) if weight[b][slot] > 0), None)
            label = "" if b is None else f"{100 * weight[b][slot]:.0f}"
            drawing.box(left + offset * 27, top, 27, 28, "free" if b is None else "ab"[b], label)
    for b, table in enumerate(TABLES):
        top = 20 + 46 * b
        drawing.circle(24, top + 16, 14, "ab"[b])
        drawing.text(24, top + 20, "q")
        drawing.text(48, top + 12, f"sequence {b}", f"{'ab'[b]} bold", "start")
        drawing.text(48, top + 28, f"context_len {CONTEXT_LENS[b]}", "faint small", "start")
        drawing.arrow((150, top + 16), (196, top + 16), look="ab"[b])
        for index, block in enumerate(table):
            drawing.box(200 + index * 44, top + 2, 44, 28, "ab"[b], block)
    drawing.text(200, 14, "block table, in text order", "faint small", "start")
    drawing.text(12, 138, "KV cache: weight of each key, %", "bold", "start")
    drawing.text(12, 284, "The weights of each sequence sum to 100.", "faint small", "start")
    return drawing


def weights() -> list[list[float]]:
    """[sequence][slot]: with a one-hot value in each slot, the output of attention is its weights."""
    generator = torch.Generator().manual_seed(3)
    num_slots = NUM_BLOCKS * BLOCK_SIZE
    k_cache = torch.randn(NUM_BLOCKS, BLOCK_SIZE, 1, num_slots, generator=generator, dtype=torch.float64)
    query = torch.randn(2, 1, num_slots, generator=generator, dtype=torch.float64)
    v_cache = torch.eye(num_slots, dtype=torch.float64).view(NUM_BLOCKS, BLOCK_SIZE, 1, num_slots)
    longest = max(len(table) for table in TABLES)
    tables = torch.tensor([table + [-1] * (longest - len(table)) for table in TABLES])
    return paged_attention(query, k_cache, v_cache, tables, torch.tensor(CONTEXT_LENS))[:, 0].tolist()
