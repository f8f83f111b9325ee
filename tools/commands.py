"""Console commands such as ``looplm-train``: each one is ``python -m`` of a module, under a name of its own (setup.py).

The module is run, not imported, so that a command loads nothing that another one needs.
"""

from runpy import run_module


def _run(module: str) -> None:
    run_module(module, run_name="__main__", alter_sys=True)


def tokenize() -> None:
    """Run ``python -m data_pipeline.tokenize``."""
    _run("data_pipeline.tokenize")


def train() -> None:
    """Run ``python -m pretrain.train``."""
    _run("pretrain.train")


def evaluate() -> None:
    """Run ``python -m pretrain.evaluate``."""
    _run("pretrain.evaluate")


def generate() -> None:
    """Run ``python -m looplm.generate``."""
    _run("looplm.generate")


def convert() -> None:
    """Run ``python -m tools.convert_hf``."""
    _run("tools.convert_hf")


def plan() -> None:
    """Run ``python -m tools.plan``."""
    _run("tools.plan")
