"""sampling: a token for every row in one pass over the logits. The kernel computes the Philox noise itself.

    z = logits / temperature;   e = -log(1 - u),  u = (word + 1/2) / 2**32;   token = argmax of z - log(e)

word is one of the four outputs of Philox 4x32-10; four consecutive tokens share a call (reference.philox).

The first launch finds the largest score of every tile of a row, in float32 with approximate logarithms, because drawing
costs more than reading. Its error is below score_error. The second launch finds, row by row, the tokens whose scores
are within twice that error of the row's largest (nearly always one, in one tile) and computes their scores in float64.
So the token is that of float64 scores, as in layers.sampler: the two can differ only where the best two scores agree to
about 1e-15 of their size, by the last bit of a logarithm.
"""

import math

import torch
import triton
import triton.language as tl
from triton import knobs

from nanovllm.kernels import DTYPES
from nanovllm.kernels.launching import launch, next_power_of_2

TILE_SIZE = 2048
EXACT_SIZE = 512  # tokens whose scores are computed in float64 together
WORDS_PER_CALL: tl.constexpr = tl.constexpr(4)
MAX_UNIFORM: tl.constexpr = tl.constexpr(1 - 2**-24)
LOG_2: tl.constexpr = tl.constexpr(math.log(2))
LOG2_LOG_2: tl.constexpr = tl.constexpr(math.log2(math.log(2)))
IS_INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)
LARGEST_FLOAT32: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)


