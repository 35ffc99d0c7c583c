"""Floors: the least that a run must have compared and met, or it fails, though every test passed.

They apply when everything ran, not to a part of it. Where Hypothesis draws the cases, a floor is about a quarter of the
least that several seeds reached with the smallest profile (dev), and for the CPU suite no higher than five standard
deviations, of the logarithm, below the mean of 24 seeds, since some of these counts vary a hundredfold: another draw
passes, a campaign that lost its point does not. Where the cases are fixed, it is about nine tenths: one or two may go,
a list of cases that became empty not.
"""

from typing import NamedTuple

from tests.evidence import COMPILED, INTERPRETED, KERNELS, ON_A_GPU
from tests.report.facts import GPU, WHOLE, Facts


class Floor(NamedTuple):
    least: int
    why: str


DRAWN = "far below what drawn cases reach"
FIXED = "nine tenths of the fixed cases"

_OF_THE_CPU_SUITE = {
    # the whole engine
    "engine: tokens against reference.generate": Floor(1_200, DRAWN),
    "engine: logits against transformers": Floor(1_440_000, FIXED),
    "engine: greedy tokens against transformers' logits": Floor(4_300, FIXED),
    "engine: greedy tokens against transformers' generate": Floor(1_000, FIXED),
    "equalities: logits bit for bit against the prompt alone": Floor(550_000, FIXED),
    "equalities: logits within rounding against the prompt alone": Floor(640, FIXED),
    "poison: computed rows against NaN": Floor(2_500, DRAWN),
    "async_scheduling against waiting for each step: outputs": Floor(14, FIXED),
    "replay: decisions and tokens against the trace": Floor(15_000, FIXED),
    "ranks: logits against the reference, float64": Floor(228_000, FIXED),
    "ranks: tokens against reference.generate": Floor(1_060, FIXED),
    "ranks: steps on pickled sequences against rank 0's own": Floor(33, FIXED),
    "ranks: texts of two machines against one process's": Floor(2, "all there are"),
    "ranks: messages received against those sent": Floor(20, DRAWN),
    # its parts
    "BlockManager against reference": Floor(4_000, DRAWN),
    "Scheduler against reference": Floor(2_000, DRAWN),
    "prepare_ahead against prepare_decode": Floor(28, FIXED),
    "graph buffers against the batch's integers": Floor(800, FIXED),
    "symbolic model: tokens against what was attended": Floor(3_600, DRAWN),
    "sampler: drawn tokens against float64": Floor(30, "the dev profile's examples"),
    "sampler statistics against exact probabilities": Floor(950_000, FIXED),
    "BlockManager: hashes against the reference": Floor(30, "the dev profile's examples, each one hash"),
    "model input: tokens, positions and slots against the definition": Floor(50, DRAWN),
    "model input: tokens of pickled sequences against those of the sender": Floor(45, DRAWN),
    "detokenizer: streamed tokens against the whole text": Floor(30, DRAWN),
    "models: logits against transformers": Floor(1_980_000, FIXED),
    "models: hidden states against transformers": Floor(397_000, FIXED),
    "models: logits of several ranks against those of one": Floor(16_500, FIXED),
    "loader: parameters against tensors packed by hand": Floor(115, FIXED),
    "attention: torch backend against the reference": Floor(71_000, FIXED),
    "attention: torch backend against the reference, float64": Floor(225_000, FIXED),
    "attention: KV cache against reference.store_kvcache": Floor(1_250_000, FIXED),
    "kernels: variants of a step's sizes": Floor(90, FIXED),
    "layers: Philox against the reference": Floor(6_300, FIXED),
    "layers: sampling noise against the reference": Floor(25_000, FIXED),
    "layers: RMSNorm against the reference": Floor(4_400, FIXED),
    "layers: activation against the reference": Floor(860, FIXED),
    "layers: linear against the reference": Floor(6_600, FIXED),
    "layers: embedding and output projection against the whole table": Floor(550, FIXED),
    "layers: mixture of experts against the reference": Floor(1_200, FIXED),
    "layers: rotary embedding against the reference": Floor(12_700, FIXED),
    "layers: rotary frequencies against transformers": Floor(100, FIXED),
    # the references' own oracles
    "reference: logits against transformers": Floor(87_000, FIXED),
    "reference: generated tokens against transformers": Floor(70, FIXED),
    "reference: sampling filters against transformers": Floor(4_300, FIXED),
    "reference: sampling filters against a walk along the tokens": Floor(400, DRAWN),
    "reference: attention against loops, PyTorch and laws": Floor(1_100, DRAWN),
    "reference: layers against loops, PyTorch and laws": Floor(900, FIXED),
    "reference: block tables against what was stored": Floor(1_200, DRAWN),
    "reference: xxh64 against the package": Floor(30, "the dev profile's examples"),
}

# kernel: values interpreted in float32 and in float16; variants compiled in bfloat16, float16 and float32
_KERNELS = {
    "grouped_gemm": (4_000, 1_600, 21, 21, 21),
    "moe_routing": (860, 0, 8, 8, 8),
    "paged_attention": (49_000, 14_600, 15, 3, 10),  # float32's sums are float64, and stand below
    "qk_norm_rope_store": (94_000, 12_700, 32, 10, 10),
    "rms_norm": (25_600, 23_800, 54, 18, 18),
    "rotary_embedding": (9_300, 9_300, 13, 4, 4),
    "sampling": (150, 16, 16, 16, 16),
    "silu_and_mul": (6_900, 6_200, 32, 10, 10),
    "store_kvcache": (786_000, 49_000, 13, 4, 4),
    "varlen_attention": (430_000, 156_000, 32, 10, 10),
    "varlen_attention_hopper": (0, 0, 12, 12, 0),  # for Hopper GPUs, in 16 bits, and not interpreted
}
_COLUMNS = [
    ("float32", INTERPRETED),
    ("float16", INTERPRETED),
    *((t, COMPILED) for t in ("bfloat16", "float16", "float32")),
]

