"""Run lm-evaluation-harness on a training checkpoint, at any depth or exit threshold, without an export.

python -m tools.eval_harness --checkpoint runs/quickstart/gate --tasks arc_easy,lambada_openai --depth 2
python -m tools.eval_harness --checkpoint runs/quickstart/gate --tasks mine --include_path my_tasks --exit_threshold 0.5

Scores are those of ``lm_eval --model hf`` on an export of the same weights. A task's data comes from where the task says;
give --include_path a folder with task files of your own to stay on this machine. Texts are scored with a forward pass of
all loops, each token at the loop it leaves; continuations are generated as in ``looplm.generate``.

Shapes: S sequence, B batch, D hidden, V vocabulary, R loops.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from torch import Tensor
from tqdm import tqdm

from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.cli import UserError, parse_config, require, run_main
from looplm.files import write_whole
from looplm.inference.generator import GenerationConfig, Generator
from looplm.inference.kv_cache import CacheMode
from looplm.megatron import process_groups
from looplm.model.exit_gate import exit_log_probs, q_exit

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_GENERATION_KEYS = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """What is measured.

    Args:
        checkpoint: a training directory (its newest checkpoint is taken) or a step directory.
        tasks: names of tasks, groups or tags, separated by commas.
        include_path: folder with task files of your own.
        num_fewshot: worked examples before each question; null for what the task says.
        limit: questions of each task; null for all.
        batch_size: texts side by side.
        depth: run every token this many loops; null for the trained number.
        exit_threshold: a token is read at the first loop by which its exit probability reaches this; null for all loops.
        kv_cache: of generated text: per_loop (exact), or one cache that the loops share: last, mean or first.
        precision: what to compute in, fp32 or bf16.
        output: JSON file for the results.
    """

    checkpoint: str
    tasks: str
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16
    depth: int | None = None
    exit_threshold: float | None = None
    kv_cache: CacheMode = "per_loop"
    precision: Literal["fp32", "bf16"] = "fp32"
    output: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.names), "tasks", self.tasks, "name at least one, such as arc_easy,hellaswag")
        path = self.include_path
        require(path is None or Path(path).is_dir(), "include_path", path, "there is no such folder")
        require(self.num_fewshot is None or self.num_fewshot >= 0, "num_fewshot", self.num_fewshot, "give null or at least 0")  # fmt: skip
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "give null or at least 1")
        if self.output is not None:
            require(Path(self.output).parent.is_dir(), "output", self.output, "its directory does not exist; make it first")  # fmt: skip
            require(not Path(self.output).is_dir(), "output", self.output, "it is a directory; name a file")
        self.generation()

    @property
    def names(self) -> list[str]:
        """Of the tasks."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def generation(self, **settings: Any) -> GenerationConfig:
        """How to continue a text; raises :class:`UserError` where that cannot be."""
        common = {"depth": self.depth, "exit_threshold": self.exit_threshold, "kv_cache": self.kv_cache}
        return GenerationConfig(**{**common, "batch_size": self.batch_size, "top_p": 1.0, **settings})


