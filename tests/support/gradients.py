"""Gradients as one data-parallel replica would hold them, whichever optimizer is to step them."""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


def whole_gradients(ddp: DistributedDataParallel, groups: ProcessGroupCollection) -> dict[str, Tensor]:
    """The gradient of every trained parameter by its name; collective.

    Under the distributed optimizer each rank's buffers are reduced in its own share only: the shares are put together.
    """
    names = {parameter: name for name, parameter in ddp.module.named_parameters()}
    gradients = {}
    for bucket_group in ddp.bucket_groups:
        for bucket in bucket_group.buckets:
            flat = bucket.grad_data
            if ddp.ddp_config.use_distributed_optimizer:
                ranks, rank = groups.dp_cp.size(), groups.dp_cp.rank()
                shares = [torch.empty_like(flat[: flat.numel() // ranks]) for _ in range(ranks)]
                dist.all_gather(shares, flat.chunk(ranks)[rank].clone(), group=groups.dp_cp)
                flat = torch.cat(shares)
            for parameter in bucket.params_list:
                # bucket.param_to_index leaves out the padding between parameters; main_grad is a view of the buffer.
                first = parameter.main_grad.storage_offset() - bucket.grad_data.storage_offset()
                gradients[names[parameter]] = flat[first : first + parameter.numel()].view(parameter.shape).clone()
    return gradients
