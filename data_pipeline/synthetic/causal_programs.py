"""Programs of the causal loops task: random ones, and what they compute, many at a time.

Shapes: M programs, V variables, R rules of the longest program, K those of the programs that still run.
"""

from typing import NamedTuple

import numpy as np

from data_pipeline.synthetic.task import Ints
from looplm.config import CausalLoopsConfig

OPERATIONS = ("+", "-", "*", "mod")
MOD = OPERATIONS.index("mod")
CHAIN, LOOP, CONVERGING, NESTED = 1, 2, 3, 4


class Programs(NamedTuple):
    """Programs over variables that are numbered from 0: of each, what it is made of.

    A program runs its first ``inner`` rules up to ``inner_limit`` times, then the others once, and all that up to
    ``outer_limit`` times. Rule: target = source operation operand.
    """

    kind_M: Ints
    variables_M: Ints
    rules_M: Ints
    inner_M: Ints
    inner_limit_M: Ints
    outer_limit_M: Ints
    start_MV: Ints  # value of each variable before the first rule
    target_MR: Ints
    source_MR: Ints
    operation_MR: Ints
    is_variable_MR: Ints  # 1 if the operand is a variable, 0 if it is a constant
    operand_MR: Ints


class Results(NamedTuple):
    """Values modulo the prime, each with its steps: the longest chain of rules, as they were run, that led to it."""

    first_MR: Ints  # value that each rule's first application gives to its target
    first_steps_MR: Ints
    end_MV: Ints  # value of each variable when the program has ended
    end_steps_MV: Ints


def random_programs(config: CausalLoopsConfig, random: np.random.Generator, number: int) -> Programs:
    """Return programs of all kinds, with numbers of variables and rules that do not depend on each other."""
    most, variables = config.max_rules, config.max_variables
    kind_M = random.choice(np.array(config.kinds), size=number)
    variables_M = random.integers(config.min_variables, variables + 1, size=number)
    rules_M = random.integers(config.min_rules, most + 1, size=number)
    limit_2M = random.integers(2, config.max_passes + 1, size=(2, number))
    inner_M = np.where(kind_M == NESTED, random.integers(2, rules_M), rules_M)
    operation_MR = random.integers(MOD, size=(number, most))
    operand_MR = random.integers(1, config.max_constant + 1, size=(number, most))
    divisor_MR = random.integers(2, config.max_constant + 1, size=(number, most))
    other_3MR = random.integers(1, variables_M[:, None], size=(3, number, most))  # how far another variable is away
    acts_MR = random.random((number, most)) < 0.5  # whether a rule of nested loops has two variables
    target_MR, source_MR, is_variable_MR = (np.zeros((number, most), np.int64) for _ in range(3))
    first_M = previous_M = random.integers(variables_M)  # the variable with which chains and loops begin
    before_M = (first_M + other_3MR[2, :, 0]) % variables_M
    for rule in range(most):
        other_M = (previous_M + other_3MR[0, :, rule]) % variables_M
        operand_M = (previous_M + other_3MR[1, :, rule]) % variables_M
        is_last_M = rules_M == rule + 1
        joins_M = (kind_M == CONVERGING) & (is_last_M | (rule % 3 == 2))
        begins_M = (kind_M == CONVERGING) & ~joins_M & (rule % 3 == 1)  # the second of two paths
        closes_M = ((kind_M == LOOP) | (kind_M == NESTED)) & (is_last_M | (inner_M == rule + 1))
        acts_M = joins_M | ((kind_M == NESTED) & acts_MR[:, rule] & ~closes_M)
        source_MR[:, rule] = np.where(begins_M, operand_M, previous_M)
        target_MR[:, rule] = np.where(closes_M, first_M, other_M)
        operation_MR[closes_M, rule] = MOD
        operand_MR[closes_M, rule] = divisor_MR[closes_M, rule]
        is_variable_MR[:, rule] = acts_M
        operand_M = np.where(joins_M & (rule % 3 == 2), before_M, operand_M)
        operand_MR[acts_M, rule] = operand_M[acts_M]
        before_M, previous_M = previous_M, target_MR[:, rule]
    beyond_MR = np.arange(most) >= rules_M[:, None]
    for x_MR in (target_MR, source_MR, operation_MR, is_variable_MR, operand_MR):
        x_MR[beyond_MR] = 0
    start_MV = random.integers(config.prime, size=(number, variables))
    start_MV[np.arange(variables) >= variables_M[:, None]] = 0
    loops_M, nests_M = (kind_M == LOOP) | (kind_M == NESTED), kind_M == NESTED
    limits = np.where(loops_M, limit_2M[0], 1), np.where(nests_M, limit_2M[1], 1)
    rules = target_MR, source_MR, operation_MR, is_variable_MR, operand_MR
    return Programs(kind_M, variables_M, rules_M, inner_M, *limits, start_MV, *rules)


