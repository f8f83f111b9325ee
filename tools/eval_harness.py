r"""Run lm-evaluation-harness on a training checkpoint, at any depth or exit threshold, without an export.

    python -m tools.eval_harness --checkpoint runs/quickstart/gate --tasks arc_easy,lambada_openai --depth 2
    python -m tools.eval_harness --checkpoint runs/quickstart/gate --tasks mine --include_path my_tasks \
        --exit_threshold 0.5

Scores equal those of ``lm_eval --model hf`` on an export of the same weights. A task's data comes from where the task
says; to stay on this machine, give --include_path a folder with your own task files. Texts are scored with a forward
pass of all loops, each token at the loop where it exits. Continuations are generated as in ``looplm.generate``.

Shapes: S sequence, B batch, D hidden, V vocabulary, R loops.
"""

import json
import sys
from collections.abc import Mapping, Sequence
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
from looplm.bounds import at_least, check_bounds, path_field, positive, require, require_file_place
from looplm.checkpoint import step_folder
from looplm.cli import parse_config, run_main
from looplm.config import ModelConfig
from looplm.encoding import encode
from looplm.failures import UserError
from looplm.files import write_whole
from looplm.inference import GenerationConfig, Generator
from looplm.inference.kv_cache import CacheMode
from looplm.inference.scheduler import NOT_FINITE
from looplm.megatron import process_groups
from looplm.megatron.settings import DTYPES
from looplm.model.exit_gate import exit_log_probs, q_exit

_GENERATION_KEYS = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """Checkpoint, tasks, and how the model is run.

    Args:
        checkpoint: a training directory (its newest checkpoint is used) or a step directory.
        tasks: names of tasks, groups or tags, separated by commas.
        include_path: folder with your own task files.
        num_fewshot: worked examples before each question; null for the task's own number.
        limit: questions of each task; null for all.
        batch_size: texts side by side.
        depth: number of loops for every token; null for the trained number.
        exit_threshold: a token exits at the first loop by which its summed exit probability reaches this; null: all.
        kv_cache: cache for generated text: per_loop (exact), or one that the loops share: last, mean or first.
        add_bos: begin each text with the token for that (BOS), unless it starts with it; null does so if the model's
            texts began so in training, or if an imported model's tokenizer does.
        precision: fp32 or bf16.
        output: JSON file for the results.
    """

    checkpoint: str = path_field()
    tasks: str
    include_path: str | None = path_field(None)
    num_fewshot: int | None = at_least(0, None)
    limit: int | None = positive(None)
    batch_size: int = 16
    depth: int | None = None
    exit_threshold: float | None = None
    kv_cache: CacheMode = "per_loop"
    add_bos: bool | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    output: str | None = path_field(None)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        require(bool(self.names), "tasks", self.tasks, "name at least one, such as arc_easy,hellaswag")
        path = self.include_path
        require(path is None or Path(path).is_dir(), "include_path", path, "there is no such folder")
        require_file_place(self.output, "output")
        self.generation()

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def generation(self, **settings: Any) -> GenerationConfig:
        """Return the settings of generation, or raise a :class:`UserError` if they contradict each other."""
        common = {"depth": self.depth, "exit_threshold": self.exit_threshold, "kv_cache": self.kv_cache}
        return GenerationConfig(**{**common, "batch_size": self.batch_size, "top_p": 1.0, **settings})


