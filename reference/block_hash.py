"""Block hash: a number that names a full block of tokens together with everything before it.

    block_hash(tokens, parent) = xxh64(parent as 8 bytes, if there is one, then each token as 8 bytes), little-endian

Why the parent: keys and values depend on the whole prefix, not only on the block's own tokens. A chain of hashes covers
the prefix at the cost of one block: equal parents mean equal prefixes, so equal hashes mean equal texts from the start.
Why xxh64: it is fast and its values are well distributed. But 64 bits can collide, and texts that collide can be
constructed, so the hash only says where to look: the engine compares tokens and parents before it shares a block.

XXH64 (Yann Collet, github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), all arithmetic modulo 2**64: four
accumulators each take 8 bytes of every 32; they are combined into one number; the bytes that are left are mixed in by
8, 4 and 1; finally every bit is made to depend on every other.
"""

import struct
from collections.abc import Sequence

MASK = 2**64 - 1
P1, P2, P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9  # the specification's primes
P4, P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5


def block_hash(token_ids: Sequence[int], parent: int | None = None) -> int:
    """The hash of a full block whose predecessor has the hash parent (None: it is the first).

    >>> block_hash([1, 2]) == xxh64(bytes([1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]))
    True
    >>> block_hash([3, 4], parent=block_hash([1, 2])) == block_hash([3, 4], parent=block_hash([9, 2]))
    False
    """
    prefix = b"" if parent is None else struct.pack("<Q", parent)
    return xxh64(prefix + struct.pack(f"<{len(token_ids)}q", *token_ids))


def xxh64(data: bytes, seed: int = 0) -> int:
    """XXH64 of data; the specification gives the hash of no bytes at all:

    >>> hex(xxh64(b""))
    '0xef46db3751d8e999'
    """
    full = len(data) // 32 * 32
    if full:
        a = [(seed + start) & MASK for start in (P1 + P2, P2, 0, -P1)]
        for stripe in struct.iter_unpack("<4Q", data[:full]):
            a = [eat(accumulator, lane) for accumulator, lane in zip(a, stripe, strict=True)]
        h = rotate_left(a[0], 1) + rotate_left(a[1], 7) + rotate_left(a[2], 12) + rotate_left(a[3], 18)
        for accumulator in a:
            h = ((h ^ eat(0, accumulator)) * P1 + P4) & MASK
    else:
        h = seed + P5
    h = (h + len(data)) & MASK

    rest = data[full:]
    while len(rest) >= 8:
        h = (rotate_left(h ^ eat(0, int.from_bytes(rest[:8], "little")), 27) * P1 + P4) & MASK
        rest = rest[8:]
    if len(rest) >= 4:
        h = (rotate_left(h ^ (int.from_bytes(rest[:4], "little") * P1 & MASK), 23) * P2 + P3) & MASK
        rest = rest[4:]
    for byte in rest:
        h = rotate_left(h ^ (byte * P5 & MASK), 11) * P1 & MASK

    h = (h ^ h >> 33) * P2 & MASK
    h = (h ^ h >> 29) * P3 & MASK
    return h ^ h >> 32


def eat(accumulator: int, lane: int) -> int:
    """One round: mix 8 bytes into an accumulator."""
    return rotate_left((accumulator + lane * P2) & MASK, 31) * P1 & MASK


def rotate_left(x: int, bits: int) -> int:
    """x as 64 bits, turned left.

    >>> rotate_left(0b101, 1), rotate_left(2**63, 1)
    (10, 1)
    """
    return (x << bits | x >> 64 - bits) & MASK


if __name__ == "__main__":
    __import__("reference").show_examples(__file__)
