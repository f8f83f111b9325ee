"""Reduced gradients in whole tensors, for the plain and the distributed optimizer."""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor


def whole_gradients(ddp: DistributedDataParallel, groups: ProcessGroupCollection) -> dict[str, Tensor]:
    """Return the gradient of every trained parameter by name. All ranks must call this together.

    Under the distributed optimizer each rank's buffer is reduced in its own share only, so the shares are gathered.
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
                # bucket.param_to_index ignores the padding between parameters, but main_grad is a view of the buffer.
                first = parameter.main_grad.storage_offset() - bucket.grad_data.storage_offset()
                gradients[names[parameter]] = flat[first : first + parameter.numel()].view(parameter.shape).clone()
    return gradients