class HarnessModel(TemplateLM):
    """Adapter of a checkpoint to lm-evaluation-harness.

    Args:
        opened: the checkpoint.
        config: depth, exit threshold and batch size.

    Raises:
        UserError: ``config`` does not fit the checkpoint.
    """

    def __init__(self, opened: checkpoint.OpenedModel, config: HarnessConfig) -> None:
        super().__init__()
        self._model, self._about, self._config = opened.model, opened.about, config
        self._tokenizer, self._context = opened.tokenizer, opened.model.model_config.max_sequence_length
        self._generator = Generator.of(opened, config.add_bos)
        self._rule = config.generation().exit_rule(opened.model.model_config, opened.about.gate_trained)

    @property
    def eot_token_id(self) -> int:
        """Id of the end of text."""
        return self._about.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without context."""
        begin = self._about.bos_id if self._generator.begin_id is None else self._generator.begin_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, which begins with BOS if texts of this model do."""
        return encode(self._tokenizer, string, None if add_special_tokens is False else self._generator.begin_id)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihoods of continuations of contexts."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            pair = self._encode_pair(context, continuation)
            where = f"tasks: the continuation {continuation!r} of {context[-40:]!r}"
            if not pair[1]:
                raise UserError(f"{where} has no tokens to score; remove the item from the task")
            if len(pair[1]) > self._context:
                size = f"has {len(pair[1])} tokens, more than the model's context of {self._context}"
                raise UserError(f"{where} {size}; remove the item from the task")
            pairs.append(((context, continuation), *pair))
        self._tell_truncation(sum(len(context) + len(answer) > self._context + 1 for _, context, answer in pairs))
        return self._loglikelihood_tokens(pairs, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of context and continuation, split as lm-evaluation-harness does.

        It fails on a continuation that melts into the context's last token ("sel" and "f"). Here that is encoded by
        itself, after the same context as the item's other continuations.
        """
        if context == "":
            ids = self.tok_encode(continuation, add_special_tokens=False)
            starts_itself = len(ids) > 1 and ids[0] == self.prefix_token_id
            return (ids[:1], ids[1:]) if starts_itself else ([self.prefix_token_id], ids)
        pair = super()._encode_pair(context, continuation)
        if not pair[1]:
            pair = pair[0], self.tok_encode(continuation, add_special_tokens=False)
        return pair[0] or [self.prefix_token_id], pair[1]

    def _tell_truncation(self, count: int) -> None:
        if count:
            text = f"note: {count} contexts exceed the model's {self._context} tokens; their beginnings are cut off"
            print(text, file=sys.stderr)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, scored in disjoint windows of the model's context.

        A token that begins every text is the context of the first one and is not scored. lm-evaluation-harness 0.4.13
        puts it in twice and scores it.
        """
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            ids = ids if self._generator.begin_id is None else ids[1:]
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
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihoods of continuations, each with True if it is the greedy one; long texts run first."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1] + requests[index][2]))
        for start in tqdm(range(0, len(order), self._config.batch_size), unit="batch", disable=disable_tqdm):
            batch = order[start : start + self._config.batch_size]
            texts = [(requests[index][1] + requests[index][2])[-self._context - 1 :] for index in batch]
            ids_BS = torch.zeros(len(batch), max(map(len, texts)) - 1, dtype=torch.int64)
            for row, text in enumerate(texts):
                ids_BS[row, : len(text) - 1] = torch.tensor(text[:-1])
            h_SBD = self._exit_states(ids_BS.to(self._model.head_weight().device))
            for row, (index, text) in enumerate(zip(batch, texts, strict=True)):
                answers[index] = self._score(h_SBD[: len(text) - 1, row], requests[index][2])
        return answers

    def _exit_states(self, ids_BS: Tensor) -> Tensor:
        """Return each token's state after its exit loop. Padding follows the texts, where no token sees it."""
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
        if not logits_SV.amax(-1).isfinite().all():  # the likeliest id of NaNs is 0, and so is the best choice
            raise UserError(f"{self._config.checkpoint}: {NOT_FINITE}")
        target_S = torch.tensor(continuation[-len(h_SD) :], device=logits_SV.device)
        value = -F.cross_entropy(logits_SV, target_S, reduction="sum")
        return float(value), bool((logits_SV.argmax(-1) == target_S).all())

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return continuations up to a task's stop strings. Requests with the same settings run side by side."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        for key, members in groups.items():
            config = generation_of(self._config, json.loads(key), self._context)
            most = config.max_new_tokens
            prompts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in members]
            self._tell_truncation(sum(len(prompt) > self._context - most for prompt in prompts))
            prompts = [prompt[most - self._context :] for prompt in prompts]
            answers = self._generator.stream(prompts, config)
            for number, answer in tqdm(answers, total=len(members), unit="text", disable=disable_tqdm):
                if answer.error is not None:
                    raise UserError(f"{self._config.checkpoint}: {answer.error}")
                texts[members[number]] = answer.text
        return texts


