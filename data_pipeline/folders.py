"""Folders for datatrove whose paths are taken literally.

datatrove opens a folder through fsspec, which reads ``[``, ``*`` and ``?`` as a pattern and ``::`` as a chain of file
systems, in the folder's own path too. In ``exp[1]/data``, the search for duplicates found no signatures and dropped
nothing.
"""

import glob
from typing import Any

from datatrove.io import DataFolder
from fsspec.implementations.local import LocalFileSystem


class Folder(DataFolder):
    """A folder on this machine. Only the pattern that datatrove looks for inside it is read as a pattern.

    Args:
        path: the folder.
        names: the files in it that a reader reads, in this order; None: all of them.
    """

    cachable = False

    def __init__(self, path: str, names: tuple[str, ...] | None = None) -> None:
        super().__init__(path, fs=LocalFileSystem())
        self.names = names

    def list_files(self, *args: Any, **options: Any) -> list[str]:
        return super().list_files(*args, **options) if self.names is None else list(self.names)

    def glob(self, path: str, detail: bool = False, **_: Any) -> Any:
        found = glob.glob(path, root_dir=self.path, recursive=True)
        return {name: self.info(name) for name in found} if detail else found