def sampling(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed_low: torch.Tensor,
    seed_high: torch.Tensor,
    position: torch.Tensor,
    is_greedy: torch.Tensor,
    *,
    first_token: int = 0,
    scores: torch.Tensor | None = None,
    tile_size: int = TILE_SIZE,
    num_warps: int = 4,
    num_row_warps: int = 8,
) -> torch.Tensor:
    """[R] int64: a token id a row, drawn from softmax(logits / temperature), or the argmax where is_greedy.

    logits: [R, V] bfloat16, float16 or float32, last dimension contiguous, rows at any stride. Of the rest, [R] and
    contiguous: temperature float32, seed_low and seed_high int64 (the 32-bit halves of the seed), position int64 (the
    place that the token will take), is_greedy bool. tile_size: a power of two from 4.
    first_token: the id of the first column's token, where the logits are a part of the vocabulary. scores: [R] float64
    or None; the score of each row's token is written to it: the logit where is_greedy, else z - log(e).
    Among equal scores the lowest id wins. NaN counts as -inf, +inf as the largest finite number, and a row that holds
    nothing above -inf gives 0 and a score of -inf. Raises ValueError for other shapes, dtypes and strides.
    """
    _check(logits, temperature, seed_low, seed_high, position, is_greedy, scores)
    num_rows, vocab_size = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return token_ids
    tiles_start = first_token // 4 * 4  # a Philox call has the noise of four tokens
    num_tiles = -(-(first_token + vocab_size - tiles_start) // tile_size)
    maxima = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    row_arguments = (temperature, seed_low, seed_high, position, is_greedy)
    shape = (logits.stride(0), tiles_start, first_token, first_token + vocab_size, num_tiles)
    constants = {"LARGEST": torch.finfo(logits.dtype).max, "TILE_SIZE": tile_size}
    launch(
        sampling_tile_kernel,
        (num_rows * num_tiles,),
        logits, *row_arguments, maxima, *shape, **constants,
        num_warps=num_warps,
    )  # fmt: skip
    launch(
        sampling_row_kernel,
        (num_rows,),
        logits, *row_arguments, maxima, token_ids, scores, *shape, **constants,
        MAX_TILES=next_power_of_2(num_tiles), EXACT_SIZE=min(EXACT_SIZE, tile_size),
        num_warps=num_row_warps,
    )  # fmt: skip
    return token_ids


def _check(logits: torch.Tensor, temperature: torch.Tensor, *others: torch.Tensor | None) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [num_rows, vocab_size], not empty, got shape {list(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}; convert them")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits' last dimension must be contiguous, got strides {logits.stride()}; use contiguous()")
    names = ("temperature", "seed_low", "seed_high", "position", "is_greedy", "scores")
    dtypes = (torch.float32, torch.int64, torch.int64, torch.int64, torch.bool, torch.float64)
    for name, tensor, dtype in zip(names, (temperature, *others), dtypes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, of shape [{len(logits)}] and {dtype}, "
                f"got shape {list(tensor.shape)}, strides {tensor.stride()} and {tensor.dtype}"
            )


# These pointers are rows of one tensor, so their 16-byte alignment depends on the batch size; do not specialise on it.
ROW_POINTERS = ["temperature_ptr", "seed_low_ptr", "seed_high_ptr", "position_ptr", "is_greedy_ptr"]


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def sampling_tile_kernel(
    logits_ptr, temperature_ptr, seed_low_ptr, seed_high_ptr, position_ptr, is_greedy_ptr, maxima_ptr,
    row_stride, tiles_start, first_token, end_token, num_tiles,
    LARGEST: tl.constexpr, TILE_SIZE: tl.constexpr,
):  # fmt: skip
    """maxima[row, tile]: the largest logit of a greedy row, the largest score of another to within score_error."""
    program = tl.program_id(0)
    row = (program // num_tiles).to(tl.int64)  # int64: row * row_stride passes 2**31
    start = tiles_start + program % num_tiles * TILE_SIZE
    logits = load_logits(logits_ptr + row * row_stride, start, first_token, end_token, TILE_SIZE)
    if tl.load(is_greedy_ptr + row):
        largest = replace_non_finite(tl.max(logits), LARGEST)  # tl.max and tl.min ignore NaN
    else:
        minus_log2_scale = -1 / (tl.load(temperature_ptr + row) * LOG_2)
        seed_low, seed_high, position = load_counters(seed_low_ptr, seed_high_ptr, position_ptr, row)  # pyright: ignore
        words = philox_words(seed_low, seed_high, position, start, TILE_SIZE)
        first = tl.min(approx_log2_arrival_times(logits, minus_log2_scale, words))
        largest = replace_non_finite(scores_of(first), LARGEST_FLOAT32)
    tl.store(maxima_ptr + program, largest)


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def sampling_row_kernel(
    logits_ptr, temperature_ptr, seed_low_ptr, seed_high_ptr, position_ptr, is_greedy_ptr, maxima_ptr,
    token_ids_ptr, scores_ptr,
    row_stride, tiles_start, first_token, end_token, num_tiles,
    LARGEST: tl.constexpr, TILE_SIZE: tl.constexpr, MAX_TILES: tl.constexpr, EXACT_SIZE: tl.constexpr,
):  # fmt: skip
    """token_ids[row]: the best, by exact score, of the tokens whose approximate score comes close to the largest.

    scores[row]: its exact score, if scores_ptr is given.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    is_greedy = tl.load(is_greedy_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    seed_low, seed_high, position = load_counters(seed_low_ptr, seed_high_ptr, position_ptr, row)  # pyright: ignore
    tiles = tl.arange(0, MAX_TILES)
    maxima = tl.load(maxima_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=float("-inf"))
    threshold = tl.max(maxima)
    if not is_greedy:
        threshold -= 2 * score_error(threshold)
    is_close_tile = (maxima >= threshold) & (maxima > float("-inf"))

    best = tl.full((), float("-inf"), tl.float64)
    best_token = tl.zeros((), tl.int32)  # of a row that holds nothing above -inf
    tile = tl.min(tl.where(is_close_tile, tiles, num_tiles))
    while tile < num_tiles:
        tile_start = tiles_start + tile * TILE_SIZE
        tokens = tile_start + tl.arange(0, TILE_SIZE)
        scores = load_logits(row_ptr, tile_start, first_token, end_token, TILE_SIZE)
        if not is_greedy:
            words = philox_words(seed_low, seed_high, position, tile_start, TILE_SIZE)
            scores = scores_of(approx_log2_arrival_times(scores, -1 / (temperature * LOG_2), words))
        is_close = scores >= threshold
        close = tl.min(tl.where(is_close, tokens, end_token))
        while close < end_token:
            start = close // EXACT_SIZE * EXACT_SIZE
            logits = load_logits(row_ptr, start, first_token, end_token, EXACT_SIZE)
            if is_greedy:
                exact = replace_non_finite(logits, LARGEST).to(tl.float64)
            else:
                z = replace_non_finite(tl.div_rn(logits, temperature), LARGEST_FLOAT32)
                exact = z.to(tl.float64) + exact_gumbel(philox_words(seed_low, seed_high, position, start, EXACT_SIZE))
            largest = tl.max(exact)
            if largest > best:  # not >=: tokens come in ascending order, and the lowest id wins
                best = largest
                best_token = start + tl.min(tl.where(exact == largest, tl.arange(0, EXACT_SIZE), EXACT_SIZE))
            close = tl.min(tl.where(is_close & (tokens >= start + EXACT_SIZE), tokens, end_token))
        tile = tl.min(tl.where(is_close_tile & (tiles > tile), tiles, num_tiles))
    tl.store(token_ids_ptr + row, best_token.to(tl.int64))
    if scores_ptr is not None:
        tl.store(scores_ptr + row, best)


@triton.jit
def load_logits(row_ptr, start, first_token, end_token, SIZE: tl.constexpr):
    """[SIZE] float32 logits from token `start` on; outside the row, which begins with first_token, they are -inf."""
    token = start + tl.arange(0, SIZE)
    is_in_row = (token >= first_token) & (token < end_token)
    return tl.load(row_ptr + (token - first_token), mask=is_in_row, other=float("-inf")).to(tl.float32)


@triton.jit
def load_counters(seed_low_ptr, seed_high_ptr, position_ptr, row):
    seed_low = tl.load(seed_low_ptr + row).to(tl.uint32)
    seed_high = tl.load(seed_high_ptr + row).to(tl.uint32)
    return seed_low, seed_high, tl.load(position_ptr + row).to(tl.uint32)


@triton.jit
def replace_non_finite(x, LARGEST: tl.constexpr):
    """x without NaN (-inf instead) and without +inf (LARGEST instead)."""
    return tl.minimum(tl.where(x == x, x, float("-inf")), LARGEST)


@triton.jit
def philox_words(seed_low, seed_high, position, start, SIZE: tl.constexpr):
    """[SIZE] uint32: the words of the tokens from `start` on, a multiple of 4, as SIZE is."""
    calls = start // WORDS_PER_CALL + tl.arange(0, SIZE // WORDS_PER_CALL)
    c0, c1, c2, c3 = philox(seed_low, seed_high, calls.to(tl.uint32), position)  # pyright: ignore
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def philox(k0, k1, call, position):
    """The four words of Philox 4x32-10 for key (k0, k1) and counter (call, position, 0, 0), all uint32."""
    c0, c1, c2, c3 = call, position, tl.zeros_like(call), tl.zeros_like(call)
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def exact_gumbel(words):
    """-log(-log(1 - u)) in float64, in which u and 1 - u are exact."""
    u = tl.minimum((words.to(tl.float64) + 0.5) * 2.0**-32, MAX_UNIFORM)
    return -tl.log(-tl.log(1 - u))


@triton.jit
def approx_log2_arrival_times(logits, minus_log2_scale, words):
    """log2 of the exponentials' arrival times, -log2(1 - u) / 2**(logits * log2_scale), in float32; see scores_of.

    Below u = 2**-8, -log(1 - u) is approximated by u, which errs by a factor of at most 1 + 2**-9. Above, 1 - u has
    enough bits, except near u = 1 - 2**-24: there it errs by up to a half, which is log(3/2) / 16.6 = 0.025 of its log.
    Signs are chosen so that the GPU computes no negation.
    """
    word = words.to(tl.float32)
    small = word * (2.0**-32 / LOG_2) + 2.0**-33 / LOG_2
    large = 0.0 - fast_log2(tl.maximum(1 - word * 2.0**-32, 2.0**-24))
    return logits * minus_log2_scale + fast_log2(tl.where(small < 2.0**-8 / LOG_2, small, large))


@triton.jit
def scores_of(arrivals):
    """logits / temperature - log(-log(1 - u)) of approx_log2_arrival_times."""
    return (arrivals + LOG2_LOG_2) * -LOG_2


@triton.jit
def fast_log2(x):
    """The GPU's log2 instruction, for normal x: an error of 2**-22, absolute between 1/2 and 2, else relative."""
    if IS_INTERPRETED:  # the interpreter has no assembly
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def score_error(score):
    """A bound on the error of approx_log2_arrival_times: 0.03 of the noise, and a few roundings of the score itself."""
    return 2.0**-5 + tl.abs(score) * 2.0**-20
