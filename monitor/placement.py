"""Which partition a key belongs to: murmur2, as Kafka's own clients have it. It knows no broker.

A conversation is one key. A record in another partition than this one would split it between two workers, so the worker
checks every key it has not seen before, and a store on several partitions finds a conversation by it.
"""

from __future__ import annotations

import struct

__all__ = ["murmur2", "partition_of"]

_SEED = 0x9747B28C
_MULTIPLIER = 0x5BD1E995
_MASK = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """The 32-bit MurmurHash2 of Kafka's default partitioner, unsigned (`Utils.murmur2`, up to the sign)."""
    length = len(data)
    digest = _SEED ^ length
    whole = length & ~3
    for word in struct.unpack_from(f"<{length >> 2}I", data):
        word = word * _MULTIPLIER & _MASK
        word ^= word >> 24
        digest = (digest * _MULTIPLIER & _MASK) ^ (word * _MULTIPLIER & _MASK)
    if length & 3:
        digest = (digest ^ int.from_bytes(data[whole:], "little")) * _MULTIPLIER & _MASK
    digest ^= digest >> 13
    digest = digest * _MULTIPLIER & _MASK
    return digest ^ digest >> 15


def partition_of(key: str, partitions: int) -> int:
    """The partition of a key among so many, from 0."""
    return (murmur2(key.encode()) & 0x7FFFFFFF) % partitions
