"""The cache of a LoopLM, and the positions and mask of a forward call. This file travels inside an export.

Shapes: B batch, N rows of the batch that still run, S tokens of this call, T tokens seen (cached ones and these), K
rotary width. Loops count from 0, depth from 1.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from .configuration_looplm import LoopLMConfig


class LoopLMCache(DynamicCache):
    """Cache for generation: with MLA the normed latent and the rotated key, otherwise keys and values.

    ``per_loop`` has a slot for each loop and block, at ``loop * L + block`` as in Ouro, and is exact. ``last`` has one
    for each block, whose newest entries each loop overwrites: a prompt is seen with each loop's own entries, a past
    token as of the last loop it ran. Tokens that are given together after a prompt see each other as of their own loop.

    Blocks outside the loops have one slot each in either mode, before those of the loops. A coda's entries are of the
    loops in which the tokens exited.

    A gate that reads the text so far adds one slot to each loop: its signal for each token, and whether that counts.

    Args:
        config: the model's configuration.
        kv_cache: per_loop or last; None takes the config's.
    """

    def __init__(self, config: LoopLMConfig, kv_cache: str | None = None) -> None:
        super().__init__()
        self.shared = (kv_cache or config.kv_cache) == "last"
        self.blocks, self.stride = config.num_hidden_layers, config.num_hidden_layers + config.gate_sequence_level
        self.depth: int | None = None
        self.packed = False  # True if a row holds several documents
        self.outside = config.prelude_layers + config.coda_layers
        self.layers: list[Any]  # of DynamicLayer, created on demand

    def begin(self, depth: int) -> int:
        """Return the number of cached tokens; raise if they ran to another depth."""
        past = self.get_seq_length()
        if past and self.packed:
            raise ValueError(
                "past_key_values: packed documents cannot be continued; start a new cache, one document in each row"
            )
        if past and not self.shared and depth != self.depth:
            raise ValueError(
                f"num_loops: {depth} is not allowed; the tokens in past_key_values ran {self.depth} loops, and each "
                "loop has a cache of its own; give the same, or start a new cache"
            )
        self.depth = depth
        return past

    def store(self, loop: int, block: int, first: Tensor, second: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Store the entries of this call's tokens, [B, *, S, *] each; return those of all tokens, [B, *, T, *].

        Args:
            loop: the loop that made the entries; of a block outside the loops, how often it ran in this call before.
            block: the block of the stack, or after those, of prelude and coda.
            first: latents, or keys.
            second: rotated keys, or values.
            rows: indices of the rows that still run; None for all.
        """
        is_outside = block >= self.blocks
        slot = self.outside + block + (0 if self.shared else loop * self.stride)
        if is_outside:
            slot = block - self.blocks
        if rows is not None:
            held, new = self.layers[slot], slice(-first.size(-2), None)
            # Under autocast a call's entries may be of another type than the cache, which joins all types.
            held.keys[rows, :, new] = first.to(held.keys.dtype)
            held.values[rows, :, new] = second.to(held.values.dtype)
            return held.keys[rows], held.values[rows]
        if loop > 0 and (self.shared or is_outside):
            self.layers[slot].crop(-first.size(-2))
        return self.update(first, second, slot)

    def store_signal(
        self, loop: int, signal_BS: Tensor, counts_BS: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Store the gate's signals of this loop; return those of all tokens and which of them count, [B, T] each."""
        slot = self.outside + self.blocks + loop * (1 if self.shared else self.stride)
        if rows is not None:  # rows that have exited do not count in this loop's mean
            batch = len(self.layers[self.outside].keys)
            signal_BS, counts_BS = (
                x.new_zeros(batch, x.size(1)).index_copy(0, rows, x) for x in (signal_BS, counts_BS)
            )
        pair = self.update(signal_BS[:, None, :, None], counts_BS[:, None, :, None], slot)
        signal_BT, counts_BT = (x[:, 0, :, 0] for x in pair)
        return (signal_BT, counts_BT) if rows is None else (signal_BT[rows], counts_BT[rows])

    def skip(self, loops: range) -> None:
        """Exclude the newest token of every row, which has exited before these loops, from their means."""
        for loop in loops if self.stride > self.blocks else ():
            signals = self.layers[self.outside + self.blocks].keys
            nothing = signals.new_zeros(len(signals), 1)
            self.store_signal(loop, nothing, nothing, None)


class View(NamedTuple):
    """Positions and attention mask for one forward call."""

    cos_B1SK: Tensor  # of the angles of the positions
    sin_B1SK: Tensor
    visible_B1ST: Tensor | None  # what each token may attend to; None: all cached ones, and causally in the call
    counts_BS: Tensor  # 1 for real tokens, 0 for padding
    cache: LoopLMCache | None
    first_BS: Tensor | None = None  # index of the first token of each token's document; None if a row is one document
    rows: Tensor | None = None  # indices of the rows that still run; None for all

    @classmethod
    def of(
        cls,
        config: LoopLMConfig,
        h_BSD: Tensor,
        mask_BT: Tensor | None,
        documents: tuple[Tensor | None, Tensor | None, Tensor | None],
        cache: LoopLMCache | None,
        past: int,
    ) -> "View":
        """Return the view of a call.

        Args:
            config: the model's configuration.
            h_BSD: the embedded tokens.
            mask_BT: False or 0 for padding; None without padding.
            documents: positions, ``seq_idx`` and ``cu_seq_lens`` of :func:`first_tokens`.
            cache: the cache that the call uses, if any.
            past: number of cached tokens.

        Raises:
            ValueError: the mask has another shape, or packed documents follow cached tokens.
        """
        (rows, length, _), device = h_BSD.shape, h_BSD.device
        if mask_BT is None:
            mask_BT = torch.ones(rows, past + length, dtype=torch.bool, device=device)
        elif mask_BT.shape != (rows, past + length):
            raise ValueError(
                f"attention_mask: {list(mask_BT.shape)} is not allowed; give [{rows}, {past + length}], "
                "which includes the cached tokens"
            )
        mask_BT = mask_BT.bool()
        position_BS, *packing = documents
        first_BS = first_tokens(position_BS, mask_BT[:, past:], *packing)
        if first_BS is not None and past > 0:
            raise ValueError(
                "position_ids: packed documents are not allowed after cached tokens; give one document in each row"
            )
        if cache is not None:
            cache.packed = first_BS is not None
        if position_BS is None:
            position_BS = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, past:]
            if first_BS is not None:
                position_BS = position_BS - position_BS.gather(-1, first_BS)
        latent = config.attention == "mla"
        width = config.qk_rope_head_dim if latent else config.head_dim
        period = (config.qk_rope_period if latent else None) or width
        speed_K = config.rope_theta ** (-torch.arange(0, period, 2, dtype=torch.float32, device=device) / period)
        speed_K = speed_K.repeat(width // period)  # several rotary keys side by side
        angle_B1SK = position_BS[:, None, :, None].float() * speed_K
        cos_B1SK, sin_B1SK = angle_B1SK.cos().to(h_BSD.dtype), angle_B1SK.sin().to(h_BSD.dtype)
        visible_B1ST = None
        if not mask_BT.all() or (past > 0 and length > 1) or first_BS is not None:
            key_T = torch.arange(past + length, device=device)
            query_S1 = key_T[past:, None]
            # Padding attends to itself: attending to nothing gives NaN, and NaN times a weight of 0 is NaN.
            visible_BST = (key_T <= query_S1) & mask_BT[:, None] | (key_T == query_S1)
            if first_BS is not None:
                visible_BST &= key_T >= first_BS.unsqueeze(-1)
            visible_B1ST = visible_BST.unsqueeze(1)
        return cls(cos_B1SK, sin_B1SK, visible_B1ST, mask_BT[:, past:], cache, first_BS)

    def narrow(self, stay: Tensor) -> "View":
        """Return the view of the rows with the indices ``stay``."""
        rows = stay if self.rows is None else self.rows[stay]
        visible = self.visible_B1ST if self.visible_B1ST is None else self.visible_B1ST[stay]
        cos, sin = (x[stay] if len(x) > 1 else x for x in (self.cos_B1SK, self.sin_B1SK))
        return View(cos, sin, visible, self.counts_BS[stay], self.cache, None, rows)


def first_tokens(
    position_BS: Tensor | None, counts_BS: Tensor, seq_idx: Tensor | None, cu_seq_lens: Tensor | None
) -> Tensor | None:
    """Return the index of the first token of each token's document, [B, S]; None if each row is one document.

    Documents that are packed into a row, as by transformers' DataCollatorWithFlattening, are told apart as transformers
    does it: a token begins a document unless its position follows that of the token before it.

    Args:
        position_BS: given positions; one row may stand for all.
        counts_BS: True for real tokens, False for padding.
        seq_idx: [B, S], the number of each token's document.
        cu_seq_lens: the ends of all documents so far, beginning with 0; for a single row.
    """
    starts_BS = torch.zeros_like(counts_BS)
    rows, length = starts_BS.shape
    if position_BS is not None:
        starts_BS[:, 1:] |= (position_BS.diff() != 1) & counts_BS[:, 1:] & counts_BS[:, :-1]
    if seq_idx is not None:
        starts_BS[:, 1:] |= seq_idx.diff() != 0
    if cu_seq_lens is not None:
        if rows != 1 or cu_seq_lens[-1] != length:
            raise ValueError(f"cu_seq_lens_q: give it for one row, ending with its {length} tokens")
        starts_BS[0, cu_seq_lens[cu_seq_lens < length].long()] = True
    if not starts_BS[:, 1:].any():
        return None
    return (starts_BS * torch.arange(length, device=starts_BS.device)).cummax(-1).values
