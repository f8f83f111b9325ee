"""Every change that LoopLM makes to Megatron-core or torch at run time, each with its reason.

| patch | without it | upstream |
|---|---|---|
| ``multi_latent_attention.HAVE_TE`` is False | MLA without Transformer Engine fails | NVIDIA/Megatron-LM#3764 |
| ``device="cuda"``, ``.cuda()`` and ``torch.cuda`` calls mean the CPU | Megatron-core needs a GPU | none known |
| ``mlp.bias_swiglu_impl`` is our function | fused SwiGLU compiles C++ when training starts | none known |
| ``tensor_parallel.layers.F.embedding`` is our function | its gradient has V rows, most of them 0 | none known |
| handles of ``isend`` are kept for a while | pipelines on gloo hang | pytorch/gloo#308 |
| ``multi_latent_attention.Linear`` is our class | MLA refuses our down projections | NVIDIA/Megatron-LM#1699 |
| results of checkpoint writers go through a plain queue | the first save spawns a process, in seconds | none known |
| objects in checkpoints are loaded with ``weights_only`` | a shard's pickle may run code | none known |

The first applies only without Transformer Engine, the next four only without a GPU (:func:`install`). The sixth changes
nothing with Transformer Engine.
"""

import functools
import io
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import mlp, multi_latent_attention
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.utils._device import _device_constructors

from looplm.megatron.device import DEVICE, HAS_CUDA, HAS_TRANSFORMER_ENGINE
from looplm.megatron.lookup import lookup
from looplm.megatron.swiglu import swiglu

# Functions that take ``device``. A TorchFunctionMode would catch all of torch's, but it looks at every call: 6 % of a
# small model's step.
_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided full full_like linspace ones ones_like rand rand_like randint "
    "randn randn_like randperm tensor zeros zeros_like"
)


class _Stream:
    """A CUDA stream on a device that has only one queue."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


_installed: list[str] = []
SENDS_KEPT = 8  # Megatron's schedules leave at most one in flight in each direction
_sends: deque[Any] = deque(maxlen=SENDS_KEPT)


def install() -> None:
    """Make checkpoints safe to read, and Megatron-core run without Transformer Engine, and without a GPU.

    The patches for a machine without a GPU are applied once.
    """
    filesystem_async._results_queue = SimpleQueue[Any]()
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign,assignment]
    if not HAS_TRANSFORMER_ENGINE:
        multi_latent_attention.HAVE_TE = False  # True by mistake; Megatron-core then fails in isinstance(x, None)
    if _installed or HAS_CUDA:
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: DEVICE
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.current_stream = cuda.Stream = _Stream
    cuda.stream = lambda stream: stream
    cuda.manual_seed = torch.manual_seed  # one generator serves both: random numbers for "CUDA" come from the CPU's
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    mlp.bias_swiglu_impl = swiglu
    layers.F = SimpleNamespace(**(vars(F) | {"embedding": lookup}))
    _keep_sends_alive()
    _device_constructors()  # torch's own list of them, which it makes once: ``with torch.device(...)`` must find them
    for name in _FACTORIES.split():
        setattr(torch, name, _on_the_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self
    tensor.type = _with_cuda_in_its_name(tensor.type)
    _installed.append(_FACTORIES)


def _on_the_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **keys: Any) -> Any:
        if str(keys.get("device", "")).startswith("cuda"):
            keys["device"] = "cpu"
        if keys.get("pin_memory"):
            keys["pin_memory"] = False
        return factory(*args, **keys)

    return call


def _with_cuda_in_its_name(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``Tensor.type``, whose result Megatron's optimizers compare with torch.cuda.FloatTensor."""

    def call(tensor: torch.Tensor, *args: Any, **keys: Any) -> Any:
        result = type_of(tensor, *args, **keys)
        return result if args or keys else result.replace("torch.", "torch.cuda.")

    return call


def _load_bytes(planner: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
    """Take the place of the planner's method, which loads with ``weights_only=False``."""
    loaded = torch.load(value, weights_only=True)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[read_item.dest_index.fqn], loaded)
    else:
        planner.state_dict[read_item.dest_index.fqn] = loaded


def _keep_sends_alive() -> None:
    """Keep the handles that ``dist.isend`` returns, of which Megatron's schedules drop the last.

    gloo never sends a message whose handle is dropped before the message is received: the receiver hangs, or takes the
    next message instead.
    """
    send = dist.isend

    def isend(*args: Any, **kwargs: Any) -> Any:
        work = send(*args, **kwargs)
        _sends.append(work)
        return work

    dist.isend = isend


def accept_as_mla_down_projection(linear: type) -> None:
    """Let MLA's down projections be modules of class ``linear``.

    Megatron-core 0.16 accepts only listed classes for these projections. One of the listed names, ``Linear``, is None
    without Transformer Engine and is not used by LoopLM with it, so that name can be given to our class.
    """
    multi_latent_attention.Linear = linear
