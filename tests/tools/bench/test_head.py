"""The bench of the head: all ways compute the same, and the one pass needs the least memory (in new processes)."""

import re

import pytest
import torch

from tests.support.parity import assert_close_relative, grad_of
from tools.bench.head import WAYS, Head, HeadSize, bench_head


def test_all_ways_compute_the_same_gradients() -> None:
    found = list[dict[str, torch.Tensor]]()
    for way in WAYS.values():
        head = Head(HeadSize(tokens=50, vocabulary=97, width=16, loops=2))
        way(head)
        hidden = {f"hidden {loop}": grad_of(h_SBD) for loop, h_SBD in enumerate(head.hidden)}
        found.append({"weight": grad_of(head.weight), **hidden})
    for other in found[1:]:
        assert_close_relative(other, found[0])


@pytest.mark.slow  # starts processes
def test_the_one_pass_needs_less_memory_than_all_logits(capsys: pytest.CaptureFixture[str]) -> None:
    figures = list(bench_head(1, HeadSize(tokens=4096, vocabulary=4096, width=256)))
    shown = capsys.readouterr().out
    shares = list(map(float, re.findall(r"MiB above the start +([\d.]+)%", shown)))
    assert len(figures) // 2 == len(shares) // 3 >= 1, "bf16 too where it is fast"
    kept, recomputed, one_pass = shares[:3]
    assert kept == 100 and one_pass < min(40, recomputed), shown
    assert 0 < figures[0].value < 5 and figures[1].value == pytest.approx(one_pass / 100, abs=1e-3)