def main(argv: list[str]) -> None:
    """``python -m tools.eval_harness --checkpoint DIR --tasks NAME,...``"""
    config = parse_config(HarnessConfig, argv, prog="python -m tools.eval_harness", description=str(__doc__))
    found = step_folder.locate(config.checkpoint)
    about, shape = checkpoint.read_about(found), checkpoint.read_model(found)
    config.generation().exit_rule(shape.model, about.gate_trained)  # raises before the slow search for tasks
    tasks = find_tasks(config, shape.model)
    groups = process_groups.start(seed=0)
    try:
        model = HarnessModel(checkpoint.open_step(found, groups, DTYPES[config.precision]), config)
        settings = {"num_fewshot": config.num_fewshot, "limit": config.limit, "log_samples": False}
        results = simple_evaluate(model, tasks=config.names, task_manager=tasks, **settings)
    finally:
        process_groups.stop()
    print(make_table(results))
    if config.output is not None:
        kept = ("results", "groups", "n-shot", "n-samples", "versions")
        report = {"checkpoint": str(found), "step": about.step, "depth": config.depth or shape.model.num_loops}
        report |= {"exit_threshold": config.exit_threshold, **{key: results[key] for key in kept if key in results}}
        write_whole(Path(config.output), json.dumps(report, indent=1, default=str) + "\n")


def generation_of(config: HarnessConfig, kwargs: Mapping[str, Any], context: int) -> GenerationConfig:
    """Return a task's settings of generation.

    Args:
        config: depth, exit threshold, cache and batch size.
        kwargs: the task's generation_kwargs.
        context: most tokens of a text.

    Raises:
        UserError: a key is not supported, or the answer alone would fill the context.
    """
    settings = dict(normalize_gen_kwargs(dict(kwargs)))
    unknown = sorted(settings.keys() - _GENERATION_KEYS)
    if unknown:
        keys = ", ".join(sorted(_GENERATION_KEYS))
        raise UserError(f"tasks: generation_kwargs: {unknown[0]}: not supported; the keys are {keys}")
    most = settings["max_gen_toks"]
    fix = f"give fewer than the model's context of {context} tokens in the task's generation_kwargs"
    require(most < context, "tasks: max_gen_toks", most, fix)
    temperature = settings.get("temperature", 1.0) if settings["do_sample"] else 0.0
    limits = {key: settings[key] for key in ("top_k", "top_p") if key in settings and temperature > 0}
    return config.generation(
        max_new_tokens=most,
        temperature=temperature,
        **limits,
        stop=tuple(stop for stop in settings["until"] if stop),
    )


def find_tasks(config: HarnessConfig, model: ModelConfig) -> TaskManager:
    """Return the index of tasks. The harness's own, thousands of files, are only read if a task is not among yours.

    Args:
        config: names of the tasks, your own folder, and worked examples.
        model: the checkpoint's; answers of a task that generates must be shorter than its context.

    Raises:
        UserError: there is no such task, its data cannot be loaded, it has too few documents for worked examples, or it
            generates in a way that is not supported.
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
        tasks = manager.load(config.names)["tasks"]
    except (OSError, ValueError) as error:  # a missing file, an unreachable hub or a damaged task
        raise UserError(f"tasks: {config.tasks}: cannot be loaded: {' '.join(str(error).split())}") from error
    for name, task in tasks.items():  # all kinds of requests before the first is made: scoring would be lost
        if task.OUTPUT_TYPE == "generate_until":
            generation_of(config, task.config.generation_kwargs or {}, model.max_sequence_length)
        own = task.config.num_fewshot
        shots = own if config.num_fewshot is None or own == 0 else config.num_fewshot  # as the harness takes them
        if shots:
            asked_too = task.fewshot_cfg.split == task.config.test_split  # a question is no example for itself
            most = len(task.sampler.df) - asked_too
            fix = f"give at most {most}, as {name} has no more documents for them"
            require(shots <= most, "num_fewshot", shots, fix)
    return manager


if __name__ == "__main__":
    run_main(main)
