"""Texts in, continuations out.

In a notebook::

    from looplm.inference.generator import GenerationConfig, Generator, Request

    generator = Generator.open("runs/quickstart/gate")
    for answer in generator.generate(["def f(", "class "]):
        print(answer.prompt + answer.text, answer.depths)         # the depth of a token: how many loops it ran

    # one cache for all loops, and easy tokens leave them early
    cheap = GenerationConfig(temperature=0.0, kv_cache="last", exit_threshold=0.5, max_new_tokens=64)
    (answer,) = generator.generate(["def f("], cheap)

    # a text as it grows
    generator.generate(["def f("], cheap, on_token=lambda index, token: print(token.text, end="", flush=True))

    # any number of requests, 16 at a time, each as soon as it ends; seed and length are the request's own
    queue = (Request(prompt, seed=7, max_new_tokens=20) for prompt in prompts)
    for index, answer in generator.stream(queue, cheap):
        print(index, answer.finish, answer.text)

    # two loops draft four tokens at a time, all loops check them: the same text, in fewer passes
    (answer,) = generator.generate(["def f("], GenerationConfig(temperature=0.0, speculate=4, draft_depth=2))
    print(answer.accepted / answer.drafted)
"""

from collections.abc import Iterable, Iterator, Sequence, Sized

import torch
from tokenizers import Tokenizer

from looplm.checkpoint import open_model
from looplm.inference.early_exit import ExitRule
from looplm.inference.request import Generation, Request, Running
from looplm.inference.scheduler import OnToken, Scheduler
from looplm.inference.settings import GenerationConfig
from looplm.megatron import process_groups
from looplm.model import LoopLM

__all__ = ["Generation", "GenerationConfig", "Generator", "Request"]

Prompt = str | Sequence[int] | Request


class Generator:
    """Continues texts with a model.

    Args:
        model: in eval mode.
        tokenizer: that it was trained with.
        eos_id: end of text.
        gate_trained: whether the gate may be asked when a token leaves.
    """

    def __init__(self, model: LoopLM, tokenizer: Tokenizer, eos_id: int, gate_trained: bool = True) -> None:
        self.model, self.tokenizer, self.eos_id, self.gate_trained = model, tokenizer, eos_id, gate_trained

    @classmethod
    def open(cls, directory: str, dtype: torch.dtype = torch.float32) -> "Generator":
        """Of a checkpoint: a training directory (its newest is taken) or a step directory.

        Raises:
            UserError: there is none, or it is damaged.
        """
        opened = open_model(directory, process_groups.start(seed=0), dtype)
        return cls(opened.model, opened.tokenizer, opened.about.eos_id, opened.about.gate_trained)

    def generate(
        self, prompts: Iterable[Prompt], config: GenerationConfig | None = None, on_token: OnToken | None = None
    ) -> list[Generation]:
        """Continue all prompts. One that cannot be continued yields an error, the others go on.

        Args:
            prompts: texts, lists of token ids, or :class:`Request` objects with a seed and length of their own.
            config: what all of them share.
            on_token: called with (index of the prompt, token) as soon as a token's text is final.

        Returns:
            the continuations, in the order of the prompts.

        Raises:
            UserError: the model cannot follow ``config``.
        """
        return [
            generation for _, generation in sorted(self.stream(prompts, config, on_token), key=lambda pair: pair[0])
        ]

    def stream(
        self, prompts: Iterable[Prompt], config: GenerationConfig | None = None, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """As :meth:`generate`, but each as soon as it ends, with its index. ``prompts`` is read on only as there is room
        for the next one, so it may be endless."""
        config = config or GenerationConfig()
        rule = config.exit_rule(self.model.model_config.num_loops, self.gate_trained)
        return self._stream(prompts, config, rule, on_token or (lambda index, token: None))

    def _stream(
        self, prompts: Iterable[Prompt], config: GenerationConfig, rule: ExitRule, on_token: OnToken
    ) -> Iterator[tuple[int, Generation]]:
        trained, ended = self.model.model_config.num_loops, list[Running]()

        def sound() -> Iterator[Running]:
            """Requests that can be run; what is wrong with another is its own error, not the batch's."""
            for index, prompt in enumerate(prompts):
                running = self._open(prompt, index, config)
                if running.finish is None:
                    yield running
                else:
                    ended.append(running)

        rows = min(config.batch_size, max(1, len(prompts))) if isinstance(prompts, Sized) else config.batch_size
        scheduler = Scheduler(self.model, rule, config, rows, sound(), on_token)
        while ended or not scheduler.done:
            yield from ((running.index, running.generation(trained)) for running in ended)
            ended.clear()
            if not scheduler.done:
                ended.extend(scheduler.step())

    def _open(self, prompt: Prompt, index: int, config: GenerationConfig) -> Running:
        request, shape = prompt if isinstance(prompt, Request) else Request(prompt), self.model.model_config
        return Running(request, index, config, self.tokenizer, shape.vocab_size, shape.max_sequence_length, self.eos_id)