# kernel: values compared on a GPU in bfloat16, float16 and float32; in thousands
_KERNELS_ON_A_GPU = {
    "grouped_gemm": (190, 190, 190),
    "paged_attention": (630, 700, 630),
    "qk_norm_rope_store": (420, 420, 430),
    "rms_norm": (69_000, 69_000, 69_000),
    "rotary_embedding": (15_000, 15_000, 15_000),
    "sampling": (0.2, 0.2, 0.2),
    "silu_and_mul": (25_000, 25_000, 25_000),
    "store_kvcache": (4, 4, 70),
    "varlen_attention": (13_000, 11_000, 13_000),
    "varlen_attention_hopper": (11_000, 6_400, 0),
}

COMPARISONS: dict[str, dict[str, Floor]] = {
    WHOLE: _OF_THE_CPU_SUITE
    | {
        f"{KERNELS}: {kernel}, {dtype}, {way}": Floor(least, FIXED)
        for kernel, numbers in _KERNELS.items()
        for (dtype, way), least in zip(_COLUMNS, numbers, strict=True)
        if least
    }
    | {f"{KERNELS}: paged_attention, float64, {COMPILED}": Floor(3, FIXED)},
    GPU: {
        "attention: flash_attn backend against the reference": Floor(2_200_000, DRAWN),
        "engine: greedy tokens against transformers' logits": Floor(31_000, FIXED),
        "engine: logits on a GPU against the reference": Floor(115_000, FIXED),
        "engine: tokens against reference.generate": Floor(2_500, FIXED),
        "equalities: logits bit for bit against the prompt alone": Floor(51_000, FIXED),
        "equalities: logits within rounding against the prompt alone": Floor(1_200, FIXED),
        "poison: computed rows against NaN": Floor(1_000, FIXED),
        "replay: decisions and tokens against the trace": Floor(5_300, FIXED),
    }
    | {
        f"{KERNELS}: {kernel}, {dtype}, {ON_A_GPU}": Floor(int(1000 * thousands), DRAWN)
        for kernel, numbers in _KERNELS_ON_A_GPU.items()
        for dtype, thousands in zip(("bfloat16", "float16", "float32"), numbers, strict=True)
        if thousands
    },
}
EVENTS: dict[str, dict[str, Floor]] = {
    WHOLE: {
        "preemption": Floor(24, DRAWN),
        "prefill chunk": Floor(39, DRAWN),
        "block hit": Floor(400, DRAWN),
        "block evicted": Floor(290, DRAWN),
        "hash collision": Floor(2_500, DRAWN),
        "abort": Floor(13, DRAWN),
        "allocation refused": Floor(150, DRAWN),
        "append refused": Floor(1, DRAWN),
        "refused at the door": Floor(35, DRAWN),
        "not stored again": Floor(40, DRAWN),
        "block poisoned": Floor(1_000, DRAWN),
        "replayed step": Floor(650, FIXED),
        "step ahead": Floor(170, DRAWN),
        "computed in vain": Floor(1, DRAWN),
        "preemption with several ranks": Floor(19, FIXED),
        "chunked prefill with several ranks": Floor(27, FIXED),
        "prefix hit with several ranks": Floor(360, FIXED),
        "graph replay": Floor(0, "CUDA graphs are replayed on a GPU only"),
    },
    GPU: {
        "graph replay": Floor(660, FIXED),
        "preemption": Floor(32, FIXED),
        "block hit": Floor(470, FIXED),
        "block poisoned": Floor(79, FIXED),
    },
}
LEAST_MUTATION_SCORE = 1.0  # of the listed mutants that are not equivalent
LEAST_GENERIC_SCORE = 0.95  # of a generic tool's, among which nobody looked for the equivalent ones


def judge(facts: Facts) -> list[str]:
    """Each figure of the run that lies below its floor, in words. A run that failed tests is not judged: it fails."""
    if facts.has_failed or facts.scope not in COMPARISONS:
        return []
    problems = []
    for what, floors, figures in (
        ("comparisons", COMPARISONS, facts.counts.comparisons),
        ("events", EVENTS, facts.counts.events),
    ):
        for name, floor in floors.get(facts.scope, {}).items():
            if figures[name] < floor.least:
                problems.append(f"{what}: {name}: {figures[name]:,}, below the floor of {floor.least:,} ({floor.why})")
    return problems + _judge_mutants(facts.mutants or {})


def num_mutants(score: dict) -> int:
    return score["mutants"] if "mutants" in score else score["total"]


def mutation_score(score: dict) -> float:
    """Caught, of those that are not equivalent."""
    noticeable = num_mutants(score) - score.get("equivalent", 0)
    return score["caught"] / noticeable if noticeable else 1.0


def _judge_mutants(mutants: dict) -> list[str]:
    scores = [(name, score, LEAST_MUTATION_SCORE) for name, score in mutants.get("components", {}).items()]
    if mutants.get("generic"):
        scores.append(("the generic tool's", mutants["generic"], LEAST_GENERIC_SCORE))
    return [
        f"mutants: {name}: {mutation_score(score):.1%} noticed, below the floor of {least:.0%}"
        for name, score, least in scores
        if mutation_score(score) < least
    ]
