"""Files: their checksums."""

import hashlib
from pathlib import Path

import pytest
import xxhash

from looplm.files import sha256_of, xxh3_of


@pytest.mark.parametrize("size", [0, 1, 1 << 18, 1_000_001], ids=["empty", "byte", "block", "blocks"])
def test_a_digest_covers_every_byte(tmp_path: Path, size: int) -> None:
    path, content = tmp_path / "file", bytes(range(251)) * (size // 251) + b"x" * (size % 251)
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()
    assert xxh3_of(path) == xxhash.xxh3_128_hexdigest(content)
