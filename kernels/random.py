"""Counter-based random streams: Philox4x32 (Salmon et al., SC 2011) keyed by run, purpose, step and layer.

A draw depends on its key and its counter only, never on packing, order, device or the number of threads.
`stream_key` folds (run seed, purpose, step, layer, module) into the 64-bit key; a token's identity in its run's
batch and a column are the counter.
"""

from __future__ import annotations

import hashlib

import torch

ROUNDS = 7
"""Rounds of Philox4x32; 7 is the fewest that pass BigCrush (Salmon et al., table 2)."""

M0, M1 = 0xD2511F53, 0xCD9E8D57
"""Multipliers of a round."""
W0, W1 = 0x9E3779B9, 0xBB67AE85
"""What a round adds to the key."""
_MASK = 0xFFFFFFFF


def stream_key(seed: int, purpose: str, step: int = 0, layer: int = 0) -> int:
    """64-bit key of one random stream as a signed integer (what an int64 tensor holds)."""
    digest = hashlib.blake2b(f"{seed}|{purpose}|{step}|{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def philox(counter: tuple[torch.Tensor, ...], key: int) -> tuple[torch.Tensor, ...]:
    """Philox4x32 of four counter words (int64 tensors holding unsigned 32-bit values), one 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(ROUNDS):
        p0, p1 = _multiply(c0, M0), _multiply(c2, M1)
        c0, c1, c2, c3 = p1[0] ^ c1 ^ k0, p1[1], p0[0] ^ c3 ^ k1, p0[1]
        k0, k1 = (k0 + W0) & _MASK, (k1 + W1) & _MASK
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * m; in halves, for the product overflows a signed 64-bit integer."""
    low, high = a * (m & 0xFFFF), a * (m >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & _MASK, total & _MASK


def threshold(probability: float) -> int:
    """The 16-bit threshold below which an element is dropped; the probability in force is threshold / 65536."""
    return round(probability * 65536)


def keep_mask(streams: torch.Tensor, columns: int, key: int, probability: float) -> torch.Tensor:
    """Dropout's keep mask, bool [N, columns], for tokens of identities `streams` (int64 [N]).

    Column c of a token is the 16-bit half c % 8 of the four words drawn at counter (c // 8, stream low, stream
    high, 0): word (c % 8) // 2, low half first.
    """
    blocks = torch.arange((columns + 7) // 8, device=streams.device)
    shape = (streams.numel(), blocks.numel())
    low = (streams & _MASK)[:, None].expand(shape)
    high = ((streams >> 32) & _MASK)[:, None].expand(shape)
    words = philox((blocks.expand(shape), low, high, torch.zeros_like(low)), key)
    halves = torch.stack([h for w in words for h in (w & 0xFFFF, w >> 16)], dim=-1)
    return halves.flatten(1)[:, :columns] >= threshold(probability)
