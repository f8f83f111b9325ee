"""Join the shards of each prefix with Megatron's own builder: ``python -m data_pipeline.merge PLAN.json``.

The plan maps each output prefix to its shards in order. Merging is a separate command because importing Megatron-core
takes seconds, which every worker process of ``data_pipeline.tokenize`` would otherwise pay.
"""

import gc
import json
from collections.abc import Sequence
from pathlib import Path

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_pipeline.token_file import read_index
from looplm.cli import UserError, run_main


def merge_shards(shards: Sequence[str], prefix: str) -> None:
    """Write ``prefix``.bin and .idx with the documents of ``shards`` in the given order.

    Shards without documents are skipped, because their empty .bin cannot be mapped into memory.

    Raises:
        UserError: a shard is truncated, the shards differ in their token type, or all of them are empty.
    """
    indices = [read_index(Path(f"{shard}.idx")) for shard in shards]
    full = [(shard, index) for shard, index in zip(shards, indices, strict=True) if index.documents]
    if not full:
        raise UserError(f"{prefix}: all {len(shards)} shards are empty; loosen the filters or add text")
    dtypes = {index.dtype for _, index in full}
    if len(dtypes) > 1:
        found = " and ".join(sorted(map(str, dtypes)))
        raise UserError(f"{prefix}: shards of {found}; tokenize all with one tokenizer")
    for shard, index in full:
        if (size := Path(f"{shard}.bin").stat().st_size) != index.bin_bytes:
            raise UserError(f"{shard}.bin: {size} bytes, its .idx says {index.bin_bytes}; build the data again")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=full[0][1].dtype.type)
    for shard, _ in full:
        builder.add_index(shard)
    builder.finalize(f"{prefix}.idx")


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError(
            f"arguments: {len(argv)} given; give one, a JSON file that maps each output prefix to its shards"
        )
    gc.freeze()  # the builder collects garbage after every shard, and would visit every object that torch has loaded
    for prefix, shards in json.loads(Path(argv[0]).read_text(encoding="utf-8")).items():
        merge_shards(shards, prefix)


if __name__ == "__main__":
    run_main(main)
