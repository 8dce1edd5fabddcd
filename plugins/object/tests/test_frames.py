from __future__ import annotations

import pytest

from tensorway.offload import make_offload_key
from tensorway_object.frames import HEADER, digest_of, header_of, wrong_with

KEY, OTHER = make_offload_key(b"a" * 32, 1, "tenant"), make_offload_key(b"b" * 64)
OF = digest_of(b"a fingerprint")
BLOCK = memoryview(bytes(range(64)))


def whole(key=KEY, block=BLOCK, of=OF):
    return bytearray(header_of(key, block, of) + block)


@pytest.mark.parametrize("key", [KEY, OTHER, make_offload_key(b"abcd")])
@pytest.mark.parametrize("nbytes", [0, 1, 64])
def test_what_was_stored_is_right(key, nbytes):
    data = whole(key, BLOCK[:nbytes])

    assert HEADER + nbytes == len(data)
    assert "" == wrong_with(memoryview(data), key, nbytes, OF)


def test_every_bit_counts():
    for bit in range(8 * (HEADER + len(BLOCK))):
        data = whole()
        data[bit // 8] ^= 1 << bit % 8
        assert wrong_with(memoryview(data), KEY, len(BLOCK), OF), f"bit {bit}"


def test_every_length_but_its_own_is_wrong():
    data = whole() + bytes(3)
    for length in range(len(data)):
        assert wrong_with(memoryview(data)[:length], KEY, len(BLOCK), OF) or length == HEADER + len(BLOCK)


@pytest.mark.parametrize(
    ("key", "nbytes", "of", "says"),
    [
        (OTHER, 64, OF, "another block"),
        (make_offload_key(b"a" * 32, 1, "other"), 64, OF, "another block"),
        (make_offload_key(b"a" * 32, 2, "tenant"), 64, OF, "another block"),
        (KEY, 64, digest_of(b"another"), "another block"),
        (KEY, 63, OF, "a block of 64 bytes, not 63"),
        (KEY, 65, OF, "a block of 64 bytes, not 65"),
    ],
)
def test_what_was_not_asked_for_is_told_from_what_was(key, nbytes, of, says):
    assert says in wrong_with(memoryview(whole()), key, nbytes, of)


def test_another_version_is_none_of_ours():
    import struct

    from xxhash import xxh3_64_intdigest

    data = whole()
    data[8:10] = (2).to_bytes(2, "little")
    data[HEADER - 8 : HEADER] = struct.pack("<Q", xxh3_64_intdigest(bytes(data[: HEADER - 8])))

    assert "another kind or version" in wrong_with(memoryview(data), KEY, 64, OF)
