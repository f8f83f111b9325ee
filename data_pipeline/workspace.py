"""The output folder, complete or absent: built in OUTPUT_DIR.partial and renamed when it is finished.

The ``data_pipeline.json`` of both records settings and input files, so that a second run knows what there is to do.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline.config import CHAT_TEMPLATE, TOKENIZER, PipelineConfig
from data_pipeline.local_executor import FINISHED, TASKS, StepFailed
from data_pipeline.slurm import JOB, unfinished_job
from data_pipeline.sources import common_folder
from data_pipeline.text_encoder import template_files
from looplm.cli import to_dict
from looplm.failures import UserError
from looplm.files import fsync, write_whole
from looplm.lock import FILE, FolderLock

_IDENTITY = "data_pipeline.json"
_PATIENCE = 60.0  # seconds for the tasks of a killed run to notice that it has ended
_WITHOUT_EFFECT = ("output_dir", "replace", "verbose")  # settings that do not change the result


def identity_of(config: PipelineConfig, files: dict[str, list[Path]]) -> dict[str, Any]:
    """Return everything on which the result depends: settings, and name, size and time of every input file."""
    identity = {key: value for key, value in to_dict(config).items() if key not in _WITHOUT_EFFECT}
    identity["executor"] = {"tasks": config.executor.tasks}
    identity["inputs"] = {name: _listing_hash(paths) for name, paths in _inputs(config, files).items()}
    return identity


def stamps_of(config: PipelineConfig, files: dict[str, list[Path]]) -> dict[Path, tuple[int, int]]:
    """Return size and time of every input file."""
    paths = chain.from_iterable(_inputs(config, files).values())
    return {path: (status.st_size, status.st_mtime_ns) for path in paths for status in (path.stat(),)}


def require_unchanged(before: dict[Path, tuple[int, int]], after: dict[Path, tuple[int, int]]) -> None:
    """Raise a :class:`UserError` that names the first input file that was changed, added or removed."""
    for path, _ in sorted(before.items() ^ after.items()):
        how = "is gone" if path not in after else "has changed" if path in before else "is new"
        fix = "run again with --replace true when nothing writes there any more"
        raise UserError(f"{path}: {how} since this build began; {fix}")


def _inputs(config: PipelineConfig, files: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Return the files of every source, and those of an existing tokenizer."""
    if config.tokenizer.path is None:
        return files
    found = template_files(config.tokenizer)
    return files | {TOKENIZER: [Path(config.tokenizer.path)]} | ({CHAT_TEMPLATE: found} if found else {})


def identity_hash(identity: dict[str, Any]) -> str:
    """Return the SHA-256 of the identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def is_finished(output: Path, identity: dict[str, Any], replace: bool) -> bool:
    """Return True if ``output`` already holds what ``identity`` describes.

    Raises:
        UserError: it holds something else that may not be replaced.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    found = _read_identity(output)
    if found is None:
        raise UserError(f"output_dir: {output} holds files that this command did not write; choose another folder")
    changed = ", ".join(_differences(found, identity))  # a setting that is new since, and null, is no difference
    if not changed:
        return True
    if not replace:
        fix = "add --replace true or choose another folder"
        raise UserError(f"output_dir: {output} was made with other settings ({changed}); {fix}")
    print(f"{os.path.relpath(output)}: was made with other settings ({changed}); rebuilding it")
    return False


@contextmanager
def workspace(output: Path, identity: dict[str, Any], replace: bool) -> Iterator[Path]:
    """Yield a folder to work in, whose subfolder ``final`` becomes ``output`` if the block succeeds.

    Otherwise the folder stays, and the next run continues in it with every step whose settings and input files are the
    same.

    Raises:
        UserError: finished steps of other settings would be lost, and may not be replaced.
    """
    work = output.with_name(f"{output.name}.partial")
    lock = FolderLock(work, str(output), print)
    lock.acquire()
    try:
        _wait_for_tasks(work)
        if (found := _read_identity(work)) is None:
            _clear(work)
        elif changed := ", ".join(_differences(found, identity)):
            _keep_same(work, found, identity, changed, replace)
        write_whole(work / _IDENTITY, json.dumps(identity, indent=2) + "\n")
        (work / "final").mkdir(exist_ok=True)
        yield work
        shutil.copy(work / _IDENTITY, work / "final")
        _publish(work / "final", output)
        _clear(work)
        shutil.rmtree(work)
    finally:
        lock.release()


