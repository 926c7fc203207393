"""Inputs near the seeds, by a seeded generator: bytes flipped, cut, repeated, spliced, nested."""

import random

_WORDS = [
    b"null", b"true", b"1e999", b"-1", b"9" * 400, b"NaN", b'"', b"'", b"{", b"}", b"[", b"]",
    b":", b",", b"\n", b"\t", b"\0", b"\xff", b"\xed\xa0\x80", b"{{", b"}}", b"{%", b"%}", b"&a ",
    b"*a", b"!!", b"<script>", b"../", b"\xe2\x80\xae", b"# ", b"? ", b"- ", b"| ",
]  # fmt: skip


def mutated(seeds: list[bytes], chance: random.Random) -> bytes:
    """One input: a seed with a few changes, or something else altogether."""
    if chance.random() < 0.05:
        return chance.randbytes(chance.randrange(64))
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[place : place + chance.randrange(1, 9)]
        elif kind == 2:
            data[place:place] = chance.choice(_WORDS)
        elif kind == 3:
            piece = data[place : place + chance.randrange(1, 17)]
            data[place:place] = piece * chance.choice((1, 2, 3, 50))
        elif kind == 4:
            other = chance.choice(seeds)
            cut = chance.randrange(len(other) + 1)
            data[place:] = other[cut:]
        elif kind == 5:
            opening, closing = chance.choice(((b"[", b"]"), (b"{", b"}"), (b"(", b")")))
            depth = chance.choice((2, 20, 5000))
            data = bytearray(opening * depth + bytes(data) + closing * depth)
        else:
            data[place:place] = chance.randbytes(chance.randrange(1, 9))
    return bytes(data[: 2**16])
