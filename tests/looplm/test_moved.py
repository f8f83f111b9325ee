"""The imports in the README of 0.1 still work, each in its own process as a user's script would run them."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # every test here starts a process or trains

OLD = """
import sys
import looplm
assert "torch" not in sys.modules and "yaml" not in sys.modules, "import looplm imports heavy packages"

from looplm import checkpoint, parallel
from looplm.exit_gate import exit_log_probs
from looplm.inference.generate import GenerationConfig, Generator, Request

import looplm.inference.generator
import looplm.model.exit_gate
from looplm.megatron import process_groups

assert parallel is process_groups and callable(parallel.start) and callable(checkpoint.open_model)
assert process_groups.__spec__.name == "looplm.megatron.process_groups"
assert exit_log_probs is looplm.model.exit_gate.exit_log_probs
assert Generator is looplm.inference.generator.Generator
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_the_imports_of_0_1_work_with_a_warning():
    done = run(OLD)
    assert done.returncode == 0, done.stderr
    for old, new in (
        ("looplm.parallel", "looplm.megatron.process_groups"),
        ("looplm.exit_gate", "looplm.model.exit_gate"),
        ("looplm.inference.generate", "looplm.inference.generator"),
    ):
        assert f"DeprecationWarning: {old} has moved; import {new} instead" in done.stderr


def test_a_module_that_never_existed_is_still_missing():
    assert "No module named 'looplm.paralel'" in run("import looplm.paralel").stderr
