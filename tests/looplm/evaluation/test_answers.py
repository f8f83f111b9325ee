"""Answers by depth and level against a slow loop over every label, in plain Python."""

import math

import pytest
import torch

from looplm import reference
from looplm.config import GateConfig
from looplm.evaluation.answers import AnswerMeter
from looplm.evaluation.readout import accuracies, fit_heads
from looplm.model import LoopLM
from tests.support.tiny import MODEL

LOOPS, TRAINED, S, B, D, V = 5, 3, 6, 4, 8, 7


def make_batch(seed: int):
    random = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(S, B, D, generator=random) for _ in range(LOOPS)]
    logit_RSB = torch.randn(LOOPS, S, B, generator=random)
    labels_SB, level_SB = (torch.randint(high, (S, B), generator=random) for high in (V, 5))
    return hidden, logit_RSB, labels_SB, level_SB - 1  # level 3 does not occur in every batch; -1 has no label


def test_every_figure_equals_a_loop_over_the_labels(single_process):
    weight_VD = torch.randn(V, D, generator=torch.Generator().manual_seed(9))
    meter, batches = AnswerMeter(LOOPS, TRAINED, 8, [0.4, 1.0]), [make_batch(seed) for seed in (1, 2)]
    right: dict[tuple[int, int], list[bool]] = {}
    lost: dict[tuple[int, int], float] = {}
    sums = {name: [0.0] * LOOPS for name in ("loss", "whole", "change", "cosine", "divergence", "changed")}
    depth_of: dict[int, list[float]] = {}
    steps_of: dict[int, list[float]] = {}  # of two units
    exits: dict[float, list[tuple[int, bool]]] = {0.4: [], 1.0: []}
    for hidden, logit_RSB, labels_SB, level_SB in batches:
        meter.add(hidden, weight_VD, logit_RSB, labels_SB, level_SB, [logit_RSB[0], logit_RSB[1]])
        p_TSB = reference.exit_distribution(logit_RSB[:TRAINED].double())
        for b in range(B):
            whole = [True] * LOOPS
            for s in range(S):
                level = int(level_SB[s, b])
                if level < 0:
                    continue
                answers, before = [], None
                for r in range(LOOPS):
                    state, label = hidden[r][s, b].double(), int(labels_SB[s, b])
                    p_V = (weight_VD.double() @ state).softmax(0)
                    answers.append(int(p_V.argmax()))
                    right.setdefault((r, level), []).append(answers[r] == label)
                    whole[r] &= answers[r] == label
                    sums["loss"][r] -= math.log(p_V[label])
                    lost[r, level] = lost.get((r, level), 0.0) - math.log(p_V[label])
                    if before is not None:
                        old, old_p = before
                        sums["change"][r] += float((state - old).norm() / old.norm())
                        sums["cosine"][r] += float(state @ old / state.norm() / old.norm())
                        sums["divergence"][r] += sum(float(p * (p / q).log()) for p, q in zip(p_V, old_p, strict=True))
                        sums["changed"][r] += answers[r] != answers[r - 1]
                    before = state, p_V
                p_T = p_TSB[:, s, b].tolist()
                depth_of.setdefault(level, []).append(sum((r + 1) * p for r, p in enumerate(p_T)))
                steps_of.setdefault(level, []).append(float(logit_RSB[0, s, b] + logit_RSB[1, s, b]) / 2)
                first = 1 if p_T[0] >= 0.4 else 2 if p_T[0] + p_T[1] >= 0.4 else 3
                exits[0.4].append((first, answers[first - 1] == int(labels_SB[s, b])))
                exits[1.0].append((TRAINED, answers[TRAINED - 1] == int(labels_SB[s, b])))
            for r in range(LOOPS):
                sums["whole"][r] += whole[r]

    found = meter.answers("hops", single_process.dp)
    labels = sum(len(row) for row in depth_of.values())
    assert found.levels.name == "hops" and found.levels.levels == tuple(sorted(depth_of)) == (0, 1, 2, 3)
    assert found.levels.labels == tuple(len(depth_of[level]) for level in found.levels.levels)
    mean = [sum(depth_of[level]) / len(depth_of[level]) for level in found.levels.levels]
    assert found.levels.expected_depth == pytest.approx(mean, rel=1e-5)
    mean = [sum(steps_of[level]) / len(steps_of[level]) for level in found.levels.levels]
    assert found.levels.latent_steps == pytest.approx(mean, rel=1e-5)
    for r, at in enumerate(found.depths):
        by_level = [sum(right[r, level]) / len(right[r, level]) for level in found.levels.levels]
        losses = [lost[r, level] / len(right[r, level]) for level in found.levels.levels]
        assert at.loss_by_level == pytest.approx(losses, rel=1e-5)
        assert at.depth == r + 1 and at.accuracy_by_level == pytest.approx(by_level)
        assert at.accuracy == pytest.approx(sum(sum(right[r, level]) for level in depth_of) / labels)
        assert at.whole_samples == pytest.approx(sums["whole"][r] / (2 * B))
        values = (at.loss, at.state_change, at.state_cosine, at.divergence, at.answers_changed)
        for name, value in zip(("loss", "change", "cosine", "divergence", "changed"), values, strict=True):
            assert value == pytest.approx(sums[name][r] / labels, rel=1e-4, abs=1e-6), name
    for at_threshold in found.exits:
        rows = exits[at_threshold.threshold]
        assert at_threshold.mean_depth == pytest.approx(sum(depth for depth, _ in rows) / labels)
        assert at_threshold.accuracy == pytest.approx(sum(was_right for _, was_right in rows) / labels)


def test_a_head_fitted_to_each_depth_reads_what_the_models_own_does_not(single_process):
    """Labels that a fixed linear map of each loop's own state decides: the model's head guesses, fitted ones learn."""
    torch.manual_seed(5)
    model, loops = LoopLM(MODEL, GateConfig(state_size=8), single_process).eval(), 4
    truth_VD = torch.randn(MODEL.vocab_size, MODEL.hidden_size)
    generator = torch.Generator().manual_seed(6)

    def batch(depth: int):
        ids_BS = torch.randint(MODEL.vocab_size, (16, 12), generator=generator)
        with torch.no_grad():
            labels_SB = (model(ids_BS, loops).hidden[depth] @ truth_VD.t()).argmax(-1)
        counts_SB = torch.ones_like(labels_SB, dtype=torch.bool)
        counts_SB[:2] = False
        return ids_BS, labels_SB, counts_SB

    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    heads_RVD = fit_heads(model, (batch(1) for _ in range(60)), 60, loops, rate=3e-2)
    tests = [batch(1) for _ in range(4)]
    fitted = accuracies(model, heads_RVD, tests, single_process.dp)
    own = accuracies(model, model.head_weight().detach().float().expand(loops, -1, -1), tests, single_process.dp)
    assert fitted[1] > 0.4 > 20 * own[1] and fitted[1] == max(fitted), (fitted, own)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "fitting a head changed the model"

    ids_BS, labels_SB, _ = tests[0]
    answers_SB = [(h_SBD @ heads_RVD[r].t()).argmax(-1) for r, h_SBD in enumerate(model(ids_BS, loops).hidden)]
    expected = [float((answer_SB == labels_SB)[2:].float().mean()) for answer_SB in answers_SB]
    assert accuracies(model, heads_RVD, tests[:1], single_process.dp) == pytest.approx(expected)
