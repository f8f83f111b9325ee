"""Texts in, continuations out.

In a notebook::

    from looplm.inference import GenerationConfig, Generator, Request

    generator = Generator.open("runs/quickstart/gate")
    for answer in generator.generate(["def f(", "class "]):
        print(answer.prompt + answer.text, answer.depths)         # the depth of a token: how many loops it ran

    # one cache for all loops, and easy tokens exit early
    cheap = GenerationConfig(temperature=0.0, kv_cache="last", exit_threshold=0.5, max_new_tokens=64)
    (answer,) = generator.generate(["def f("], cheap)

    # a text as it grows
    generator.generate(["def f("], cheap, on_token=lambda index, token: print(token.text, end="", flush=True))

    # any number of requests, 16 at a time, each as soon as it finishes; a request may have its own seed and length
    queue = (Request(prompt, seed=7, max_new_tokens=20) for prompt in prompts)
    for index, answer in generator.stream(queue, cheap):
        print(index, answer.finish, answer.text)

    # two loops draft four tokens at a time, all loops check them: the same text, in fewer passes
    (answer,) = generator.generate(["def f("], GenerationConfig(temperature=0.0, speculate=4, draft_depth=2))
    print(answer.accepted / answer.drafted)
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace

import torch
from tokenizers import Tokenizer

from looplm.bounds import require
from looplm.checkpoint import About, OpenedModel, open_model
from looplm.inference.request import ActiveRequest, Generation, Request
from looplm.inference.scheduler import OnToken, Scheduler
from looplm.inference.settings import GenerationConfig
from looplm.megatron import process_groups
from looplm.model import LoopLM

Prompt = str | Sequence[int] | Request


class Generator:
    """Continues texts with a model.

    Args:
        model: in eval mode.
        tokenizer: the one that the model was trained with.
        eos_ids: the id that ends a text, or several.
        gate_trained: whether the exit gate may decide when a token exits.
        begin_id: the id to put before a prompt that is a text; None for none.
    """

    def __init__(
        self,
        model: LoopLM,
        tokenizer: Tokenizer,
        eos_ids: int | Iterable[int],
        gate_trained: bool = True,
        begin_id: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.gate_trained, self.begin_id = model, tokenizer, gate_trained, begin_id
        self.eos_ids = frozenset([eos_ids] if isinstance(eos_ids, int) else eos_ids)

    @classmethod
    def open(cls, directory: str, dtype: torch.dtype = torch.float32) -> "Generator":
        """Open a checkpoint: a step directory, or a training directory, of which the newest step is taken.

        Raises:
            UserError: no checkpoint is there, or it is damaged.
        """
        return cls.of(open_model(directory, process_groups.start(seed=0), dtype))

    @classmethod
    def of(cls, opened: OpenedModel, add_bos: bool | None = None) -> "Generator":
        """Return the generator of an opened checkpoint.

        Args:
            opened: from :func:`looplm.checkpoint.open_model`.
            add_bos: put the token that begins a text before each prompt; None does as the checkpoint was made.

        Raises:
            UserError: the token is asked for, and the checkpoint has none.
        """
        about = opened.about
        return cls(opened.model, opened.tokenizer, about.eos_ids, about.gate_trained, chosen_begin_id(about, add_bos))

    def generate(
        self, prompts: Iterable[Prompt], config: GenerationConfig | None = None, on_token: OnToken | None = None
    ) -> list[Generation]:
        """Continue all prompts. A prompt that cannot be continued yields an error; the others are not affected.

        Args:
            prompts: texts, lists of token ids, or :class:`Request` objects with their own seed and length.
            config: the settings that all of them share.
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
        """Continue prompts as :meth:`generate` does, and yield (index, continuation) as soon as each finishes.

        ``prompts`` is read only as there is room for the next one, so it may be endless.
        """
        require(not isinstance(prompts, str), "prompts", prompts, "give a list of prompts")
        settings, model_config = config or GenerationConfig(), self.model.model_config
        rule = settings.exit_rule(model_config, self.gate_trained)
        finished = list[ActiveRequest]()

        def valid_requests() -> Iterator[ActiveRequest]:
            for index, prompt in enumerate(prompts):
                require(not isinstance(prompt, int), "prompts", prompt, "give a list of prompts, each a text or ids")
                request = prompt if isinstance(prompt, Request) else Request(prompt)
                active = ActiveRequest(
                    request, index, settings, self.tokenizer, model_config, self.eos_ids, self.begin_id
                )
                if active.finish is None:
                    yield active
                else:
                    finished.append(active)

        if isinstance(prompts, Sized):
            settings = replace(settings, batch_size=min(settings.batch_size, max(1, len(prompts))))
        scheduler = Scheduler(self.model, rule, settings, valid_requests(), on_token or (lambda index, token: None))
        while finished or not scheduler.done:
            yield from ((active.index, active.generation()) for active in finished)
            finished.clear()
            if not scheduler.done:
                finished.extend(scheduler.step())


def chosen_begin_id(about: About, add_bos: bool | None) -> int | None:
    """Return the id to put before texts, for None the checkpoint's own; raise if ``add_bos`` asks for an unknown id."""
    if add_bos is None:
        return about.begin_id
    known = about.bos_id if about.begin_id is None else about.begin_id
    fix = "the checkpoint knows no token that begins a text; leave it out"
    require(not add_bos or known is not None, "add_bos", add_bos, fix)
    return known if add_bos else None
