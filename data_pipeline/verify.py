"""Compare token files with their manifests: sizes, index and tokenizer, in a time independent of the amount of data.

    python -m data_pipeline.verify data/web_train
    python -m data_pipeline.verify data/web_train data/web_valid --deep

With ``--deep`` everything is read: the hashes, the tokenizer's vocabulary, every token id, and the end of every
document. eos and pad may occur nowhere else.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.manifest import Manifest, fingerprint_of, manifest_path, read_manifest
from data_pipeline.token_file import MAX_DOCUMENTS, IndexFile, read_blocks, read_index, unmark
from looplm.cli import parse_config, positional_paths, run_main, switch
from looplm.encoding import read_tokenizer
from looplm.failures import UserError
from looplm.files import is_file_name, sha256_of

INDEX_BYTES = 1 << 28  # a larger .idx is hashed only by a deep check


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Prefixes to check.

    Args:
        prefixes: paths without .bin or .idx, as in data.train of a training config.
        deep: read everything: hashes, vocabulary, ids, document ends.
    """

    prefixes: tuple[str, ...] = positional_paths("PREFIX")
    deep: bool = switch()


def main(argv: list[str]) -> None:
    config = parse_config(VerifyConfig, argv, prog="python -m data_pipeline.verify", description=__doc__ or "")
    faults = []
    for prefix in config.prefixes:
        try:
            manifest = check_prefix(prefix, deep=config.deep)
            print(f"{prefix}: whole, {manifest.describe()}, fingerprint {manifest.fingerprint[:16]}")
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(*faults)


def check_prefix(prefix: str | Path, deep: bool) -> Manifest:
    """Compare the files of ``prefix`` with its manifest, and return the manifest.

    Args:
        deep: also read everything: hashes, the vocabulary of the tokenizer, ids below it, an eos at the end of every
            document and nowhere else, no pad.

    Raises:
        UserError: the first difference.
    """
    manifest, folder = read_manifest(prefix), Path(prefix).parent
    _check_name(prefix, "tokenizer", manifest.tokenizer.path)
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if set(manifest.files) != {bin_path.name, idx_path.name}:
        raise _broken(manifest_path(prefix), f"describes {' and '.join(manifest.files)}, which were renamed")
    for name, record in manifest.files.items():
        if not (folder / name).is_file():
            raise _broken(folder / name, "is missing")
        if (size := (folder / name).stat().st_size) != record.bytes:
            raise _broken(folder / name, f"{size} bytes, the manifest says {record.bytes}; truncated or replaced")
    if not manifest.documents:
        raise _broken(manifest_path(prefix), "describes no document")
    if manifest.documents > MAX_DOCUMENTS:
        fix = "split the source into several and build the data again"
        raise _broken(manifest_path(prefix), f"{manifest.documents:,} documents, more than {MAX_DOCUMENTS:,}", fix)
    index = read_index(idx_path)
    found = (index.documents, index.tokens, index.bin_bytes)
    described = (manifest.documents, manifest.tokens, manifest.files[bin_path.name].bytes)
    if found != described:
        fault = f"documents, tokens, bytes are {found}, not {described}; it belongs to another data set"
        raise _broken(idx_path, fault)
    record = manifest.files[idx_path.name]
    if record.bytes <= INDEX_BYTES and sha256_of(idx_path) != record.sha256:
        raise _broken(idx_path, "its content is not what was written; it belongs to another data set")
    if manifest.max_id is not None and not 0 <= manifest.max_id < manifest.vocab_size:
        raise _broken(bin_path, f"holds token id {manifest.max_id}, the vocabulary has {manifest.vocab_size}")
    _check_beside(folder / manifest.tokenizer.path, manifest.tokenizer.sha256, "tokenizer", f"that made {prefix}")
    if (chat := manifest.chat) is not None and chat.template_sha256 is not None:
        _check_name(prefix, "template", chat.template)
        _check_beside(folder / chat.template, chat.template_sha256, "chat template", f"of {prefix}")
    if deep:
        _check_content(manifest, bin_path, index)
    return manifest


def _check_name(prefix: str | Path, what: str, name: str) -> None:
    if not is_file_name(name):
        raise _broken(manifest_path(prefix), f"names the {what} {name!r}, which is not a file of its folder")


def _check_beside(path: Path, sha256: str, what: str, whose: str) -> None:
    """Raise unless a file beside the prefix is the one that the manifest means."""
    if not path.is_file():
        raise _broken(path, f"the {what} is missing", "put it back or build the data again")
    if sha256_of(path) != sha256:
        raise _broken(path, f"not the {what} {whose}", "put that one back")


def _check_content(manifest: Manifest, bin_path: Path, index: IndexFile) -> None:
    for name, record in manifest.files.items():
        if sha256_of(bin_path.parent / name) != record.sha256:
            raise _broken(bin_path.parent / name, "its content is not what was written")
    if manifest.fingerprint != fingerprint_of(manifest.files, manifest.tokenizer):
        raise _broken(manifest_path(bin_path.with_suffix("")), "its fingerprint does not match the files")
    size, eos, pad = manifest.vocab_size, manifest.tokenizer.eos_id, manifest.tokenizer.pad_id
    tokenizer = bin_path.parent / manifest.tokenizer.path
    ids = read_tokenizer(tokenizer).get_vocab(with_added_tokens=True).values()
    if (last_id := max(ids, default=-1)) != size - 1:
        fault = f"says that the vocabulary has {size} ids, but the largest in {tokenizer} is {last_id}"
        raise _broken(manifest_path(bin_path.with_suffix("")), fault)
    answer_tokens = ends = paddings = 0
    for tokens_N in read_blocks(bin_path, index.dtype):
        if manifest.chat is not None:
            tokens_N, has_loss_N = unmark(tokens_N)
            answer_tokens += int(has_loss_N.sum())
        low, high = int(tokens_N.min()), int(tokens_N.max())
        if low < 0 or high >= size:
            raise _broken(bin_path, f"holds token id {low if low < 0 else high}, the vocabulary has {size}")
        ends += int((tokens_N == eos).sum())
        paddings += int((tokens_N == pad).sum())
    expected = 0 if manifest.chat is None else manifest.chat.answer_tokens
    if answer_tokens != expected:
        raise _broken(bin_path, f"marks {answer_tokens} tokens as learned, the manifest says {expected}")
    bounds_N = np.cumsum(index.lengths(), dtype=np.int64)
    data = np.memmap(bin_path, index.dtype, mode="r")
    last = data[bounds_N - 1] if manifest.chat is None else unmark(data[bounds_N - 1])[0]
    if int(bounds_N[-1]) != data.size or bool((last != eos).any()):
        raise _broken(bin_path, f"a document does not end in eos ({eos}); the index belongs to another data set")
    if ends != index.documents or paddings:
        fault = f"holds eos ({eos}) {ends} times in {index.documents} documents, and pad ({pad}) {paddings} times"
        raise _broken(bin_path, f"{fault}, so a text became a control token")


def _broken(path: Path, what: str, fix: str = "build the data again") -> UserError:
    return UserError(f"{path}: {what}; {fix}")


if __name__ == "__main__":
    run_main(main)
