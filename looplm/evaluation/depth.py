"""Loss as a function of depth: at fixed depths, and where the gate lets each token leave.

Shapes: R loops that ran, T loops the model was trained with (T <= R), S sequence, B batch, Q thresholds.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from looplm.model.exit_gate import exit_log_probs, q_exit


class DepthMeter:
    """Sums losses over tokens and batches; :meth:`report` makes means of them.

    Args:
        depths: depths to report, 1-based; all up to the largest are run.
        trained_loops: loops of the exit distribution.
        thresholds: Q-exit thresholds of the exit curve.
    """

    def __init__(self, depths: list[int], trained_loops: int, thresholds: list[float]) -> None:
        self.depths, self.trained_loops, self.thresholds = depths, trained_loops, thresholds
        self._tokens = torch.zeros(1, dtype=torch.float64)
        self._loss_R = torch.zeros(max(depths), dtype=torch.float64)
        self._exit_T = torch.zeros(trained_loops, dtype=torch.float64)
        self._curve_Q2 = torch.zeros(len(thresholds), 2, dtype=torch.float64)

    def add(self, token_loss_RSB: Tensor, gate_logit_RSB: Tensor, mask_SB: Tensor) -> None:
        """Count one batch."""
        mask_SB = mask_SB.double()
        self._tokens += mask_SB.sum().cpu()
        self._loss_R += (token_loss_RSB * mask_SB).flatten(1).sum(1).cpu()
        log_p_TSB = exit_log_probs(gate_logit_RSB[: self.trained_loops])
        self._exit_T += (log_p_TSB.exp() * mask_SB).flatten(1).sum(1).cpu()
        for row, threshold in zip(self._curve_Q2, self.thresholds, strict=True):
            depth_SB = q_exit(log_p_TSB, threshold)
            loss_SB = token_loss_RSB.gather(0, depth_SB.unsqueeze(0) - 1).squeeze(0)
            row += torch.stack(((depth_SB * mask_SB).sum(), (loss_SB * mask_SB).sum())).cpu()

    def report(self, group: dist.ProcessGroup) -> dict[str, Any]:
        """Means over every token that counted on every rank of ``group``, as evaluation.json holds them."""
        for total in (self._tokens, self._loss_R, self._exit_T, self._curve_Q2):
            dist.all_reduce(total, group=group)
        tokens = self._tokens.clamp(min=1)
        loss_R, curve = (self._loss_R / tokens).tolist(), (self._curve_Q2 / tokens).tolist()
        return {
            "trained_loops": self.trained_loops,
            "tokens": int(self._tokens),
            "depths": [
                {"depth": depth, "loss": loss_R[depth - 1], "perplexity": math.exp(min(loss_R[depth - 1], 700.0))}
                for depth in self.depths
            ],
            "exit_curve": [
                {"threshold": threshold, "mean_depth": depth, "loss": loss}
                for threshold, (depth, loss) in zip(self.thresholds, curve, strict=True)
            ],
            "exit_distribution": (self._exit_T / tokens).tolist(),
        }