def run(programs: Programs, prime: int) -> Results:
    """Run each program: rules in sequence, each loop until a pass changes no variable or its limit is reached."""
    value_MV, steps_MV = programs.start_MV.copy(), np.zeros_like(programs.start_MV)
    first_MR, first_steps_MR = np.full_like(programs.target_MR, -1), np.zeros_like(programs.target_MR)
    before_inner_MV, before_outer_MV = value_MV.copy(), value_MV.copy()  # values when the current pass began
    rule_M = np.zeros_like(programs.kind_M)
    inner_pass_M, outer_pass_M = np.ones_like(rule_M), np.ones_like(rule_M)
    row_K = np.arange(len(rule_M))
    while len(row_K):
        rule_K = rule_M[row_K]
        source_K, operand_K = programs.source_MR[row_K, rule_K], programs.operand_MR[row_K, rule_K]
        is_variable_K = programs.is_variable_MR[row_K, rule_K] > 0
        operand_variable_K = np.where(is_variable_K, operand_K, 0)
        a_K = value_MV[row_K, source_K]
        b_K = np.where(is_variable_K, value_MV[row_K, operand_variable_K], operand_K)
        choices = a_K + b_K, a_K - b_K, a_K * b_K, a_K % np.maximum(b_K, 1)
        result_K = np.choose(programs.operation_MR[row_K, rule_K], choices) % prime
        operand_steps_K = np.where(is_variable_K, steps_MV[row_K, operand_variable_K], 0)
        result_steps_K = np.maximum(steps_MV[row_K, source_K], operand_steps_K) + 1
        target_K = programs.target_MR[row_K, rule_K]
        value_MV[row_K, target_K], steps_MV[row_K, target_K] = result_K, result_steps_K
        is_first_K = first_MR[row_K, rule_K] < 0
        first_MR[row_K[is_first_K], rule_K[is_first_K]] = result_K[is_first_K]
        first_steps_MR[row_K[is_first_K], rule_K[is_first_K]] = result_steps_K[is_first_K]
        rule_M[row_K] += 1

        end_K = row_K[rule_M[row_K] == programs.inner_M[row_K]]
        again_K = end_K[_continues(value_MV, before_inner_MV, inner_pass_M, programs.inner_limit_M, end_K)]
        rule_M[again_K], before_inner_MV[again_K] = 0, value_MV[again_K]
        inner_pass_M[again_K] += 1

        end_K = row_K[rule_M[row_K] == programs.rules_M[row_K]]
        again_K = end_K[_continues(value_MV, before_outer_MV, outer_pass_M, programs.outer_limit_M, end_K)]
        rule_M[again_K], before_outer_MV[again_K], before_inner_MV[again_K] = 0, value_MV[again_K], value_MV[again_K]
        inner_pass_M[again_K] = 1
        outer_pass_M[again_K] += 1
        row_K = row_K[rule_M[row_K] < programs.rules_M[row_K]]
    return Results(first_MR, first_steps_MR, value_MV, steps_MV)


def _continues(value_MV: Ints, before_MV: Ints, pass_M: Ints, limit_M: Ints, row_K: Ints) -> Ints:
    """Return the indices, in ``row_K``, of the programs whose loop makes another pass."""
    changed_K = (value_MV[row_K] != before_MV[row_K]).any(axis=1)
    return np.flatnonzero(changed_K & (pass_M[row_K] < limit_M[row_K]))
