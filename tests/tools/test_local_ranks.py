"""Modules in several processes: output and arguments arrive, and a failure or a hang is one line."""

import os
import sys
from pathlib import Path

import pytest

from looplm.failures import UserError
from tools.local_ranks import run_module

pytestmark = pytest.mark.slow  # every test here starts processes


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module that does what its first argument says."""
    (tmp_path / "a_module.py").write_text(
        "import os, sys, time\n"
        "word, folder = sys.argv[1:]\n"
        "with open(f'{folder}/rank_' + os.environ['RANK'], 'w') as file:\n"
        "    file.write(f\"{os.environ['OMP_NUM_THREADS']} {os.getpid()}\")\n"
        "if word == 'hang': time.sleep(60)\n"
        "sys.exit('it broke' if word == 'fail' else 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    return "a_module"


def test_every_rank_runs_with_one_thread(module, tmp_path, capfd):
    run_module(module, ["work", str(tmp_path)], ranks=2, seconds=60, shown=False)
    assert [(tmp_path / f"rank_{rank}").read_text().split()[0] for rank in range(2)] == ["1", "1"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("word", "seconds", "message"),
    [
        ("fail", 60.0, r"^a_module: ended with status 1 in 2 processes; "),
        ("hang", 4.0, "^a_module: took more than 4 s"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(word, seconds, message, module, tmp_path, capfd):
    with pytest.raises(UserError, match=message):
        run_module(module, [word, str(tmp_path)], ranks=2, seconds=seconds, shown=False)
    assert ("it broke" in capfd.readouterr().err) == (word == "fail")
    started = [path.read_text() for path in tmp_path.glob("rank_*")]  # a rank may be ended before it has begun
    assert started or word == "hang", "the rank that failed had begun"
    for text in filter(None, started):
        with pytest.raises(ProcessLookupError):
            os.kill(int(text.split()[1]), 0)
