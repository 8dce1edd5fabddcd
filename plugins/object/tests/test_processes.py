"""What processes leave behind that end: at once, in the middle of an upload, or by a fork."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from tensorway.errors import Closed
from tensorway.offload import TierContext, make_offload_key
from tensorway_object.testing.proxy import Fault
from tensorway_object.testing.servers import options_at

PREPARE = """
import json, sys
from tensorway.offload import TierContext, make_offload_key
from tensorway_object.options import ObjectOptions
from tensorway_object.tier import ObjectTier
tier = ObjectTier.open(ObjectOptions(**json.loads(sys.argv[1])), TierContext("writer", bytes(range(20)), (4096,)))
"""
LEAVES = """
keys = [make_offload_key(bytes([number]) * 32) for number in range(16)]
tier.put([(key, memoryview(bytes(4096))) for key in keys], 60.0)
buffer = memoryview(bytearray(4096))
tier.get([(key, buffer) for key in keys], 60.0)
"""
UPLOADS = """
key = make_offload_key(b"large".ljust(32))
tier.put([(key, memoryview(bytes(range(256)) * (11 << 12)))], 60.0)
"""
LARGE, NBYTES = make_offload_key(b"large".ljust(32)), 11 << 20


def python(code, options):
    command = [sys.executable, "-c", PREPARE + code, json.dumps(options)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@pytest.mark.parametrize("close", ["", "tier.close()"])
def test_a_process_that_leaves_at_once_leaves_in_peace(s3, bucket, close):
    processes = [python(LEAVES + close, options_at(s3.port, f"s3://{bucket}")) for _ in range(6)]

    ends = [(process.communicate()[1].decode(), process.returncode) for process in processes]

    assert [("", 0)] * 6 == ends


@pytest.mark.parametrize("at", ["uploads", "partNumber=1", "partNumber=3", "uploadId"])
def test_a_writer_that_is_killed_leaves_no_part_of_a_block_in_sight(s3, tier_at, between, bucket, at):
    """Killed while its first request is under way that starts the upload, sends a part, or ends it."""
    options = options_at(between.port, f"s3://{bucket}/a/b", multipart_bytes=5 << 20, part_bytes=5 << 20)
    method = "POST" if at in ("uploads", "uploadId") else "PUT"
    between.fault = lambda asked, path: Fault("hang") if asked == method and at in path else None
    writer = python(UPLOADS, options)
    while not [1 for asked, path in between.seen if asked == method and at in path]:
        assert writer.poll() is None, writer.communicate()
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()

    tier, buffer = tier_at(s3.port, multipart_bytes=5 << 20, part_bytes=5 << 20), bytearray(NBYTES)
    assert [False] == tier.contains([LARGE], 60.0)
    assert ["missing"] == tier.get([(LARGE, memoryview(buffer))], 60.0)
    content = bytes(range(256)) * (NBYTES // 256)
    assert ["done"] == tier.put([(LARGE, memoryview(content))], 60.0)
    assert ["done"] == tier.get([(LARGE, memoryview(buffer))], 60.0)
    assert buffer == content


def test_a_forked_child_is_refused_and_its_parent_goes_on(s3, tier_at):
    tier, key, content = tier_at(s3.port), make_offload_key(b"fork".ljust(32)), bytes(4096)
    assert ["done"] == tier.put([(key, memoryview(content))], 60.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: that is what is tried
        child = os.fork()
    if not child:
        code = 1
        try:
            tier.contains([key], 60.0)
        except Closed:
            code = 0
        finally:
            os._exit(code)

    assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert [True] == tier.contains([key], 60.0)


def test_the_context_of_these_tests_is_the_writer_s(context):
    assert TierContext("writer", bytes(range(20)), (4096,)).fingerprint == context().fingerprint
