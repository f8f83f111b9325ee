"""How to continue a text: the settings that all requests of a run share."""

from dataclasses import dataclass

from looplm.cli import require
from looplm.inference.early_exit import ExitRule, ExitSignal
from looplm.inference.kv_cache import CacheMode


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a text.

    Args:
        max_new_tokens: tokens to add at most; the model's context may end it sooner.
        temperature: 0 takes the likeliest token each time; 1 draws from the model's own distribution.
        top_k: draw from the k likeliest tokens only; 0 for all.
        top_p: draw from the likeliest tokens that together reach this probability; 1 for all.
        repetition_penalty: above 1, tokens already in the text become less likely.
        stop: strings the text ends before.
        seed: of the first request; request i takes seed + i unless it has one of its own.
        kv_cache: per_loop (exact), or one cache that the loops share: last, mean or first.
        exit_threshold: a token leaves at the first loop whose score reaches this, from 0 to 1; null for all loops.
        exit_signal: the score: gate (probability of having left by the exit gate), or, to compare it with: confidence
            (probability of the likeliest token), entropy (1 - entropy / log vocabulary), change (1 - relative change of
            the hidden state).
        min_depth: with exit_threshold: no token leaves before this loop.
        max_depth: with exit_threshold: every token leaves after this loop; null for the trained number of loops. Only
            the gate has no opinion on loops beyond those.
        depth: run every token exactly this many loops, more than trained if you like; null for the trained number.
        speculate: tokens that are drafted with draft_depth loops before all loops check them together; 0 for none.
        draft_depth: with speculate: loops of the draft.
        batch_size: texts side by side; further ones take the places of those that end.
        prefill_chunk: tokens of prompts that run through the stack at once; long prompts are read in pieces.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    kv_cache: CacheMode = "per_loop"
    exit_threshold: float | None = None
    exit_signal: ExitSignal = "gate"
    min_depth: int = 1
    max_depth: int | None = None
    depth: int | None = None
    speculate: int = 0
    draft_depth: int = 1
    batch_size: int = 16
    prefill_chunk: int = 1024

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "give at least 1")
        require(self.temperature >= 0, "temperature", self.temperature, "give 0 (greedy) or more")
        require(self.top_k >= 0, "top_k", self.top_k, "give 0 (all) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "give a number above 0 and at most 1")
        require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "give a number above 0; 1 is none")  # fmt: skip
        require("" not in self.stop, "stop", list(self.stop), "an empty string would stop at once; leave it out")
        require(0 <= self.seed < 2**31, "seed", self.seed, "give a whole number from 0 to 2147483647")
        require(self.kv_cache in ("per_loop", "last", "mean", "first"), "kv_cache", self.kv_cache, "give per_loop, last, mean or first")  # fmt: skip
        require(self.batch_size >= 1, "batch_size", self.batch_size, "give at least 1")
        require(self.prefill_chunk >= 1, "prefill_chunk", self.prefill_chunk, "give at least 1")
        self._check_exit()
        self._check_speculation()

    def _check_exit(self) -> None:
        threshold, signals = self.exit_threshold, ("gate", "confidence", "entropy", "change")
        require(threshold is None or 0 <= threshold <= 1, "exit_threshold", threshold, "give a number from 0 to 1")
        require(self.exit_signal in signals, "exit_signal", self.exit_signal, f"give one of {', '.join(signals)}")
        require(self.min_depth >= 1, "min_depth", self.min_depth, "give at least 1")
        require(self.depth is None or self.depth >= 1, "depth", self.depth, "give at least 1")
        require(self.depth is None or threshold is None, "depth", self.depth, "a fixed depth leaves exit_threshold nothing to decide; give one of the two")  # fmt: skip
        for key, default in (("min_depth", 1), ("max_depth", None), ("exit_signal", "gate")):
            value = getattr(self, key)
            require(threshold is not None or value == default, key, value, "it belongs to exit_threshold; give that too, or depth alone")  # fmt: skip

    def _check_speculation(self) -> None:
        require(self.speculate >= 0, "speculate", self.speculate, "give 0 (none) or more")
        require(self.draft_depth >= 1, "draft_depth", self.draft_depth, "give at least 1")
        if self.speculate == 0:
            require(self.draft_depth == 1, "draft_depth", self.draft_depth, "it belongs to speculate; give that too")
            return
        # A shared cache shows later tokens a token's last loop: those drafted meanwhile saw an earlier one.
        require(self.kv_cache == "per_loop", "speculate", self.speculate, f"a checked draft is exact with kv_cache=per_loop only, not {self.kv_cache}")  # fmt: skip
        require(self.exit_threshold is None, "speculate", self.speculate, "it checks with a fixed depth; leave exit_threshold out")  # fmt: skip

    def exit_rule(self, trained_loops: int, gate_trained: bool) -> ExitRule:
        """The rule for a model; raises :class:`UserError` where the model cannot follow it."""
        if self.exit_threshold is None:
            depth = self.depth or trained_loops
            if self.speculate:
                require(self.draft_depth < depth, "draft_depth", self.draft_depth, f"give less than the {depth} loops that check it")  # fmt: skip
            return ExitRule(max_depth=depth)
        by_gate = self.exit_signal == "gate"
        require(
            gate_trained or self.exit_threshold == 1 or not by_gate,
            "exit_threshold",
            self.exit_threshold,
            "this checkpoint's gate was never trained; run the gate stage, or give depth or another exit_signal",
        )
        most = trained_loops if self.max_depth is None else self.max_depth
        require(most >= 1, "max_depth", most, "give at least 1")
        require(most <= trained_loops or not by_gate, "max_depth", most, f"the gate knows loops 1 to {trained_loops}; to go deeper give depth or another exit_signal")  # fmt: skip
        require(self.min_depth <= most, "min_depth", self.min_depth, f"give at most {most}")
        return ExitRule(
            max_depth=most, min_depth=self.min_depth, threshold=self.exit_threshold, signal=self.exit_signal
        )