def _wait_for_tasks(work: Path) -> None:
    """Wait until no task of a killed run writes to the folder. They end themselves as soon as they notice."""
    end = time.monotonic() + _PATIENCE
    with (work / TASKS).open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    fix = "end them and run again"
                    raise StepFailed(f"output_dir: tasks of a killed run still write to {work}; {fix}") from None
                time.sleep(0.1)


def _clear(work: Path) -> None:
    """Remove everything but the locks, the identity first: a killed removal must not look like work to continue."""
    (work / _IDENTITY).unlink(missing_ok=True)
    _remove(child for child in work.iterdir() if child.name not in (FILE, TASKS))


def _keep_same(work: Path, old: dict[str, Any], new: dict[str, Any], changed: str, replace: bool) -> None:
    """Remove what the steps wrote that do not depend on the same settings and input files any more."""
    same, logs = re.compile(_same_steps(old, new)), sorted((work / "final" / "logs").glob("*"))
    outdated = [log for log in logs if not same.fullmatch(log.name)]
    lost = ", ".join(log.name for log in outdated if (log / FINISHED).exists())
    where = os.path.relpath(work)
    if lost and not replace:
        fix = "restore them, add --replace true or choose another folder"
        raise UserError(f"output_dir: {where} holds finished steps ({lost}) of other settings ({changed}); {fix}")
    for log in outdated:
        if (job := unfinished_job(log)) is not None:
            fix = f"end it by scancel, or remove {log / JOB} if it has ended, and run again"
            raise UserError(f"output_dir: Slurm job {job} still writes {log.name} of other settings ({changed}); {fix}")
    kept = ", ".join(log.name for log in logs if log not in outdated) or "nothing"
    print(f"{where}: was begun with other settings ({changed}); keeping {kept}")
    for log in outdated:  # whole and first: a step is repeated if its log is missing, so a killed removal does no harm
        os.rename(log, tempfile.mkdtemp(dir=work))
    read = {f"read-{folder.name}": folder for folder in (work / "documents").glob("*")}
    _remove(folder for step, folder in read.items() if not same.fullmatch(step))
    others = (FILE, TASKS, _IDENTITY, "documents", "final")
    _remove(child for child in work.iterdir() if child.name not in others and not same.fullmatch(child.name))
    _remove(child for child in (work / "final").glob("*") if child.name != "logs")


def _same_steps(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return a pattern of the steps, and of the folders other than documents, that both identities describe alike."""
    before, after = _reading(old), _reading(new)
    same = [f"read-{re.escape(name)}" for name in after if not _differences(before.get(name, {}), after[name])]
    if len(same) == len(after) and list(before) == list(after) and not _differences(old["dedup"], new["dedup"]):
        same.append("(exact|minhash).*")
        if all(old[key] == new[key] for key in ("seed", "validation_fraction")):
            same.append("split")
    return "|".join(same)


def _reading(identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return everything on which the reading of each source depends."""
    inputs, executor = identity["inputs"], identity["executor"]
    return {
        source["name"]: {"source": source, "inputs": inputs[source["name"]], "executor": executor}
        for source in identity["sources"]
    }


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _publish(final: Path, output: Path) -> None:
    for path in [*final.rglob("*"), final]:
        fsync(path)
    old = output.with_name(f"{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed in these lines
    if output.exists():
        os.rename(output, old)
    os.rename(final, output)
    fsync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _read_identity(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / _IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _listing_hash(paths: list[Path]) -> str:
    digest, folder = hashlib.sha256(), common_folder(paths)
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(folder)}\n{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    before, after = dict(_flat(old)), dict(_flat(new))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [key if key.startswith("inputs.") else f"{key} {before.get(key)} -> {after.get(key)}" for key in changed]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts and lists with their dotted keys."""
    value = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from _flat(inner, f"{key}.{name}" if key else str(name))
