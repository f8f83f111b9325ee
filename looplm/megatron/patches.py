"""Every change that LoopLM makes to Megatron-core or torch at run time, each with its reason.

Megatron-core names CUDA in many places although most of it runs on any device. On a machine without a GPU,
:func:`install` answers those calls for the CPU, once per process. On CUDA it changes nothing.
"""

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from torch.overrides import TorchFunctionMode

from looplm.megatron.device import DEVICE, HAS_CUDA, HAS_TRANSFORMER_ENGINE


class _CudaMeansCpu(TorchFunctionMode):
    """``device="cuda"``, ``.cuda()`` and ``tensor.type()`` in Megatron-core, as a CPU understands them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")  # optimizers compare with torch.cuda.FloatTensor
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream on a device that has one queue only."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


_installed: list[TorchFunctionMode] = []
_sends: deque[Any] = deque(maxlen=8)  # Megatron's schedules leave at most one in flight in each direction


def _keep_sends_alive() -> None:
    """A gloo message whose handle is dropped before it is received is never sent: the receiver hangs, or takes the next
    one for it. Megatron's schedules drop the handle of their last send."""
    send = dist.isend

    def isend(*args: Any, **kwargs: Any) -> Any:
        work = send(*args, **kwargs)
        _sends.append(work)
        return work

    dist.isend = isend


def install() -> None:
    """Make Megatron-core run on this machine; a second call, or one on CUDA, does nothing."""
    if _installed or HAS_CUDA:
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: DEVICE
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.current_stream = cuda.Stream = _Stream
    cuda.stream = lambda stream: stream
    cuda.manual_seed = torch.manual_seed  # one generator serves both: "CUDA" draws are CPU draws
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    if not HAS_TRANSFORMER_ENGINE:
        # Megatron-core 0.16 takes HAVE_TE as true without Transformer Engine, then fails in isinstance(x, None).
        multi_latent_attention.HAVE_TE = False
    _keep_sends_alive()
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)


def accept_as_mla_down_projection(linear: type) -> None:
    """Let MLA's down projections be modules of class ``linear``.

    Megatron-core 0.16 accepts listed classes only for these projections. One of the names it lists, ``Linear``, is None
    without Transformer Engine and is not used by LoopLM with it, so that name can stand for ours.
    """
    multi_latent_attention.Linear = linear
