"""Join the shards of each prefix with Megatron's own builder: ``python -m data_pipeline.merge PLAN.json``.

The plan maps an output prefix to its shards in order. This is a command of its own because importing Megatron-core
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
    """Write ``prefix``.bin and .idx: the documents of ``shards`` in that order.

    Shards without documents are left out (their empty .bin cannot be mapped into memory).

    Raises:
        UserError: a shard is truncated, the shards differ in their token type, or none holds a document.
    """
    indices = [read_index(Path(f"{shard}.idx")) for shard in shards]
    full = [(shard, index) for shard, index in zip(shards, indices, strict=True) if index.documents]
    if not full:
        raise UserError(f"{prefix}: none of its {len(shards)} shards holds a document")
    dtypes = {index.dtype for _, index in full}
    if len(dtypes) > 1:
        raise UserError(
            f"{prefix}: shards of {' and '.join(sorted(map(str, dtypes)))}; tokenise all with one tokenizer"
        )
    for shard, index in full:
        if (size := Path(f"{shard}.bin").stat().st_size) != index.bin_bytes:
            raise UserError(
                f"{shard}.bin: {size} bytes, its .idx says {index.bin_bytes}; truncated: build the data again"
            )
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=full[0][1].dtype.type)
    for shard, _ in full:
        builder.add_index(shard)
    builder.finalize(f"{prefix}.idx")


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError("give one argument, a JSON file that maps each output prefix to its shards")
    gc.freeze()  # the builder collects garbage after every shard, which would walk all that torch has loaded
    for prefix, shards in json.loads(Path(argv[0]).read_text(encoding="utf-8")).items():
        merge_shards(shards, prefix)


if __name__ == "__main__":
    run_main(main)
