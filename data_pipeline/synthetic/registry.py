"""The task that a configuration names."""

import dataclasses
import hashlib
import json

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from data_pipeline.synthetic.capo import Capo
from data_pipeline.synthetic.causal_loops import CausalLoops
from data_pipeline.synthetic.depo import Depo
from data_pipeline.synthetic.mano import Mano
from data_pipeline.synthetic.multi_hop import MultiHop
from data_pipeline.synthetic.p_hop import PHop
from data_pipeline.synthetic.reachability import Reachability
from data_pipeline.synthetic.sums import Sums
from data_pipeline.synthetic.task import Task
from data_pipeline.synthetic.word_problem import WordProblem
from looplm.config import TaskConfig

VERSION = 1  # raise it when a generator changes what it returns: a run then does not resume in other data

TASKS = {
    "word_problem": WordProblem,
    "p_hop": PHop,
    "depo": Depo,
    "mano": Mano,
    "capo": Capo,
    "multi_hop": MultiHop,
    "causal_loops": CausalLoops,
    "reachability": Reachability,
    "sums": Sums,
}


def open_task(config: TaskConfig) -> Task:
    """Return the generator of the task."""
    task: Task = TASKS[config.name](getattr(config, config.name))
    return task


def fingerprint_of(config: TaskConfig) -> str:
    """Return a hash of everything that decides a task's samples, but for seed and length."""
    parts = VERSION, config.name, dataclasses.asdict(getattr(config, config.name))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_of(task: Task) -> str:
    """Return a tokenizer.json whose words are the task's symbols, so that a checkpoint is complete."""
    words = {symbol: index for index, symbol in enumerate(task.symbols)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=task.symbols[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer.to_str()
