"""A model of the time of one decode step on several GPUs: its parts, one after the other. Pure arithmetic.

    python -m benchmarks.step_model        the tables of docs/performance.md for 16 and 64 ranks, on paper

B sequences, C their mean context in tokens, R ranks, b bytes of a value; other letters as in nanovllm/bench/limits.py:

    matrices     max(b (P + E V) / R / memory, 2 B (P + E V) / R / matmul)
    attention    2 b L max(1, K / R) D B C / memory: decode reads each key and value once, and computes little
    activations  b B (L (8 E + 2 (H / R + 2 max(1, K / R)) D + 3 F / R) + 4 E) / memory: what norms, rotation and SiLU
                 read and write
    sampling     the time in which a rank draws B tokens from its V / R logits a row
    kernels      (KERNELS_PER_LAYER L + KERNELS_PER_STEP) x the time that starting one more kernel of a graph takes
    all-reduce   (2 L + 1) x the time of an all-reduce of b B E bytes: two a layer, and the embedding's
    gather       the time in which all ranks get these tokens and their scores, BYTES_PER_TOKEN B bytes, from each rank

Left out: the host (async scheduling computes it meanwhile). All of P are read by a step of dense layers; of experts,
those that B tokens choose.

Between machines an all-reduce is hierarchical: a reduce-scatter inside each machine, an all-reduce of the 1/r that
each of its r GPUs holds with its peers in the other machines, an all-gather inside. Rings and trees have the costs of
Thakur, Rabenseifner, Gropp: Optimization of collective communication operations in MPICH (2005).
"""

from collections.abc import Sequence
from math import ceil, log2
from types import SimpleNamespace
from typing import Any, NamedTuple

from nanovllm.bench.limits import BYTES_PER_VALUE, Ceilings
from nanovllm.bench.random_model import SHAPES
from nanovllm.distributed.peer_memory import fits
from nanovllm.parameter_counts import layer_parameters, parameters_per_token

KERNELS_PER_LAYER = 9  # two norms, rotation and store, attention, its combination, four products; SiLU is part of one
KERNELS_PER_STEP = 8  # embedding, last norm, output layer, sampling, and what brings the inputs
BYTES_PER_TOKEN = 16  # a token id and its score
RANKS_PER_MACHINE = 8


class Batch(NamedTuple):
    """A decode step of num_seqs sequences whose contexts have num_tokens tokens on average."""

    num_seqs: int
    num_tokens: float


class Costs(NamedTuple):
    """What one rank's device and the network take: ceilings of the device, seconds of the rest.

    kernel: starting one more kernel of a graph. sampling: drawing the tokens of the batch from a rank's logits.
    all_reduce: of its hidden states. gather: of the tokens.
    """

    ceilings: Ceilings
    kernel: float
    sampling: float
    all_reduce: float
    gather: float


class StepTimes(NamedTuple):
    """Seconds of the parts of a step."""

    matrices: float
    attention: float
    activations: float
    kernels: float
    sampling: float
    all_reduce: float
    gather: float

    @property
    def seconds(self) -> float:
        return sum(self)


def step_times(model: Any, dtype: str, batch: Batch, num_ranks: int, costs: Costs) -> StepTimes:
    """The step of `batch` on each of num_ranks ranks. model: a ModelConfig. dtype: of weights and KV cache."""
    bytes_per_value, ceilings, lm_head = BYTES_PER_VALUE[dtype], costs.ceilings, _lm_head(model)
    read = bytes_per_value * (layer_parameters(model, batch.num_seqs) + lm_head) / num_ranks
    operations = 2 * batch.num_seqs * (parameters_per_token(model) + lm_head) / num_ranks
    kv_heads = max(1, model.num_key_value_heads / num_ranks)  # more ranks than heads: several hold the same head
    values = 2 * model.num_hidden_layers * kv_heads * model.head_dim * batch.num_seqs * batch.num_tokens
    layers, is_divided, hidden = model.num_hidden_layers, num_ranks > 1, model.hidden_size
    heads = model.num_attention_heads / num_ranks + 2 * kv_heads
    of_layer = 8 * hidden + 2 * heads * model.head_dim + 3 * _intermediate_size(model) / num_ranks
    activations = batch.num_seqs * (layers * of_layer + 4 * hidden)
    return StepTimes(
        matrices=max(read / ceilings.memory, operations / ceilings.matmul),
        attention=bytes_per_value * values / ceilings.memory,
        activations=bytes_per_value * activations / ceilings.memory,
        kernels=(KERNELS_PER_LAYER * layers + KERNELS_PER_STEP) * costs.kernel,
        sampling=costs.sampling,
        all_reduce=(2 * layers + 1) * costs.all_reduce if is_divided else 0.0,
        gather=costs.gather if is_divided else 0.0,
    )


def _intermediate_size(model: Any) -> int:
    """Of a token, in all of its experts."""
    if model.moe is None:
        return model.intermediate_size
    return model.moe.num_experts_per_tok * model.moe.moe_intermediate_size


def _lm_head(model: Any) -> int:
    return model.hidden_size * model.vocab_size


