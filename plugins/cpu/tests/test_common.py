from __future__ import annotations

import pickle

import numpy as np
import pytest

from tensorway.errors import MemoryInvalid
from tensorway_cpu.common import CPULoadStoreSpec


def test_a_spec_is_a_sequence_of_rows_and_nothing_else():
    spec = CPULoadStoreSpec.of([3, 0, 7, 1 << 40])

    assert ("cpu", 4, 7, [3, 0, 7, 1 << 40]) == (spec.medium, len(spec), spec[2], list(spec))
    assert [0, 7] == list(spec[1:3]) and isinstance(spec[1:3], CPULoadStoreSpec)
    assert 7 in spec and 8 not in spec
    assert spec == CPULoadStoreSpec.of(np.asarray([3, 0, 7, 1 << 40])) != CPULoadStoreSpec.of([3])
    assert "CPULoadStoreSpec([3, 0, 7, 1099511627776])" == repr(spec)
    with pytest.raises(IndexError):
        spec[4]


def test_it_goes_to_another_process_in_eight_bytes_a_row():
    spec = CPULoadStoreSpec.of(range(1000))

    sent = pickle.dumps(spec)

    assert len(sent) < 8000 + 200
    assert spec == pickle.loads(sent)


@pytest.mark.parametrize("rows", [[1.5], ["1"], [None], [1 << 63], 5])
def test_what_is_no_row_is_refused(rows):
    with pytest.raises(MemoryInvalid):
        CPULoadStoreSpec.of(rows)


def test_bytes_that_are_no_rows_are_refused():
    with pytest.raises(MemoryInvalid):
        CPULoadStoreSpec(b"1234567")
    with pytest.raises(TypeError):
        CPULoadStoreSpec(bytearray(8))
