"""The words after `tensorway vllm`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tensorway_vllm.command import parser


@pytest.mark.parametrize("words", [["doctor"], ["doctor", "--kv-transfer-config", "{}", "--additional-config", "{}"]])
def test_the_doctor_takes_the_flags_of_vllm(words):
    given = parser().parse_args(words)
    assert "doctor" == given.action
    assert ("{}" if len(words) > 1 else None) == given.kv_transfer_config == given.additional_config


def test_an_action_that_is_not_there_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["doktor"])
    assert 2 == ended.value.code
    assert "doctor" in capsys.readouterr().err


def test_help_imports_neither_vllm_nor_what_serves_http():
    code = (
        "import sys; from tensorway_vllm.command import parser; parser().format_help();"
        "sys.exit(any(m.split('.')[0] in ('vllm', 'torch', 'aiohttp', 'tensorway_eplb') for m in sys.modules))"
    )
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
