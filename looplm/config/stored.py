"""Configurations that earlier releases have stored."""

import math
from typing import Any

import yaml

from looplm.bounds import require
from looplm.yaml_text import Plain

# Keys that earlier releases had, and that nearly every run stored as 0 or false.
_REMOVED = {
    "model": ("latent_mixing", "latent_sequence_halting", "latent_rotary_key"),
    "loss": ("fixed_point", "sparsity", "latent_stability", "latent_ponder_cost"),
}
_REMOVED_FIX = "it was removed, as it showed no gain (docs/levers.md); read this run with revision de6f01f"


def upgrade_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a stored run configuration without keys that were removed, or that earlier releases should have refused.

    They did not heed the latter, or (``loss.backward_loops``) left the embedding without gradients.

    Args:
        values: those of a file, whose scalars are still text, or of a configuration in memory.
        where: names the file in messages.

    Raises:
        UserError: the run used a key that was removed.
    """
    sections = {name: section for name, section in values.items() if isinstance(section, dict)}

    def stored(section: str, key: str, default: object = None) -> Any:
        value = sections.get(section, {}).get(key, default)
        return yaml.safe_load(value) if isinstance(value, Plain) else value

    def number(section: str, key: str) -> float:
        value = stored(section, key)
        return value if isinstance(value, int | float) else 0.0

    for section, keys in _REMOVED.items():
        for key in keys:
            value = stored(section, key)
            require(not value, f"{where}: {section}.{key}", value, _REMOVED_FIX)
    removed = ((section, True, keys) for section, keys in _REMOVED.items())
    samples = stored("loss", "sampled_loops", "none") != "none"
    late, few = number("loss", "loop_onset"), number("loss", "onset_loops")
    loops = number("model", "num_loops") or math.inf
    varies = samples or late > 0
    scales = stored("engine", "fp8") not in (None, "emulate-bf16")
    last, injects = stored("loss", "weights") == "last", stored("model", "injection", "none") != "none"
    refused = (
        ("loss", last and not injects and not samples, ("backward_loops",)),
        ("loss", stored("loss", "weights", "gate") != "gate", ("prior", "prior_shares", "geometric_rate")),
        ("loss", stored("loss", "prior", "uniform") != "geometric", ("geometric_rate",)),
        ("loss", late >= 1 or few >= loops, ("loop_onset", "onset_loops")),
        ("optim", stored("optim", "schedule", "wsd") != "cosine" and not stored("optim", "decay_steps"), ("min_lr",)),
        ("data", stored("data", "task") is not None, ("document_masking", "horizon_samples", "cache_dir")),
        ("engine", not scales or stored("engine", "fp8_recipe") != "delayed", ("amax_history",)),
        ("engine", not scales, ("fp8_recipe",)),
        ("health", varies or stored("health", "spike_factor") is None, ("spike_window", "spike_steps")),
        ("health", varies, ("spike_factor", "max_rollbacks")),
    )
    for section, applies, keys in (*removed, *refused):
        if applies and section in sections:
            sections[section] = {key: value for key, value in sections[section].items() if key not in keys}
    return {**values, **sections}
