"""The attention core on torch's kernels: scores and weighted sum inside documents, without a mask.

Megatron's local module materializes S x S scores and refuses MLA's unequal widths.

Shapes: S this rank's positions, B batch, H heads, G key heads, K query-key width, W value width, N spans.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

import looplm.model.span_attention as span_attention
import looplm.model.span_attention_cuda as span_attention_cuda
from looplm.megatron import context_parallel


class CoreAttention(MegatronModule):
    """``softmax(q k^T scale) v`` over the keys of each query's span (:mod:`looplm.model.spans`).

    Under context parallelism every rank gathers the keys and values of all positions and attends from its own. They are
    gathered as heads. Gathering MLA's latent instead, before the up-projection, would move and keep fewer bytes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale
        self.context = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Attend from this rank's positions.

        Args:
            query: [S, B, H, K].
            key: [S, B, G, K].
            value: [S, B, G, W].
            attention_mask: the spans [N, 5] of :func:`looplm.model.spans.document_spans`, in the place that Megatron's
                layers have for a mask; None if this rank holds whole samples of one document each.

        Returns:
            [S, B, H * W].
        """
        widths = [key.size(-1), value.size(-1)]
        if self.context.size() > 1:  # both in one message
            key, value = context_parallel.gather(torch.cat((key, value), -1), self.context).split(widths, -1)
        else:
            value = value.contiguous()  # a view of MHA's one projection would keep its queries and keys alive too
        attend = span_attention_cuda.span_attention if query.is_cuda else span_attention.span_attention
        scale = self.softmax_scale or widths[0] ** -0.5
        return attend(query, key, value, attention_mask, scale).flatten(2)
