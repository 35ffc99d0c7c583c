"""The workload: random prompts, drawn as nano-vllm's bench.py draws them; five scenarios; Poisson arrivals."""

import random
import sys
from dataclasses import dataclass, replace
from itertools import accumulate

from nanovllm.sampling_params import SamplingParams
from nanovllm.validation import require_int, require_number

TEMPERATURE = 0.6
MAX_TOKEN_ID = 10000  # the largest id that is drawn, if the vocabulary has it
NUM_SHARED_IDS = 1000  # the ids of a shared prefix are drawn from the first 1000 of the vocabulary

Requests = tuple[list[list[int]], list[SamplingParams]]  # prompts, and the parameters of each


@dataclass(frozen=True)
class Scenario:
    """num_seqs requests, whose lengths in tokens are drawn from the inclusive ranges input_len and output_len.

    num_shared: length of the prefix that all prompts share, in addition to input_len.
    counts_input: whether the figure is prompt tokens a second; otherwise it is generated tokens a second.
    """

    num_seqs: int
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    num_shared: int = 0
    counts_input: bool = False

    @property
    def max_len(self) -> int:
        """The longest sequence in tokens, prompt and output together."""
        return self.num_shared + self.input_len[1] + self.output_len[1]

    @property
    def counted(self) -> str:
        """Which tokens the figure counts: "in" or "out"."""
        return "in" if self.counts_input else "out"

    def scaled(self, factor: float) -> "Scenario":
        """The scenario with `factor` times as many requests and tokens: at least 1 each, and 2 generated tokens.

        Raises ValueError unless factor is a number above 0.
        """
        require_number("scale", factor, "a number above 0", lambda value: value > 0, remedy="1 is the whole scenario")

        def times(number: int, minimum: int) -> int:
            return max(minimum, round(min(number * factor, sys.maxsize)))  # a product may be infinite

        return replace(
            self,
            num_seqs=times(self.num_seqs, 1),
            input_len=(times(self.input_len[0], 1), times(self.input_len[1], 1)),
            output_len=(times(self.output_len[0], 2), times(self.output_len[1], 2)),  # 2: one time per output token
            num_shared=times(self.num_shared, 1) if self.num_shared else 0,
        )


SCENARIOS = {
    "headline": Scenario(256, (100, 1024), (100, 1024)),
    "single": Scenario(1, (128, 128), (512, 512)),
    "small": Scenario(8, (1000, 1000), (512, 512)),
    "prefill": Scenario(64, (4000, 4000), (16, 16), counts_input=True),
    "prefix": Scenario(256, (100, 100), (64, 64), num_shared=2000, counts_input=True),
}


def draw_requests(
    num_seqs: int, input_len: tuple[int, int], output_len: tuple[int, int], vocab_size: int, seed: int
) -> Requests:
    """Prompts of random token ids, and parameters that generate exactly the drawn number of tokens.

    Both ranges are inclusive. Raises ValueError for an empty range or a length below 1.
    """
    require_int("num_seqs", num_seqs, 1)
    for name, (low, high) in (("input_len", input_len), ("output_len", output_len)):
        require_int(f"{name}'s minimum", low, 1)
        require_int(f"{name}'s maximum", high, low, remedy="MIN comes before MAX")
    rng = random.Random(seed)
    top = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts = [[rng.randint(0, top) for _ in range(rng.randint(*input_len))] for _ in range(num_seqs)]
    params = [
        SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=rng.randint(*output_len))
        for _ in range(num_seqs)
    ]
    return prompts, params


def draw_scenario(scenario: Scenario, vocab_size: int, seed: int) -> Requests:
    """The scenario's requests. Another seed gives other prompts, so the prefix cache has no block of them."""
    prompts, params = draw_requests(scenario.num_seqs, scenario.input_len, scenario.output_len, vocab_size, seed)
    rng = random.Random(-1 - seed)
    shared = [rng.randrange(min(NUM_SHARED_IDS, vocab_size)) for _ in range(scenario.num_shared)]
    return [shared + prompt for prompt in prompts], params


def poisson_arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Arrival times in seconds from the start, in order: a Poisson process of `rate` requests a second, above 0.

    The gaps between arrivals, and the time before the first one, are exponential with mean 1 / rate.
    """
    rng = random.Random(f"arrivals {seed}")
    return list(accumulate(rng.expovariate(1.0) / rate for _ in range(num_requests)))
