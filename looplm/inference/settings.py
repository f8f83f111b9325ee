"""Settings that all requests of a run share."""

from dataclasses import dataclass
from typing import get_args

from looplm.bounds import at_least, check_bounds, positive, require
from looplm.config import ModelConfig
from looplm.config.model import MAX_DEPTH
from looplm.inference.early_exit import ExitRule, ExitSignal, check_signal
from looplm.inference.kv_cache import CacheMode


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings for continuing a text.

    Args:
        max_new_tokens: the most tokens to add; the model's context may end the text sooner.
        temperature: 0 takes the likeliest token each time; 1 samples from the model's own distribution.
        top_k: sample from the k likeliest tokens only; 0 for all.
        top_p: sample from the likeliest tokens that together reach this probability; 1 for all.
        repetition_penalty: above 1, tokens already in the text become less likely.
        stop: strings that end the text before them.
        seed: of the first request; request i takes seed + i unless it has its own.
        kv_cache: per_loop (exact), or one cache that the loops share: last, mean or first.
        exit_threshold: a token exits at the first loop whose score reaches this, from 0 to 1; null for all loops.
        exit_signal: the score: gate (probability of having exited, by the exit gate), or for comparison: confidence
            (probability of the likeliest token), entropy (1 - entropy / log vocabulary), change (1 - relative change of
            the hidden state).
        min_depth: with exit_threshold: no token exits before this loop.
        max_depth: with exit_threshold: every token exits after this loop; null for the trained number of loops, which
            the gate cannot exceed.
        depth: run every token exactly this many loops, also more than trained; null for the trained number.
        speculate: tokens to draft with draft_depth loops before all loops check them together; 0 for no drafts.
        draft_depth: with speculate: loops of the draft.
        batch_size: texts side by side; further ones take the places of those that end.
        prefill_chunk: prompt tokens that run through the stack at once; longer prompts are read in pieces.
    """

    max_new_tokens: int = at_least(1, 128)
    temperature: float = at_least(0, 0.8)
    top_k: int = at_least(0, 0)
    top_p: float = positive(0.95, at_most=1)
    repetition_penalty: float = positive(1.0)
    stop: tuple[str, ...] = ()
    seed: int = at_least(0, 0, below=2**31)
    kv_cache: CacheMode = "per_loop"
    exit_threshold: float | None = at_least(0, None, at_most=1)
    exit_signal: ExitSignal = "gate"
    min_depth: int = at_least(1, 1)
    max_depth: int | None = at_least(1, None, at_most=MAX_DEPTH)
    depth: int | None = at_least(1, None, at_most=MAX_DEPTH)
    speculate: int = at_least(0, 0, at_most=64)
    draft_depth: int = at_least(1, 1)
    batch_size: int = at_least(1, 16)
    prefill_chunk: int = at_least(1, 1024)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        require(not isinstance(self.stop, str), "stop", self.stop, "give a list of strings")
        require("" not in self.stop, "stop", list(self.stop), "an empty string would stop at once; leave it out")
        for key, choices in (("kv_cache", get_args(CacheMode)), ("exit_signal", get_args(ExitSignal))):
            require(getattr(self, key) in choices, key, getattr(self, key), f"give one of {', '.join(choices)}")
        greedy, fix = self.temperature == 0, "it has no effect at temperature 0; leave it out, or raise temperature"
        require(not greedy or self.top_k == 0, "top_k", self.top_k, fix)
        require(not greedy or self.top_p in (1, GenerationConfig.top_p), "top_p", self.top_p, fix)
        threshold = self.exit_threshold
        fix = "exit_threshold has no effect at a fixed depth; give one of the two"
        require(self.depth is None or threshold is None, "depth", self.depth, fix)
        self._require_unless(threshold is not None, "exit_threshold", min_depth=1, max_depth=None, exit_signal="gate")
        self._require_unless(self.speculate > 0, "speculate", draft_depth=1)
        if self.speculate:
            # A shared cache holds a token's last loop, but tokens drafted after it have seen an earlier one.
            fix, speculate = f"drafts are exact with kv_cache=per_loop only, not {self.kv_cache}", self.speculate
            require(self.kv_cache == "per_loop", "speculate", speculate, fix)
            require(threshold is None, "speculate", speculate, "drafts need a fixed depth; leave exit_threshold out")

    def _require_unless(self, given: bool, owner: str, **defaults: object) -> None:
        """Raise if a key that belongs to ``owner`` is set although ``owner`` is not ``given``."""
        for key, default in defaults.items():
            value = getattr(self, key)
            require(given or value == default, key, value, f"it has no effect without {owner}; give that too")

    def exit_rule(self, model: ModelConfig, gate_trained: bool) -> ExitRule:
        """Return the exit rule for a model.

        Raises:
            UserError: the model cannot follow the settings.
        """
        threshold, by_gate, trained_loops = self.exit_threshold, self.exit_signal == "gate", model.num_loops
        check_signal(self.exit_signal, model)
        if threshold is None:
            depth = self.depth or trained_loops
            fix = f"give less than the {depth} loops that check it"
            require(not self.speculate or self.draft_depth < depth, "draft_depth", self.draft_depth, fix)
            return ExitRule(max_depth=depth)
        fix = "this checkpoint's gate was never trained; run the gate stage, or give depth or another exit_signal"
        require(gate_trained or threshold == 1 or not by_gate, "exit_threshold", threshold, fix)
        max_depth = trained_loops if self.max_depth is None else self.max_depth
        fix = f"the gate knows loops 1 to {trained_loops}; to go deeper give depth or another exit_signal"
        require(max_depth <= trained_loops or not by_gate, "max_depth", max_depth, fix)
        require(self.min_depth <= max_depth, "min_depth", self.min_depth, f"give at most {max_depth}")
        return ExitRule(max_depth=max_depth, min_depth=self.min_depth, threshold=threshold, signal=self.exit_signal)
