"""Oracle: what reference.generate says a request's tokens must be, and whether a difference is rounding or a bug."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from nanovllm import SamplingParams
from reference.checkpoint import Checkpoint, load_checkpoint
from reference.generate import Generation, generate
from reference.sampling import sampling
from reference.transformer import transformer
from tests.support.counts import count_comparisons, count_event, record_error

# Two float32 evaluations of one function differ from float64 by errors of the same size; the largest of some thousand
# such errors is rarely over twice another such largest, so four times the reference's own is not reached by rounding.
ERROR_RATIO = 4.0
NOISE_BOUND = 1e-5  # float32's error of temperature scaling and of the Gumbel noise where it can win


@dataclass
class Oracle:
    """reference.generate on one checkpoint in float64, each request computed once.

    num_compared and num_excused count tokens: an excused one differs where the two best are closer than rounding.
    """

    model_dir: Path
    max_model_len: int | None = None
    num_compared: int = 0
    num_excused: int = 0

    def __post_init__(self) -> None:
        self._generations: dict[object, Generation] = {}

    @cached_property
    def exact(self) -> Checkpoint:
        return load_checkpoint(self.model_dir, torch.float64)

    @cached_property
    def single(self) -> Checkpoint:
        return load_checkpoint(self.model_dir, torch.float32)

    @cached_property
    def rounding(self) -> float:
        """The largest error of the reference's own float32 logits, over 64 positions of a text."""
        vocab_size = len(self.exact.weights["model.embed_tokens.weight"])
        text = torch.randint(vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
        return float((transformer(text, *self.single) - transformer(text, *self.exact)).abs().max())

    def generate(self, prompt: list[int], params: SamplingParams, seed: int) -> Generation:
        """The reference's tokens and float64 logits; `seed` is the request's resolved one."""
        key = (tuple(prompt), params, seed)
        if key not in self._generations:
            self._generations[key] = generate(
                self.exact,
                prompt,
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                seed=seed,
                ignore_eos=params.ignore_eos,
                stop_token_ids=params.stop_token_ids,
                max_model_len=self.max_model_len,
            )
        return self._generations[key]

    def check(
        self,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        token_ids: list[int],
        reason: str,
        logits: list[torch.Tensor] | None = None,
    ) -> None:
        """Fail unless a finished (or aborted) request's tokens and finish_reason are the reference's.

        logits: for each token the logits that it was sampled from, if they are to be compared too: all, or with several
            ranks those of the first tokens, which rank 0 computes.
        """
        expected = self.generate(prompt, params, seed)
        for step, (ours, theirs) in enumerate(zip(token_ids, expected.token_ids, strict=False)):
            self.num_compared += 1
            count_comparisons("engine: tokens against reference.generate")
            if logits is not None:
                row = logits[step].double()
                error = float((row - expected.logits[step][: len(row)]).abs().max())
                allowed = ERROR_RATIO * self.rounding
                assert error <= allowed, (
                    f"the logits of token {step} are off by {error}, allowed {allowed}; prompt {prompt}, {params}, "
                    f"seed {seed}"
                )
                record_error("engine: logits against reference.generate", error, allowed)
                count_comparisons("engine: logits against reference.generate", len(logits[step]))
            if ours != theirs:
                prefix = [*prompt, *token_ids[:step]]
                assert self.is_rounding(prefix, params, seed, ours), (
                    f"token {step} is {ours}, the reference's {theirs}; prompt {prompt}, {params}, seed {seed}, "
                    f"tokens {token_ids}, reference {expected.token_ids}"
                )
                self.num_excused += 1
                count_event("token excused as a near tie")
                return  # from here on the two continue different texts
        if reason == "abort":
            assert len(token_ids) <= len(expected.token_ids)
        else:
            assert (token_ids, reason) == (expected.token_ids, expected.finish_reason), f"prompt {prompt}, {params}"

    def is_rounding(self, prefix: list[int], params: SamplingParams, seed: int, ours: int) -> bool:
        """Whether float32 rounding of the logits can make `ours` the choice after `prefix`."""
        exact = transformer(prefix, *self.exact)[-1]
        single = transformer(prefix, *self.single)[-1].double()
        bound = ERROR_RATIO * float((exact - single).abs().max()) + NOISE_BOUND * params.temperature

        def choice(logits: torch.Tensor) -> int:
            return sampling(
                logits, params.temperature, params.top_k, params.top_p, params.min_p, seed, position=len(prefix)
            )

        up = torch.full_like(exact, -bound)
        up[ours] = bound
        down = torch.zeros_like(exact)
        down[choice(exact)] = -bound
        return ours in {choice(exact + up), choice(exact + down), choice(exact + up + down)}
