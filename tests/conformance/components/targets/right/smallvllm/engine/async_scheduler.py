"""AsyncScheduler: a decode step may be scheduled before the tokens of the step in flight are known."""

from smallvllm.engine.scheduler import Scheduler
from smallvllm.engine.sequence import Sequence


class AsyncScheduler(Scheduler):
    """schedule() may be called again before postprocess() of a decode step, of which one may be in flight.

    A prefill must be postprocessed first. Each token in flight is a placeholder of its sequence.
    """

    def schedule(self) -> tuple[list[Sequence], bool]:
        seqs, is_prefill = super().schedule()
        if not is_prefill:
            for seq in seqs:
                seq.num_output_placeholders += 1
        return seqs, is_prefill

    def can_decode(self, seq: Sequence) -> bool:
        """Not what the tokens in flight complete."""
        return super().can_decode(seq) and seq.num_completion_tokens + seq.num_output_placeholders < seq.max_tokens

    def preempt(self, seq: Sequence):
        seq.num_output_placeholders = 0
        super().preempt(seq)

    def postprocess(self, seqs: list[Sequence], token_ids: list[int], is_prefill: bool):
        """Tokens of sequences that have ended or were preempted meanwhile are discarded."""
        pairs = list(zip(seqs, token_ids, strict=True))
        if not is_prefill:
            pairs = [(seq, token_id) for seq, token_id in pairs if seq.num_output_placeholders]
            for seq, _ in pairs:
                seq.num_output_placeholders -= 1
        super().postprocess([seq for seq, _ in pairs], [token_id for _, token_id in pairs], is_prefill)

    def finish(self, seq: Sequence):
        seq.num_output_placeholders = 0
        super().finish(seq)
