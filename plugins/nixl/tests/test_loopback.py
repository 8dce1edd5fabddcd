from __future__ import annotations

import pytest

CODE = """
import json
from tensorway_nixl.library import LIBRARY
from tensorway_nixl.loopback import prove
result = prove(LIBRARY, seconds=0.2)
print(json.dumps([result.usable, result.reason, dict(result.facts)]))
"""


def test_an_agent_that_reads_its_own_memory_passes(fresh_python, fake_nixl):
    usable, reason, facts = fresh_python(CODE, path=(fake_nixl(),))

    assert usable, reason
    assert "nixl_cu13" == facts["package"]


def test_an_agent_that_says_done_and_moved_nothing_does_not(fresh_python, fake_nixl):
    usable, reason, _ = fresh_python(CODE, path=(fake_nixl(copies=False),))

    assert not usable
    assert reason.endswith(
        "cannot read its own memory (ValueError: the bytes that arrived differ from those that were sent)"
    )


@pytest.mark.parametrize("state", ["PROC", "ERR"])
def test_a_transfer_that_does_not_end_well_says_how_it_ended(fresh_python, fake_nixl, state):
    usable, reason, _ = fresh_python(CODE, path=(fake_nixl(state=state),))

    assert not usable
    assert f"(TimeoutError: still {state} after 0.2 s)" in reason


def test_a_backend_that_cannot_be_created_says_at_which_step(fresh_python, fake_nixl):
    api = "class nixl_agent_config:\n def __init__(self, **_): pass\nclass nixl_agent:\n def __init__(self, *_): pass\n"
    refuses = " def create_backend(self, *_): raise RuntimeError('NIXL_ERR_BACKEND')\n"

    usable, reason, facts = fresh_python(CODE, path=(fake_nixl(api=api + refuses),))

    assert not usable
    assert "loads but cannot create its UCX backend (RuntimeError: NIXL_ERR_BACKEND)" in reason
    assert "nixl_cu13" == facts["package"]


def test_a_user_who_wants_to_see_nixls_log_still_does(fresh_python, fake_nixl):
    code = CODE + "import os; print(json.dumps([os.environ['NIXL_LOG_LEVEL'], os.environ['UCX_DEBUG_SIGNO']]))"
    path = (fake_nixl(),)

    assert ["ERROR", "0"] == fresh_python(code, path=path)
    assert ["INFO", "0"] == fresh_python(code, path=path, NIXL_LOG_LEVEL="INFO")
