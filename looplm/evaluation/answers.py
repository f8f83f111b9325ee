"""Answers by depth and difficulty: how often the likeliest token is right, and how the loops change it.

Shapes: R loops that ran, T loops the model was trained with (T <= R), S sequence, B batch, V vocabulary, N labels.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from looplm.evaluation.record import AnswersAtDepth, AnswersAtThreshold, LevelAnswers, TaskAnswers
from looplm.model.exit_gate import exit_log_probs, q_exit


class AnswerMeter:
    """Counts right answers over batches; :meth:`answers` returns their shares.

    Args:
        loops: number of loops to run (R).
        trained_loops: loops of the exit distribution (T).
        levels: number of levels; labels have levels from 0 to ``levels - 1``.
        thresholds: Q-exit thresholds.
    """

    def __init__(self, loops: int, trained_loops: int, levels: int, thresholds: Sequence[float]) -> None:
        self.loops, self.trained_loops, self.thresholds = loops, trained_loops, tuple(thresholds)
        self._count_L = torch.zeros(levels, dtype=torch.float64)
        self._right_RL = torch.zeros(loops, levels, dtype=torch.float64)
        self._loss_RL = torch.zeros(loops, levels, dtype=torch.float64)
        self._whole_R = torch.zeros(loops, dtype=torch.float64)  # samples with every answer right
        self._motion_R4 = torch.zeros(loops, 4, dtype=torch.float64)  # sums of _motion
        self._samples = torch.zeros(1, dtype=torch.float64)
        self._depth_L = torch.zeros(levels, dtype=torch.float64)  # expected exit depth
        self._steps_L = torch.zeros(levels, dtype=torch.float64)  # expected steps of the unit inside attention
        self._exits_Q2 = torch.zeros(len(self.thresholds), 2, dtype=torch.float64)  # depth, right

    def add(
        self,
        hidden: Sequence[Tensor],
        weight_VD: Tensor,
        gate_logit_RSB: Tensor,
        labels_SB: Tensor,
        level_SB: Tensor,
        steps: Sequence[Tensor] = (),
    ) -> None:
        """Add one batch.

        Args:
            hidden: the hidden state after each loop, [S, B, D].
            weight_VD: the head's matrix.
            gate_logit_RSB: the gate's logits.
            labels_SB: the right answers.
            level_SB: level of each label, -1 where there is no label.
            steps: expected steps of the units inside attention, in each loop of each layer, [S, B].
        """
        counts_SB = level_SB >= 0
        level_N, label_N = level_SB[counts_SB], labels_SB[counts_SB]
        sample_N = torch.arange(labels_SB.size(1), device=label_N.device).expand_as(labels_SB)[counts_SB]
        self._samples += labels_SB.size(1)
        self._count_L.index_add_(0, level_N.cpu(), torch.ones(len(level_N), dtype=torch.float64))
        right_RN, before = torch.zeros(self.loops, len(label_N), device=label_N.device), None
        for loop, h_SBD in enumerate(hidden):
            state_ND = h_SBD[counts_SB]
            log_p_NV = F.log_softmax(state_ND.float() @ weight_VD.float().t(), dim=-1)
            right_RN[loop] = (log_p_NV.argmax(-1) == label_N).float()
            loss_N = F.nll_loss(log_p_NV, label_N, reduction="none")
            self._loss_RL[loop].index_add_(0, level_N.cpu(), loss_N.double().cpu())
            wrong_B = torch.zeros(labels_SB.size(1), device=label_N.device).index_add_(0, sample_N, 1 - right_RN[loop])
            self._whole_R[loop] += (wrong_B == 0).sum().item()
            if before is not None:
                self._motion_R4[loop] += _motion(*before, state_ND, log_p_NV)
            before = state_ND, log_p_NV
        self._right_RL.index_add_(1, level_N.cpu(), right_RN.double().cpu())
        self._add_exits(gate_logit_RSB[: self.trained_loops, counts_SB], right_RN, level_N.cpu())
        if steps:
            mean_SB = torch.stack(list(steps)).mean(0)
            self._steps_L.index_add_(0, level_N.cpu(), mean_SB[counts_SB].double().cpu())

    def _add_exits(self, gate_logit_TN: Tensor, right_RN: Tensor, level_N: Tensor) -> None:
        log_p_TN = exit_log_probs(gate_logit_TN)
        loop_T = torch.arange(1, self.trained_loops + 1, device=log_p_TN.device, dtype=log_p_TN.dtype)
        self._depth_L.index_add_(0, level_N, (loop_T @ log_p_TN.exp()).double().cpu())
        for sum_2, threshold in zip(self._exits_Q2, self.thresholds, strict=True):
            depth_N = q_exit(log_p_TN, threshold)
            right_N = right_RN.gather(0, depth_N[None] - 1)[0]
            sum_2 += torch.stack((depth_N.double().sum(), right_N.double().sum())).cpu()

    def answers(self, level_name: str, group: dist.ProcessGroup) -> TaskAnswers:
        """Return shares over the labels of every rank of ``group``; levels without a label are left out.

        A sample without any label counts as one whose answers are all right.
        """
        sums = (self._count_L, self._right_RL, self._loss_RL, self._whole_R, self._motion_R4, self._samples)
        for total in (*sums, self._depth_L, self._steps_L, self._exits_Q2):
            dist.all_reduce(total, group=group)
        kept = self._count_L.nonzero().flatten()
        levels = LevelAnswers(
            name=level_name,
            levels=tuple(kept.tolist()),
            labels=tuple(int(count) for count in self._count_L[kept].tolist()),
            expected_depth=tuple((self._depth_L[kept] / self._count_L[kept]).tolist()),
            latent_steps=tuple((self._steps_L[kept] / self._count_L[kept]).tolist()) if self._steps_L.any() else (),
        )
        shares_Q2 = self._exits_Q2 / self._count_L.sum().clamp(min=1)
        exits = tuple(
            AnswersAtThreshold(threshold=threshold, mean_depth=depth, accuracy=accuracy)
            for threshold, (depth, accuracy) in zip(self.thresholds, shares_Q2.tolist(), strict=True)
        )
        depths = tuple(self._at_depth(loop, kept) for loop in range(self.loops))
        return TaskAnswers(trained_loops=self.trained_loops, levels=levels, depths=depths, exits=exits)

    def _at_depth(self, loop: int, kept: Tensor) -> AnswersAtDepth:
        """Return the answers after a loop, for the levels that have labels."""
        count_L, labels = self._count_L[kept], self._count_L.sum().clamp(min=1)
        right_L, loss_L = self._right_RL[loop, kept], self._loss_RL[loop, kept]
        change, cosine, divergence, changed = (self._motion_R4[loop] / labels).tolist()
        return AnswersAtDepth(
            depth=loop + 1,
            loss=float(loss_L.sum() / labels),
            accuracy=float(right_L.sum() / labels),
            whole_samples=float(self._whole_R[loop] / self._samples.clamp(min=1)),
            accuracy_by_level=tuple((right_L / count_L).tolist()),
            loss_by_level=tuple((loss_L / count_L).tolist()),
            state_change=change,
            state_cosine=cosine,
            divergence=divergence,
            answers_changed=changed,
        )


def _motion(before_ND: Tensor, before_log_p_NV: Tensor, state_ND: Tensor, log_p_NV: Tensor) -> Tensor:
    """Return sums over labels: relative change of the state, its cosine, KL(after || before), changed answers: [4]."""
    change_N = (state_ND - before_ND).norm(dim=-1) / before_ND.norm(dim=-1).clamp(min=1e-12)
    cosine_N = F.cosine_similarity(state_ND, before_ND, dim=-1)
    divergence_N = (log_p_NV.exp() * (log_p_NV - before_log_p_NV)).sum(-1)
    changed_N = log_p_NV.argmax(-1) != before_log_p_NV.argmax(-1)
    return torch.stack([x_N.double().sum() for x_N in (change_N, cosine_N, divergence_N, changed_N)]).cpu()
