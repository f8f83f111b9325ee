"""Causal loops: values of variables under rules that are applied in sequence, also in loops and nested loops.

There are four kinds of program, after the task of ZeroModel: 1 a chain (B = A + 2, C = B * 2, ...); 2 a loop (from A to
B to C and back, A = C mod 5), repeated until a pass changes nothing or its limit is reached; 3 converging paths, which
meet in rules with two variables; 4 a loop inside a loop, whose variables act on each other. Rules apply one after
another, so their order matters; values are modulo a prime; the number of variables and the number of rules are drawn
independently. An item is a program: start values, rules, limits and names.

A program is written as ``A 5 B 17`` (start values), then rules ``B A + 2`` (B = A + 2), those of a loop between
``loop 3`` (at most three passes) and ``end``, then ``?`` and all variables. Labels: at the end of each rule, the value
that its first application gives to its target; at each variable after ``?``, its value when the program has ended.
"""

import numpy as np

from data_pipeline.synthetic.causal_programs import LOOP, NESTED, OPERATIONS, Programs, random_programs, run
from data_pipeline.synthetic.packing import Items, pack
from data_pipeline.synthetic.task import END, NO_LEVEL, Examples, Ints, Split, Task, draw, require_length
from looplm.config import CausalLoopsConfig

KIND_STEP = 100  # level = KIND_STEP * kind + reasoning steps
_LOOP, _END_LOOP, _ASK, _FIRST_OPERATION = 1, 2, 3, 4
_FIRST_NAME = _FIRST_OPERATION + len(OPERATIONS)
_LOOPS = {LOOP: 1, NESTED: 2}  # by kind
_RULE_SLOTS = 5  # tokens of a rule, and one for the end of a loop


