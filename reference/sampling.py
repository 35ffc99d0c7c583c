"""Sampling: drop improbable tokens, then let the others race; the one that arrives first is the next token.

    z = logits / temperature
    top_k   keep v if z[v] is at least the k-th largest
    top_p   keep v if the tokens more probable than v have a mass below top_p (p = softmax of what top_k left)
    min_p   keep v if p[v] >= min_p * max p
    token   = argmax over kept v of  z[v] - log(e[v]),     e[v] = -log(1 - u[v]),  u[v] uniform on (0, 1)

Why a race draws from softmax(z): e[v] is exponential with rate 1, so e[v] / p[v], the time at which v arrives, is
exponential with rate p[v]. Of independent exponentials, v comes first with probability p[v] / (sum of the rates), so
the probabilities need not be normalised after tokens are dropped. The first has the largest p / e, and hence the
largest z - log(e). As -log(e) has Gumbel's distribution, this is the Gumbel-max trick.

Why counters: u[v] is word v % 4 of Philox with key = seed and counter = (v // 4, position). The token drawn is thus a
function of its logits, its request's seed and its position, and of nothing else in the batch.

Letters: V vocabulary. position: the place the token will take, counted from 0 = the length of the sequence so far.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reference.philox import WORD, philox


def sampling(
    logits: Float[Tensor, "V"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    position: int = 0,
) -> int:
    """The next token. top_k=1 is greedy: exactly the largest logit, the lowest id among equals, and no noise.

    >>> sampling(torch.tensor([1.0, 3.0, 3.0, 2.0]), top_k=1)
    1
    >>> logits = torch.tensor([0.5, 0.3, 0.2]).log()
    >>> draws = [sampling(logits, seed=7, position=position) for position in range(1000)]
    >>> [round(draws.count(token) / 1000, 1) for token in range(3)]
    [0.5, 0.3, 0.2]
    """
    if top_k == 1:
        return int((logits == logits.max()).nonzero()[0])
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    arrival = z - exponential_noise(seed, position, len(logits)).to(z.device).log()
    return int(arrival.where(allowed_mask(z, top_k, top_p, min_p), -torch.inf).argmax())


def allowed_mask(
    z: Float[Tensor, "V"], top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Bool[Tensor, "V"]:
    """Which tokens may be drawn; None switches a filter off. top_p drops equals from the highest id down.

    >>> z = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    >>> allowed_mask(z, top_k=3).tolist(), allowed_mask(z, top_p=0.6).tolist(), allowed_mask(z, min_p=0.6).tolist()
    ([False, True, True, True], [False, True, True, False], [False, True, True, False])
    """
    keep = torch.ones_like(z, dtype=torch.bool)
    if top_k is not None:
        keep = keep & (z >= z.sort(descending=True).values[min(top_k, len(z)) - 1])
    if top_p is not None and top_p < 1:
        p, order = z.where(keep, -torch.inf).softmax(dim=0).sort(descending=True, stable=True)
        mass_before = torch.cat([p.new_zeros(1), p.cumsum(0)[:-1]])
        keep = keep & (mass_before < top_p)[order.argsort()]
    if min_p is not None:
        p = z.where(keep, -torch.inf).softmax(dim=0)
        keep = keep & (p >= min_p * p.max())
    return keep


def exponential_noise(seed: int, position: int, vocab_size: int) -> Float[Tensor, "V"]:
    """e[v] > 0, finite, in float64. u stays half a step away from 0, and 2**-24 away from 1, where float32 ends.

    Philox's first words for key 0 and counter 0 are 0x6627e8d5 and 0xe169c58d, about 102/256 and 225/256 of 2**32:

    >>> 1 - exponential_noise(seed=0, position=0, vocab_size=2).neg().exp()  # u = 1 - exp(-e)
    tensor([0.3990, 0.8805], dtype=torch.float64)
    """
    token_ids = torch.arange(vocab_size)
    words = torch.stack(philox((seed & WORD, seed >> 32 & WORD), (token_ids // 4, position, 0, 0)))  # [4, V]
    word = words[token_ids % 4, token_ids]
    u = ((word.double() + 0.5) * 2**-32).clamp(max=1 - 2**-24)
    return -torch.log1p(-u)


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
