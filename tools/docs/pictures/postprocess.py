"""Three sequences before a step and after postprocess(): cached tokens, tokens of the step, and appended tokens.

Sequence 0 computes the rest of its prompt and gets a token. Sequence 1 computes the first chunk of its prompt and gets
none yet. The first token of sequence 2 is its last, so it leaves and gives its block back.
"""

from reference.block_manager import BlockManager
from reference.postprocess import postprocess
from reference.scheduler import Decision, Sequence
from tools.docs.svg import Drawing

SEQUENCES = (
    Sequence(0, (1, 2, 3, 4, 5), num_prompt_tokens=5, max_tokens=5, num_cached_tokens=3),
    Sequence(1, (6, 7, 8, 9, 10, 11), num_prompt_tokens=6, max_tokens=5),
    Sequence(2, (12, 13), num_prompt_tokens=2, max_tokens=1),
)
SCHEDULED, SAMPLED = ((0, 2), (1, 4), (2, 2)), {0: 21, 2: 22}


def draw() -> Drawing:
    pool = BlockManager(num_blocks=7, block_size=4)
    for seq in SEQUENCES:
        pool, _ = pool.allocate(seq.seq_id, seq.token_ids)
    before = Decision(True, SCHEDULED, (), SEQUENCES, pool, 0)
    after, finished = postprocess(before, SAMPLED, max_model_len=64)
    left, cell = 56, 38
    drawing = Drawing(372, 306, "Sequences before and after a step is postprocessed")
    for top, title, decision in ((8, "the step", before), (140, "after postprocess()", after)):
        num_free = len(decision.block_manager.free)
        drawing.text(8, top + 10, f"{title}: {num_free} free blocks", "bold", "start")
        running = {seq.seq_id: seq for seq in decision.running}
        for seq_id, count in SCHEDULED:
            y = top + 22 + 32 * seq_id
            drawing.text(left - 10, y + 17, f"seq {seq_id}", "small", "end")
            if seq_id not in running:
                drawing.text(left, y + 17, f"has left with “{finished[seq_id]}”", "faint small", "start")
                continue
            seq = running[seq_id]
            for position, token in enumerate(seq.token_ids):
                is_computed = decision is before and position < seq.num_cached_tokens + count
                look = "a" if position < seq.num_cached_tokens else "b" if is_computed else "free"
                is_new = position >= len(SEQUENCES[seq_id].token_ids)
                drawing.box(left + cell * position, y, cell, 26, "c" if is_new else look, token)
    legend = (("a", "cached"), ("b", "computed in this step"), ("c", "appended"), ("free", "not computed yet"))
    for number, (look, text) in enumerate(legend):
        x, y = 8 + 170 * (number % 2), 266 + 20 * (number // 2)
        drawing.box(x, y, 14, 14, look)
        drawing.text(x + 20, y + 11, text, "small", "start")
    return drawing
