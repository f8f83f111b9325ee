"""Loss as a function of depth: at fixed depths, and where the gate lets each token exit.

Shapes: R loops that ran, T loops the model was trained with (T <= R), S sequence, B batch, Q thresholds.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from looplm.evaluation.record import DepthLoss, Evaluation, ThresholdLoss, perplexity
from looplm.model.exit_gate import exit_log_probs, q_exit


class DepthMeter:
    """Sums losses over tokens and batches; :meth:`evaluation` returns their means.

    Args:
        depths: depths to report, 1-based.
        trained_loops: loops of the exit distribution.
        thresholds: Q-exit thresholds of the exit curve.

    Attributes:
        loops: number of loops to run (R).
    """

    def __init__(self, depths: list[int], trained_loops: int, thresholds: list[float]) -> None:
        self.depths, self.trained_loops, self.thresholds = depths, trained_loops, thresholds
        self.loops = max(trained_loops, *depths)
        self._tokens = torch.zeros(1, dtype=torch.float64)
        self._loss_R = torch.zeros(self.loops, dtype=torch.float64)
        self._exit_T = torch.zeros(trained_loops, dtype=torch.float64)
        self._curve_Q2 = torch.zeros(len(thresholds), 2, dtype=torch.float64)  # depth and loss

    def add(self, token_loss_RSB: Tensor, gate_logit_RSB: Tensor, mask_SB: Tensor) -> None:
        """Add one batch."""
        mask_SB = mask_SB.double()
        self._tokens += mask_SB.sum().cpu()
        self._loss_R += (token_loss_RSB * mask_SB).flatten(1).sum(1).cpu()
        log_p_TSB = exit_log_probs(gate_logit_RSB[: self.trained_loops])
        self._exit_T += (log_p_TSB.exp() * mask_SB).flatten(1).sum(1).cpu()
        for row, threshold in zip(self._curve_Q2, self.thresholds, strict=True):
            depth_SB = q_exit(log_p_TSB, threshold)
            loss_SB = token_loss_RSB.gather(0, depth_SB.unsqueeze(0) - 1).squeeze(0)
            row += torch.stack(((depth_SB * mask_SB).sum(), (loss_SB * mask_SB).sum())).cpu()

    def evaluation(self, group: dist.ProcessGroup) -> Evaluation:
        """Return means over the tokens of every rank of ``group``."""
        for total in (self._tokens, self._loss_R, self._exit_T, self._curve_Q2):
            dist.all_reduce(total, group=group)
        tokens = self._tokens.clamp(min=1)
        losses = [(depth, float(self._loss_R[depth - 1] / tokens)) for depth in self.depths]
        curve = zip(self.thresholds, (self._curve_Q2 / tokens).tolist(), strict=True)
        return Evaluation(
            trained_loops=self.trained_loops,
            tokens=int(self._tokens),
            depths=tuple(DepthLoss(depth=depth, loss=loss, perplexity=perplexity(loss)) for depth, loss in losses),
            exit_curve=tuple(ThresholdLoss(threshold=q, mean_depth=depth, loss=loss) for q, (depth, loss) in curve),
            exit_distribution=tuple((self._exit_T / tokens).tolist()),
        )
