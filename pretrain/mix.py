"""The sources of a run on text: each is there once, and how often the run reads it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.manifest import read_manifest
from looplm.bounds import require
from looplm.config import DataConfig, DataSource
from pretrain.mixed_data import MixConfig

MANY_PASSES = 4.0  # over the same text: further ones teach little (Muennighoff et al., arXiv 2305.16264)


def samples_of_one_pass(held: Sequence[int], sources: Sequence[DataSource]) -> int:
    """Return how many samples of a mix surely need no source twice.

    Args:
        held: samples in each source. Of several, Megatron asks each for a surplus.
        sources: their weights count.
    """
    if len(held) == 1:
        return held[0]
    surplus, total = 1 + MixConfig.mid_level_dataset_surplus, sum(source.weight for source in sources)
    shares = [source.weight / total for source in sources]
    return max(0, min(int((own / surplus - 1) / share) for own, share in zip(held, shares, strict=True)))


def describe_passes(sources: Sequence[DataSource], held: Sequence[int], tokens: int) -> Iterator[str]:
    """Yield a line about how often a run of ``tokens`` tokens reads each source, and one about those read too often.

    Args:
        held: tokens in each source.
    """
    total, names = sum(source.weight for source in sources), [Path(source.prefix).name for source in sources]
    if len(set(names)) < len(names):
        names = [source.prefix for source in sources]
    passes = [tokens * source.weight / total / own for source, own in zip(sources, held, strict=True)]
    times = dict(zip(names, passes, strict=True))
    yield f"passes over the data: {', '.join(f'{name} {number:.2f}' for name, number in times.items())}"
    if many := ", ".join(name for name, number in times.items() if number > MANY_PASSES):
        why = f"more than {MANY_PASSES:g} passes teach little (arXiv 2305.16264)"
        yield f"warning: {many}: {why}; add data, lower the weight or train fewer steps"


def check_sources(data: DataConfig) -> None:
    """Raise a :class:`UserError` if a source is given twice, under any name, or held-out documents are trained on."""
    seen = dict[str, str]()
    for key, sources in (("data.train", data.train), ("data.valid", data.valid)):
        for source in sources:
            manifest = read_manifest(source.prefix)
            fix = "its manifest says that it is held out for validation; train on a prefix of split train"
            require(key == "data.valid" or manifest.split != "valid", key, source.prefix, fix)
            fix = f"it holds the same data as {seen.get(manifest.fingerprint)}; give them once"
            require(manifest.fingerprint not in seen, key, source.prefix, fix)
            seen[manifest.fingerprint] = f"{source.prefix} in {key}"
