"""Print a recipe's parameters, training FLOPs and cache bytes, by arithmetic alone: no model is built.

python -m tools.count_params --config configs/quickstart/pretrain.yaml
python -m tools.count_params --config configs/quickstart/pretrain.yaml --partners
"""

from dataclasses import dataclass

from looplm.accounting import cache_values_per_token, parameter_counts, training_flops_per_token
from looplm.cli import parse_config, run_main, switch
from looplm.config import RunConfig
from tools.experiments.partners import partners, table

_OPTIONAL = ("prelude", "injection", "step_embedding", "coda")  # parts that most models lack


@dataclass(frozen=True, kw_only=True)
class CountConfig(RunConfig):
    """A recipe, and what to print of it.

    Args:
        partners: print the models that a fair comparison needs: equal in parameters, or in training FLOPs.
    """

    partners: bool = switch()


def main(argv: list[str]) -> None:
    """``python -m tools.count_params --config configs/quickstart/pretrain.yaml``"""
    config = parse_config(CountConfig, argv, prog="python -m tools.count_params", description=str(__doc__))
    print(table(partners(config)) if config.partners else describe(config))


def describe(config: RunConfig) -> str:
    """Return the table that the command prints."""
    model, gate, length = config.model, config.gate, config.data.seq_length
    counts = parameter_counts(model, gate)
    total = sum(counts.values())
    rows = [
        f"{part:<16}{count:>16,}{count / total:>9.1%}"
        for part, count in counts.items()
        if count or part not in _OPTIONAL
    ]
    rows += [f"{'total':<16}{total:>16,}", ""]
    rows.append(f"{model.depth_summary}, the same weights in every loop; per token:")
    for loops in sorted({1, 2, 4, 8, model.num_loops}):
        flops = training_flops_per_token(model, gate, config.loss, length, loops)
        mark = "  <- this recipe" if loops == model.num_loops else ""
        rows.append(f"{loops:>4} loops {flops / 1e6:>14,.1f} training MFLOP at sequence length {length}{mark}")
    for name, caches in (("per_loop", model.num_loops), ("last", 1)):
        rows.append(f"{'cache ' + name:<16}{2 * cache_values_per_token(model, caches):>12,} bytes in bf16")
    return "\n".join(rows)


if __name__ == "__main__":
    run_main(main)