class Link(NamedTuple):
    """latency: seconds of a message, or inside a machine of a whole collective. bandwidth: bytes a second of one GPU,
    each way.
    """

    latency: float
    bandwidth: float


class Cluster(NamedTuple):
    """num_machines of ranks_per_machine GPUs; a link inside, and one of each GPU to other machines.

    inside: through NCCL. one_shot: of the engine's kernel, which takes all-reduces of which a rank sends few bytes.
    """

    ranks_per_machine: int
    num_machines: int
    inside: Link
    one_shot: Link
    between: Link

    def all_reduce(self, num_bytes: float) -> float:
        """Seconds of an all-reduce of num_bytes, between the machines by the faster of ring and tree."""
        ranks, machines, seconds = self.ranks_per_machine, self.num_machines, 0.0
        sent = (ranks - 1) * num_bytes
        if ranks > 1 and machines == 1 and fits(num_bytes, ranks):
            seconds += self.one_shot.latency + sent / self.one_shot.bandwidth
        elif ranks > 1:
            seconds += self.inside.latency + 2 * sent / ranks / self.inside.bandwidth
        if machines > 1:
            moving = 2 * num_bytes / ranks / self.between.bandwidth
            ring = 2 * (machines - 1) * self.between.latency + (machines - 1) / machines * moving
            seconds += min(ring, 2 * ceil(log2(machines)) * self.between.latency + moving)
        return seconds

    def all_gather(self, num_bytes: float) -> float:
        """Seconds until all ranks have num_bytes of each: in a ring between machines, then inside each of them."""
        seconds = (self.num_machines - 1) * (self.between.latency + num_bytes / self.between.bandwidth)
        if self.ranks_per_machine > 1:
            received = (self.ranks_per_machine - 1) * self.num_machines * num_bytes
            seconds += self.inside.latency + received / self.inside.bandwidth
        return seconds


# --- on paper ---

H200 = Ceilings(memory=4.35e12, matmul=784e12)  # measured: docs/performance.md, section 7
KERNEL_SECONDS = 1e-6
SAMPLING_SECONDS = 1.6e-12  # of a logit
NVLINK = Link(latency=10e-6, bandwidth=0.8 * 450e9)
ONE_SHOT = Link(latency=2.7e-6, bandwidth=190e9)
NETWORKS = [Link(latency, 400e9 / 8) for latency in (10e-6, 20e-6)]  # a NIC of 400 Gb/s for each GPU
BATCHES = {"headline": Batch(256, 843), "small": Batch(8, 1256)}  # in the middle of these scenarios
_LLAMA_8B = {**SHAPES["llama-3-8b"][1], "moe": None}
_LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
PAPER_MODELS: dict[str, tuple[Any, Sequence[int]]] = {  # and the numbers of ranks that can share the model and hold it
    "Llama 3 8B": (SimpleNamespace(**_LLAMA_8B), (1, 2, 4, 8, 16)),
    "Llama 3 70B": (SimpleNamespace(**{**_LLAMA_8B, **_LLAMA_70B}), (2, 4, 8, 16, 64)),
}


def on_paper(model: Any, batch: Batch, num_ranks: int, network: Link) -> StepTimes:
    """The step in bfloat16 on H200s, RANKS_PER_MACHINE to a machine."""
    machines = ceil(num_ranks / RANKS_PER_MACHINE)
    cluster = Cluster(num_ranks // machines, machines, NVLINK, ONE_SHOT, network)
    all_reduce = cluster.all_reduce(2 * batch.num_seqs * model.hidden_size)
    gather = cluster.all_gather(BYTES_PER_TOKEN * batch.num_seqs)
    sampling = SAMPLING_SECONDS * batch.num_seqs * model.vocab_size / num_ranks
    return step_times(model, "bfloat16", batch, num_ranks, Costs(H200, KERNEL_SECONDS, sampling, all_reduce, gather))


def paper_table(batch: Batch) -> str:
    """Markdown. Where machines share a model, each figure is that of the faster and of the slower network."""
    lines = [
        "| model | ranks | machines | matrices | attention | activations | kernels | sampling | all-reduce | gather | "
        "step ms | out tok/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (model, sizes) in PAPER_MODELS.items():
        for size in sizes:
            networks = NETWORKS if size > RANKS_PER_MACHINE else NETWORKS[:1]
            several = [on_paper(model, batch, size, network) for network in networks]
            parts = [" - ".join(dict.fromkeys(f"{1e3 * t:.2f}" for t in times)) for times in zip(*several, strict=True)]
            step = " - ".join(f"{1e3 * times.seconds:.2f}" for times in several)
            speed = " - ".join(f"{batch.num_seqs / times.seconds:,.0f}" for times in several)
            cells = [name, str(size), str(ceil(size / RANKS_PER_MACHINE)), *parts, step, speed]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    for name, batch in BATCHES.items():
        print(f"{name}: {batch.num_seqs} sequences of {batch.num_tokens:,.0f} tokens; milliseconds\n")
        print(f"{paper_table(batch)}\n")


if __name__ == "__main__":
    main()
