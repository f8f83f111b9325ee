"""Training or validation, decided per document and by nothing but its id and the seed."""

import hashlib
from collections.abc import Iterator

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

TRAIN, VALID = "train", "valid"


def split_of(source: str, document_id: str, seed: int, validation_fraction: float) -> str:
    """``train`` or ``valid``; the same whatever the number of workers, and whatever other documents there are."""
    digest = hashlib.sha256(f"{seed}/{source}/{document_id}".encode()).digest()
    return VALID if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else TRAIN


class Split(PipelineStep):
    """Writes ``prefix`` (SOURCE_train or SOURCE_valid) into each document's metadata, where the writer finds it."""

    type = "✂ - SPLIT"
    name = "by document id"

    def __init__(self, seed: int, validation_fraction: float) -> None:
        super().__init__()
        self.seed, self.validation_fraction = seed, validation_fraction

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            source = document.metadata["source"]
            split = split_of(source, document.id, self.seed, self.validation_fraction)
            document.metadata["prefix"] = f"{source}_{split}"
            yield document
