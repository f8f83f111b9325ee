"""Score a checkpoint and its export on the same tasks, at several depths, and write both models' answers.

    python -m tests.support.harness_worker CHECKPOINT EXPORT TASKS OUTPUT

This runs in its own process, because the harness reads its offline switches when it is imported.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from looplm import checkpoint
from looplm.cli import UserError
from looplm.megatron import process_groups
from tools import eval_harness
from tools.eval_harness import HarnessConfig, HarnessModel, main

SETTINGS: list[dict[str, Any]] = [{}, {"depth": 2}, {"depth": 5}, {"exit_threshold": 0.6}]
THEIR_NAMES = {"depth": "num_loops", "exit_threshold": "early_exit_threshold"}
NAMES = ("tiny_choice", "tiny_rolling", "tiny_text")
MISTAKES = [
    ["--tasks", "tiny_chioce"],
    ["--tasks", "broken"],
    ["--tasks", "tiny_choice", "--depth", "2", "--exit_threshold", "0.5"],
    ["--tasks", "tiny_choice", "--exit_threshold", "2"],
    ["--tasks", "tiny_choice", "--limit", "0"],
    ["--tasks", "tiny_long"],
]


def answers(results: dict[str, Any]) -> dict[str, Any]:
    return {name: [sample["filtered_resps"] for sample in results["samples"][name]] for name in NAMES}


def answers_alike(saved: str, export: str, tasks: TaskManager) -> list[dict[str, Any]]:
    """Return both models' answers for each of SETTINGS."""
    found = []
    opened = checkpoint.open_model(saved, process_groups.start(seed=0))
    common: dict[str, Any] = {"tasks": list(NAMES), "task_manager": tasks, "bootstrap_iters": 0}
    for settings in SETTINGS:
        config = HarnessConfig(checkpoint=saved, tasks=",".join(NAMES), batch_size=3, **settings)
        ours = simple_evaluate(HarnessModel(opened, config), **common)
        extra = "".join(f",{THEIR_NAMES[key]}={value}" for key, value in settings.items())
        arguments = f"pretrained={export},trust_remote_code=True,dtype=float32{extra}"
        theirs = simple_evaluate("hf", arguments, batch_size=2, device="cpu", **common)
        found.append({"ours": answers(ours), "theirs": answers(theirs)})
    process_groups.stop()
    return found


def message_of(arguments: list[str]) -> str:
    try:
        main(arguments)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    saved, export, folder, output = sys.argv[1:]
    tasks = TaskManager(include_path=folder, include_defaults=False)
    eval_harness.TaskManager = lambda **_: (
        tasks
    )  # a wrong name does not make it read the harness's own thousands of files
    common = ["--checkpoint", saved, "--include_path", folder]
    report = str(Path(output).with_name("report.json"))
    main([*common, "--tasks", "tiny_choice,tiny_text", "--output", report])
    found = {"alike": answers_alike(saved, export, tasks), "mistakes": [message_of([*common, *m]) for m in MISTAKES]}
    Path(output).write_text(json.dumps(found))