class HarnessModel(TemplateLM):
    """A checkpoint as lm-evaluation-harness sees a model.

    Args:
        opened: the checkpoint.
        config: depth, threshold, batch.

    Raises:
        UserError: the checkpoint cannot follow ``config``.
    """

    def __init__(self, opened: checkpoint.OpenedModel, config: HarnessConfig) -> None:
        super().__init__()
        self._model, self._about, self._config = opened.model, opened.about, config
        self._tokenizer, self._context = opened.tokenizer, opened.model.model_config.max_sequence_length
        self._generator = Generator(opened.model, opened.tokenizer, opened.about.eos_id, opened.about.gate_trained)
        self._rule = config.generation().exit_rule(opened.model.model_config.num_loops, opened.about.gate_trained)

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return self._about.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context stands after."""
        return self.eot_token_id if self._about.bos_id is None else self._about.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Text to ids."""
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens is not False).ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: each token once, in windows of the model's context."""
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self._context, context_len=1)
            for window in map(make_disjoint_window, rolling):
                windows.append((("", ""), *window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Of continuations after contexts, long texts first; and whether each is the greedy one."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1] + requests[index][2]))
        for start in tqdm(range(0, len(order), self._config.batch_size), unit="batch", disable=disable_tqdm):
            batch = order[start : start + self._config.batch_size]
            texts = [(requests[index][1] + requests[index][2])[-self._context - 1 :] for index in batch]
            ids_BS = torch.zeros(len(batch), max(map(len, texts)) - 1, dtype=torch.int64)
            for row, text in enumerate(texts):
                ids_BS[row, : len(text) - 1] = torch.tensor(text[:-1])
            h_SBD = self._read(ids_BS.to(self._model.head_weight().device))
            for row, (index, text) in enumerate(zip(batch, texts, strict=True)):
                answers[index] = self._score(h_SBD[: len(text) - 1, row], requests[index][2])
        return answers

    def _read(self, ids_BS: Tensor) -> Tensor:
        """Each token's state after the loop it leaves. Padding stands behind the texts, where no token sees it."""
        rule = self._rule
        output = self._model(ids_BS, num_loops=rule.max_depth)
        if not rule.decides:
            return output.hidden[-1]
        depth_SB = q_exit(exit_log_probs(output.gate_logit_RSB), rule.threshold)
        hidden_RSBD = torch.stack(output.hidden)
        index_RSBD = (depth_SB - 1)[None, :, :, None].expand(1, -1, -1, hidden_RSBD.size(-1))
        return hidden_RSBD.gather(0, index_RSBD)[0]

    def _score(self, h_SD: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        logits_SV = F.linear(h_SD[-len(continuation) :], self._model.head_weight()).float()
        target_S = torch.tensor(continuation[-len(h_SD) :], device=logits_SV.device)
        value = -F.cross_entropy(logits_SV, target_S, reduction="sum")
        return float(value), bool((logits_SV.argmax(-1) == target_S).all())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its task's stop strings. Requests of one kind run side by side."""
        texts = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for key, members in kinds.items():
            settings = dict(normalize_gen_kwargs(json.loads(key)))
            unknown = sorted(settings.keys() - _GENERATION_KEYS)
            if unknown:
                raise UserError(f"tasks: generation_kwargs: {unknown[0]}: not supported; the keys are {', '.join(sorted(_GENERATION_KEYS))}")  # fmt: skip
            most = settings["max_gen_toks"]
            if most >= self._context:
                raise UserError(f"tasks: max_gen_toks: {most} is not allowed; the model's context is {self._context} tokens; give less in the task's generation_kwargs")  # fmt: skip
            config = self._config.generation(
                max_new_tokens=most,
                temperature=settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
                top_k=settings.get("top_k", 0),
                top_p=settings.get("top_p", 1.0),
                stop=tuple(stop for stop in settings["until"] if stop),
            )
            prompts = [
                (self.tok_encode(requests[index].args[0]) or [self.prefix_token_id])[most - self._context :]
                for index in members
            ]
            running = self._generator.stream(prompts, config)
            for place, answer in tqdm(running, total=len(members), unit="text", disable=disable_tqdm):
                if answer.error is not None:
                    raise UserError(f"{self._config.checkpoint}: {answer.error}")
                texts[members[place]] = answer.text
        return texts


def main(argv: list[str]) -> None:
    """``python -m tools.eval_harness --checkpoint DIR --tasks NAME,...``"""
    config = parse_config(HarnessConfig, argv, prog="python -m tools.eval_harness", description=str(__doc__))
    found = step_folder.locate(config.checkpoint)
    about, shape = checkpoint.read_about(found), checkpoint.read_model(found)
    config.generation().exit_rule(shape.model.num_loops, about.gate_trained)  # refused before tasks are looked for
    tasks = find_tasks(config)
    groups = process_groups.start(seed=0)
    try:
        model = HarnessModel(checkpoint.open_model(str(found), groups, _DTYPES[config.precision]), config)
        results = simple_evaluate(
            model, tasks=config.names, num_fewshot=config.num_fewshot, limit=config.limit, task_manager=tasks,
            log_samples=False,
        )  # fmt: skip
    finally:
        process_groups.stop()
    print(make_table(results))
    if config.output is not None:
        kept = ("results", "groups", "n-shot", "n-samples", "versions")
        report = {"checkpoint": str(found), "step": about.step, "depth": config.depth or shape.model.num_loops}
        report |= {"exit_threshold": config.exit_threshold, **{key: results[key] for key in kept if key in results}}
        write_whole(Path(config.output), json.dumps(report, indent=1, default=str) + "\n")


def find_tasks(config: HarnessConfig) -> TaskManager:
    """The index of tasks. The harness's own, thousands of files, are only read if yours are not all that is asked for.

    Raises:
        UserError: there is no such task, or its data cannot be had.
    """
    for defaults in (False, True):
        manager = TaskManager(include_path=config.include_path, include_defaults=defaults)
        missing = [name for name in config.names if name not in manager.all_tasks]
        if not missing:
            break
    if missing:
        fix = "`lm_eval ls tasks` lists the harness's own, include_path adds yours"
        raise UserError(f"tasks: {missing[0]}: no such task; {fix}")
    try:
        manager.load(config.names)
    except (OSError, ValueError) as error:  # what a missing file, a hub out of reach or a damaged task comes out as
        raise UserError(f"tasks: {config.tasks}: cannot be loaded: {' '.join(str(error).split())}") from error
    return manager


if __name__ == "__main__":
    run_main(main)
