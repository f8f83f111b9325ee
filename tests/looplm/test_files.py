"""Files: their checksums."""

import hashlib
from pathlib import Path
from threading import Event, Thread

import pytest

from looplm.files import sha256_of


def test_the_checksum_of_a_file_that_still_grows_covers_its_end(tmp_path: Path) -> None:
    path, is_whole, found = tmp_path / "file", Event(), list[str]()
    path.touch()
    reader = Thread(target=lambda: found.append(sha256_of(path, is_whole.is_set)))
    reader.start()
    with path.open("ab", buffering=0) as stream:
        for part in (b"a" * 300_000, b"b", b"c" * 1_000_000):
            stream.write(part)
            reader.join(0.01)  # time to read it
    assert reader.is_alive()
    is_whole.set()
    reader.join()
    assert found == [hashlib.sha256(path.read_bytes()).hexdigest()]


def test_a_writer_that_fails_ends_the_reading(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a")

    def failed() -> bool:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        sha256_of(tmp_path / "file", failed)
