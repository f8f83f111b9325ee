"""The bench's memory of a head, measured in new processes."""

import re

import pytest

from tools.bench.memory import bench_head

pytestmark = pytest.mark.slow  # starts processes


def test_chunks_need_less_memory_than_all_logits(capsys: pytest.CaptureFixture[str]) -> None:
    bench_head(tokens=1024, vocabulary=4096)
    shown = capsys.readouterr().out
    shares = re.findall(r"MiB above the start +([\d.]+)%", shown)
    assert shares[0] == "100.0" and float(shares[1]) < 90, shown