class CausalLoops(Task):
    """Programs of the ``kinds``.

    Level 100 k + s is a value of kind k after s reasoning steps: the longest chain of rules, as they were run, from a
    start value to it. A test out of distribution has more rules, passes or variables (up to ``names``), or other kinds.
    """

    level_name = "100 kind + steps"

    def __init__(self, config: CausalLoopsConfig) -> None:
        self._config = config
        names = (f"n{name}" for name in range(config.names))
        numbers = (str(number) for number in range(config.prime))
        self.symbols = (END, "loop", "end", "?", *OPERATIONS, *names, *numbers)
        loops = max(_LOOPS.get(kind, 0) for kind in config.kinds)
        self._longest = 3 * config.max_variables + 4 * config.max_rules + 3 * loops + 1  # tokens of a program

    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return as many programs a sample as fit."""
        require_length("causal_loops", length, self._longest)

        def make(number: int) -> Items:
            return self._labeled(random, draw(lambda tries: self._items(random, tries), number, split))

        return pack(make, count, length)

    def _items(self, random: np.random.Generator, number: int) -> Ints:
        """Return random programs as rows of numbers, with the name of each variable in front."""
        programs = random_programs(self._config, random, number)
        order_MV = np.argsort(random.random((number, self._config.names)), axis=1)
        name_MV = order_MV[:, : self._config.max_variables]
        name_MV[np.arange(self._config.max_variables) >= programs.variables_M[:, None]] = 0
        return np.concatenate([name_MV, *(x if x.ndim == 2 else x[:, None] for x in programs)], axis=1)

    def _programs(self, item_MI: Ints) -> tuple[Ints, Programs]:
        variables, rules = self._config.max_variables, self._config.max_rules
        widths = (variables, *[1] * 6, variables, *[rules] * 5)
        name_MV, *parts = np.split(item_MI, np.cumsum(widths)[:-1], axis=1)
        return name_MV, Programs(*(x[:, 0] if index < 6 else x for index, x in enumerate(parts)))

    def _labeled(self, random: np.random.Generator, item_MI: Ints) -> Items:
        """Return the programs as text with labels.

        Every part has its place in a wide row, from which the empty places are then removed.
        """
        variables, rules, number = self._config.max_variables, self._config.max_rules, len(item_MI)
        first_number = _FIRST_NAME + self._config.names
        name_MV, programs = self._programs(item_MI)
        results = run(programs, self._config.prime)
        name_MV = name_MV + _FIRST_NAME
        row_M1, kind_M = np.arange(number)[:, None], programs.kind_M
        loops_M, nests_M = (kind_M == LOOP) | (kind_M == NESTED), kind_M == NESTED
        is_there_MV = np.arange(variables) < programs.variables_M[:, None]
        is_there_MR = np.arange(rules) < programs.rules_M[:, None]

        start_MV2 = np.stack([name_MV, programs.start_MV + first_number], axis=2) * is_there_MV[:, :, None]
        limits_M4 = np.zeros((number, 4), np.int64)
        limits_M4[nests_M, :2] = _LOOP, 0
        limits_M4[loops_M, 2] = _LOOP
        limits_M4[:, 1] = np.where(nests_M, programs.outer_limit_M + first_number, 0)
        limits_M4[:, 3] = np.where(loops_M, programs.inner_limit_M + first_number, 0)

        constant_MR = programs.operand_MR + first_number
        operand_variable_MR = name_MV[row_M1, np.where(programs.is_variable_MR > 0, programs.operand_MR, 0)]
        rule_MR5 = np.zeros((number, rules, _RULE_SLOTS), np.int64)
        rule_MR5[:, :, 0] = name_MV[row_M1, programs.target_MR]
        rule_MR5[:, :, 1] = name_MV[row_M1, programs.source_MR]
        rule_MR5[:, :, 2] = programs.operation_MR + _FIRST_OPERATION
        rule_MR5[:, :, 3] = np.where(programs.is_variable_MR > 0, operand_variable_MR, constant_MR)
        rule_MR5 *= is_there_MR[:, :, None]
        ends_inner_MR = (np.arange(rules) == programs.inner_M[:, None] - 1) & loops_M[:, None]
        ends_outer_MR = (np.arange(rules) == programs.rules_M[:, None] - 1) & nests_M[:, None]
        rule_MR5[:, :, 4] = np.where(ends_inner_MR | ends_outer_MR, _END_LOOP, 0)

        order_MV = np.argsort(random.random((number, variables)), axis=1)
        asked_MV = (name_MV * is_there_MV)[row_M1, order_MV]
        ask_M1 = np.full((number, 1), _ASK)
        wide_MW = np.concatenate(
            [start_MV2.reshape(number, -1), limits_M4, rule_MR5.reshape(number, -1), ask_M1, asked_MV], axis=1
        )
        label_MW, level_MW = np.zeros_like(wide_MW), np.full_like(wide_MW, NO_LEVEL)
        rules_from = 2 * variables + 4
        rule_ends = slice(rules_from + 3, rules_from + _RULE_SLOTS * rules, _RULE_SLOTS)
        label_MW[:, rule_ends] = results.first_MR + first_number
        level_MW[:, rule_ends] = KIND_STEP * kind_M[:, None] + results.first_steps_MR
        label_MW[:, -variables:] = results.end_MV[row_M1, order_MV] + first_number
        level_MW[:, -variables:] = KIND_STEP * kind_M[:, None] + results.end_steps_MV[row_M1, order_MV]
        return _without_gaps(wide_MW, label_MW, level_MW, self._longest)


def _without_gaps(wide_MW: Ints, label_MW: Ints, level_MW: Ints, longest: int) -> Items:
    """Return rows of at most ``longest`` tokens, which are those of a wide row that are not 0."""
    is_token_MW = wide_MW > 0
    length_M = is_token_MW.sum(axis=1)
    is_place_MT = np.arange(longest) < length_M[:, None]
    ids_MT, label_MT, level_MT = (np.zeros(is_place_MT.shape, np.int64) for _ in range(3))
    for text_MT, x_MW in ((ids_MT, wide_MW), (label_MT, label_MW), (level_MT, level_MW)):
        text_MT[is_place_MT] = x_MW[is_token_MW]
    return Items(ids_MT, label_MT, level_MT, length_M)
