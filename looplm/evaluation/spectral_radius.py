"""How much a loop stretches a small change of its input, once it is repeated: does the state settle, or run away?

The Jacobian J of a loop's output by its input has the *spectral radius* max |eigenvalue|. Below 1, the loop pulls
nearby states together, and repeating it converges; above 1, some change of the state grows with every further loop. The
power iteration v <- J'v / |J'v| needs vector-Jacobian products alone, which are backward passes; J' has the eigenvalues
of J.

Attention looks back only, so an eigenvalue belongs to one position of one sample; the largest counts.

Shapes: R loops, S sequence, B batch, D hidden.
"""

import torch
from torch import Tensor

from looplm.model import LoopLM

ITERATIONS = 24


def spectral_radius(model: LoopLM, ids_BS: Tensor, loops: int, iterations: int = ITERATIONS) -> tuple[float, ...]:
    """Return the radius of each loop from the second on, at the states that the model reaches, as a mean over samples.

    The first loop is left out: its input is the embedding, which no loop has made.

    Args:
        model: in eval mode, whole on this rank.
        ids_BS: samples of one document each.
        loops: R, at least 1.
        iterations: steps of the power iteration. The factor of growth is averaged over the second half, because pairs
            of complex eigenvalues let it swing.
    """
    spans, radii = model.attention_spans(ids_BS, None), list[float]()
    state_SBD: Tensor | None = None
    for loop in range(loops):
        with torch.enable_grad():
            before_SBD = None if state_SBD is None else state_SBD.requires_grad_()
            after_SBD = model.run_layers(ids_BS, before_SBD, spans, loop)
        if before_SBD is not None:
            radii.append(_radius(after_SBD, before_SBD, iterations))
        state_SBD = after_SBD.detach()
    return tuple(radii)


def _radius(after_SBD: Tensor, before_SBD: Tensor, iterations: int) -> float:
    random = torch.Generator(after_SBD.device).manual_seed(0)
    # All samples start from one vector, so that a sample's radius does not depend on the others.
    start_S1D = torch.randn(after_SBD[:, :1].shape, generator=random, device=after_SBD.device)
    vector_SBD = start_S1D.expand_as(after_SBD)
    growth = list[Tensor]()
    for _ in range(iterations):
        unit_SBD = (vector_SBD / _size(vector_SBD)).type_as(after_SBD)
        (vector_SBD,) = torch.autograd.grad(after_SBD, before_SBD, unit_SBD, retain_graph=True)
        growth.append(_size(vector_SBD).flatten().log())
    return float(torch.stack(growth[iterations // 2 :]).mean(0).exp().mean())


def _size(vector_SBD: Tensor) -> Tensor:
    return vector_SBD.norm(dim=(0, 2), keepdim=True, dtype=torch.float32).clamp_min(1e-30)
