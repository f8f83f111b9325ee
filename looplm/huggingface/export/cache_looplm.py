"""What a LoopLM keeps of the past, and what the tokens of a call know of places. It travels inside an export.

Shapes: B batch, N rows of it still in the loops, S tokens of this call, T tokens seen: those before and these, K rotary
width. Loops count from 0, depth from 1.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from .configuration_looplm import LoopLMConfig


class LoopLMCache(DynamicCache):
    """What generation keeps of the past: of MLA the normed latent and the rotated key, otherwise keys and values.

    ``per_loop`` has a slot for each loop and block, at ``loop * L + block`` as in Ouro: exact. ``last`` has one for each
    block, over whose newest tokens each loop writes: a prompt is seen with each loop's own entries, a past token as of
    the last loop it ran. Tokens given together after a prompt see each other as in their own loop.

    A gate that reads the text so far adds one slot to each loop: its signal of each token, and whether that counts.

    Args:
        config: the model's.
        kv_cache: per_loop or last; None takes the config's.
    """

    def __init__(self, config: LoopLMConfig, kv_cache: str | None = None) -> None:
        super().__init__()
        self.shared = (kv_cache or config.kv_cache) == "last"
        self.blocks, self.stride = config.num_hidden_layers, config.num_hidden_layers + config.gate_sequence_level
        self.depth: int | None = None
        self.layers: list[Any]  # DynamicLayer each, made as they are needed

    def begin(self, depth: int) -> int:
        """Refuse another depth than that of the tokens in it; how many those are."""
        past = self.get_seq_length()
        if past and not self.shared and depth != self.depth:
            raise ValueError(
                f"num_loops: {depth} is not allowed; the tokens in past_key_values ran {self.depth} loops, and each "
                "loop has a cache of its own; give the same, or start a new cache"
            )
        self.depth = depth
        return past

    def enter(self, loop: int, block: int, first: Tensor, second: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Put down the tokens' entries of this loop, [B, *, S, *] each; what they see is [B, *, T, *].

        Args:
            loop: the tokens are in.
            block: of the stack.
            first: latents, or keys.
            second: rotated keys, or values.
            rows: of the batch that are still in the loops; None for all.
        """
        slot = block if self.shared else loop * self.stride + block
        if rows is not None:
            held, new = self.layers[slot], slice(-first.size(-2), None)
            held.keys[rows, :, new], held.values[rows, :, new] = first, second
            return held.keys[rows], held.values[rows]
        if self.shared and loop > 0:
            self.layers[slot].crop(-first.size(-2))
        return self.update(first, second, slot)

    def remember(self, loop: int, signal_BS: Tensor, counts_BS: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Put down the gate's signals of this loop; all of them, and which count: [B, T] each."""
        slot = self.blocks + loop * (1 if self.shared else self.stride)
        if rows is not None:  # those that have left are not in this loop's mean
            everyone = len(self.layers[0].keys)
            signal_BS, counts_BS = (
                x.new_zeros(everyone, x.size(1)).index_copy(0, rows, x) for x in (signal_BS, counts_BS)
            )
        pair = self.update(signal_BS[:, None, :, None], counts_BS[:, None, :, None], slot)
        signal_BT, counts_BT = (x[:, 0, :, 0] for x in pair)
        return (signal_BT, counts_BT) if rows is None else (signal_BT[rows], counts_BT[rows])

    def skip(self, loops: range) -> None:
        """The newest token of every row has left before these loops, so it is in none of their means."""
        for loop in loops if self.stride > self.blocks else ():
            nothing = self.layers[self.blocks].keys.new_zeros(len(self.layers[0].keys), 1)
            self.remember(loop, nothing, nothing, None)


class View(NamedTuple):
    """What the tokens of a call know of places."""

    cos_B1SK: Tensor  # of the angles of their positions
    sin_B1SK: Tensor
    visible_B1ST: Tensor | None  # which others each may look at; None for all of them, and causally among themselves
    counts_BS: Tensor  # 1 where a token is none of the padding
    cache: LoopLMCache | None
    rows: Tensor | None = None  # of the batch that are still in the loops; None for all

    def narrow(self, stay_N: Tensor) -> "View":
        """That of some of the rows."""
        rows = torch.arange(len(stay_N), device=stay_N.device) if self.rows is None else self.rows
        visible = self.visible_B1ST if self.visible_B1ST is None else self.visible_B1ST[stay_N]
        cos, sin = (x[stay_N] if len(x) > 1 else x for x in (self.cos_B1SK, self.sin_B1SK))
        return View(cos, sin, visible, self.counts_BS[stay_N], self.cache, rows[stay_N])
