"""A schedule over time: what schedule() and postprocess() decide for four requests, one row a sequence.

A number counts the tokens that the step computes for the sequence: a prompt, a chunk of it, or one token of decode.
Sequence 3 is preempted (x) when the blocks run out. It waits at the front of the queue, and then computes its prompt
and the tokens that it had generated once more, since other sequences have taken its blocks.
"""

from reference.block_manager import BlockManager
from reference.postprocess import postprocess
from reference.scheduler import Decision, Sequence, schedule
from tools.docs.svg import Drawing

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 64}
PROMPTS, MAX_TOKENS = [4, 12, 3, 4], [10, 8, 7, 7]
NUM_BLOCKS, BLOCK_SIZE = 11, 4
LOOKS = {"prefill": "a", "chunk": "d", "decode": "c", "preempted": "b"}


def draw() -> Drawing:
    steps = run()
    cell, left, top, row = 23, 72, 26, 30
    drawing = Drawing(left + len(steps) * cell + 8, top + 5 * row + 70, "Which sequence computes what in each step")
    drawing.text(left - 8, 16, "step", "faint small", "end")
    for number, (events, num_free) in enumerate(steps):
        x = left + number * cell
        drawing.text(x + cell / 2, 16, number, "faint small")
        for seq_id, (event, count) in events.items():
            y = top + seq_id * row
            if event == "waiting":
                drawing.line((x, y + 11), (x + cell, y + 11), look="dashed")
            else:
                drawing.box(x, y, cell, 22, LOOKS[event], count or "x")
        drawing.text(x + cell / 2, top + 4 * row + 18, num_free, "small")
    for seq_id, (prompt, output) in enumerate(zip(PROMPTS, MAX_TOKENS, strict=True)):
        drawing.text(left - 8, top + seq_id * row + 11, f"seq {seq_id}", "small bold", "end")
        drawing.text(left - 8, top + seq_id * row + 22, f"{prompt} + {output}", "faint small", "end")
    drawing.text(left - 8, top + 4 * row + 18, "free blocks", "faint small", "end")
    for number, (name, look) in enumerate(LOOKS.items()):
        x, y = left + (number % 2) * 150, top + 5 * row + 8 + (number // 2) * 22
        drawing.box(x, y, 16, 16, look)
        drawing.text(x + 22, y + 12, name if name != "chunk" else "chunk: prompt goes on", "small", "start")
    drawing.line((left, top + 5 * row + 60), (left + 16, top + 5 * row + 60), look="dashed")
    drawing.text(left + 22, top + 5 * row + 64, "waiting", "small", "start")
    return drawing


def run() -> list[tuple[dict[int, tuple[str, int]], int]]:
    """For each step: sequence -> (what happens to it, number of tokens); and the free blocks while it is computed."""
    waiting = tuple(
        Sequence(seq_id, tuple(100 * seq_id + i for i in range(prompt)), prompt, output)
        for seq_id, (prompt, output) in enumerate(zip(PROMPTS, MAX_TOKENS, strict=True))
    )
    state = Decision(False, (), waiting, (), BlockManager(NUM_BLOCKS, BLOCK_SIZE), 0)
    steps = []
    for _ in range(40):
        if not (state.waiting or state.running):
            return steps
        queues = (state.waiting, state.running, state.block_manager)
        step = schedule(*queues, **LIMITS, num_consecutive_prefills=state.num_consecutive_prefills)
        left = {seq.seq_id: seq.num_left for seq in (*step.running, *step.waiting)}
        events = {seq.seq_id: ("waiting", 0) for seq in step.waiting}
        events |= dict.fromkeys(step.preempted, ("preempted", 0))
        for seq_id, count in step.scheduled:
            event = "decode" if not step.is_prefill else "prefill" if count == left[seq_id] else "chunk"
            events[seq_id] = (event, count)
        steps.append((events, len(step.block_manager.free)))
        sampled = {seq_id: 1000 + len(steps) for seq_id, count in step.scheduled if count == left[seq_id]}
        state, _ = postprocess(step, sampled, LIMITS["max_model_len"])
    raise RuntimeError("the requests of this picture must end within 40 steps")
