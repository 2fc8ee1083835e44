"""Computes checksums of large arrays at memory speed. They detect accidental damage, but not a deliberate change.

The bytes of an array are arranged in rows of 8192 words of 64 bits. The checksum is the SHA-256 of the sums of all
rows and of all columns, modulo 2^64. A change of one, two or three words always changes the checksum. Any other damage
stays undetected with a probability of about 2^-64. A SHA-256 of all bytes takes several times longer, about as long as
loading them.
"""

import hashlib

import numpy as np

WORDS = 8192  # words per row
BLOCK = 2**17  # words that are processed together, few enough for a core's cache
# Masks of the exponent bits, all of which are set in NaN and in the infinities.
EXPONENTS = {"float16": np.uint16(0x7C00), "bfloat16": np.uint16(0x7F80)}


def checksum(array: np.ndarray) -> str:
    """Returns the checksum of an array's bytes, 32 hex digits; it does not depend on the shape and the dtype."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = len(flat) // (8 * WORDS) * (8 * WORDS)
    words, rest = flat[:whole].view("<u8").reshape(-1, WORDS), flat[whole:]
    digest, columns = hashlib.sha256(len(flat).to_bytes(8, "little")), np.zeros(WORDS, np.uint64)
    for first in range(0, len(words), BLOCK // WORDS):
        block = words[first : first + BLOCK // WORDS]
        digest.update(block.sum(1, dtype=np.uint64).astype("<u8").tobytes())
        columns += block.sum(0, dtype=np.uint64)
    digest.update(columns.astype("<u8").tobytes())
    digest.update(rest.tobytes())
    return digest.hexdigest()[:32]


def all_finite(array: np.ndarray) -> bool:
    """Returns whether an array holds neither NaN nor an infinity; always True for integers."""
    name, flat = array.dtype.name, np.ascontiguousarray(array).reshape(-1)
    blocks = [slice(first, first + BLOCK) for first in range(0, len(flat), BLOCK)]
    if name in EXPONENTS:  # compares bits, because numpy has no bfloat16 and is slow on float16
        bits, exponent = flat.view(np.uint16), EXPONENTS[name]
        return all(((bits[block] & exponent) != exponent).all() for block in blocks)
    return name not in ("float32", "float64") or all(np.isfinite(flat[block]).all() for block in blocks)
