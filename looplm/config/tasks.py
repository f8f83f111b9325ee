"""Synthetic tasks in place of text: what each is, in numbers. Their generators are in ``data_pipeline/synthetic/``.

A sample has ``data.seq_length`` tokens of the task's own vocabulary, and labels of its own, which need not be the next
tokens. Harder or longer variants, for a test out of distribution, are the same task with other numbers.
"""

import math
import re
from dataclasses import dataclass, fields

from looplm.bounds import at_least, check_bounds, positive, require
from looplm.failures import UserError

_MAX_FACTS = 10_000_000  # of a world, which every process holds in memory
_GROUP = re.compile(r"[SA][345]|Z([2-9]|[1-9][0-9]{1,2})")


@dataclass(frozen=True, kw_only=True)
class WordProblemConfig:
    """A random word over a group's elements; the label at every position is the product of the word so far.

    Args:
        group: S3 to S5 (permutations), A3 to A5 (even ones), or Z2 to Z999 (sums modulo n).
        chain: a chain of thought: the products are written one by one after the whole word, each as the next token. The
            word has half of data.seq_length then.
    """

    group: str = "S3"
    chain: bool = False

    def __post_init__(self) -> None:
        fix = "give S3 to S5, A3 to A5, or Z2 to Z999"
        require(_GROUP.fullmatch(self.group) is not None, "data.task.word_problem.group", self.group, fix)


@dataclass(frozen=True, kw_only=True)
class PHopConfig:
    """A random sequence of letters; the label at every letter is the one that p hops back lead to.

    Args:
        alphabet: different letters.
        hops: the values of p, each as likely as the others.
    """

    alphabet: int = at_least(3, 4, at_most=1000)
    hops: tuple[int, ...] = positive((1, 2, 4, 8))

    def __post_init__(self) -> None:
        check_bounds(self, "data.task.p_hop")
        _require_different("data.task.p_hop.hops", self.hops)


@dataclass(frozen=True, kw_only=True)
class DepoConfig:
    """A random cycle of nodes, listed as pairs; questions ask for the k-th successor of a node.

    Args:
        names: different names of nodes, of which a cycle uses some.
        min_nodes: nodes of the smallest cycle.
        max_nodes: nodes of the largest cycle.
        hops: the values of k, all asked of every node in question; below min_nodes.
    """

    names: int = positive(16, at_most=10_000)
    min_nodes: int = at_least(2, 6)
    max_nodes: int = positive(12)
    hops: tuple[int, ...] = positive((1, 2, 3, 4))

    def __post_init__(self) -> None:
        section = "data.task.depo"
        check_bounds(self, section)
        _require_range(section, "nodes", self.min_nodes, self.max_nodes)
        _require_names(section, "nodes", self.names, self.max_nodes)
        _require_different(f"{section}.hops", self.hops)
        fix = f"give numbers below {section}.min_nodes={self.min_nodes}: more hops go around the cycle"
        require(max(self.hops) < self.min_nodes, f"{section}.hops", list(self.hops), fix)


@dataclass(frozen=True, kw_only=True)
class ManoConfig:
    """Arithmetic modulo a number, in prefix notation; the label after an expression is its value.

    Args:
        modulus: p; numbers are 0 to p - 1.
        min_operators: operators of the shortest expressions.
        max_operators: operators of the longest expressions.
        dense: label the parts of an expression too, at their last token.
    """

    modulus: int = at_least(5, 11, at_most=23)
    min_operators: int = positive(1)
    max_operators: int = positive(4)
    dense: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, "data.task.mano")
        _require_range("data.task.mano", "operators", self.min_operators, self.max_operators)


@dataclass(frozen=True, kw_only=True)
class CapoConfig:
    """Biographies of a fixed population; labels are the next tokens.

    Args:
        people: how many there are.
        name_parts: first names to choose from, and as many middle and last names.
        attributes: values that a person has.
        values: values to choose from, for each attribute.
        wordings: ways to introduce each attribute.
        people_seed: decides the people, whatever the seed of the run is.
    """

    people: int = positive(1000, at_most=20_000_000)
    name_parts: int = at_least(2, 32, at_most=2000)
    attributes: int = positive(5, at_most=20)
    values: int = at_least(2, 32, at_most=10_000)
    wordings: int = positive(4, at_most=10_000)
    people_seed: int = at_least(0, 0)

    def __post_init__(self) -> None:
        section, names = "data.task.capo", self.name_parts**3
        check_bounds(self, section)
        fix = f"{section}.name_parts={self.name_parts} makes {names} names; give at most as many people"
        require(self.people <= names, f"{section}.people", self.people, fix)
        tellings = math.factorial(self.attributes) * self.wordings**self.attributes
        fix = f"there are only {tellings} ways to tell a biography; give more wordings or attributes, for 200 or more"
        require(tellings >= 200, f"{section}.wordings", self.wordings, fix)


@dataclass(frozen=True, kw_only=True)
class MultiHopConfig:
    """Questions of several hops over the facts of a fixed random world; the label after a question is its answer.

    Args:
        layers: layers of entities; a relation leads from one to the next.
        entities: entities of a layer.
        relations: relations; each leads from every entity to one of the next layer.
        min_hops: relations in the shortest questions; with 1, training also asks for the facts.
        max_hops: relations in the longest questions.
        seen: share of the training questions of two hops and more that are ever asked.
        world_seed: decides the facts, whatever the seed of the run is.
    """

    layers: int = at_least(3, 5, at_most=1000)
    entities: int = at_least(2, 20, at_most=100_000)
    relations: int = positive(8, at_most=10_000)
    min_hops: int = positive(1)
    max_hops: int = at_least(2, 3)
    seen: float = positive(0.25, at_most=1)
    world_seed: int = at_least(0, 0)

    def __post_init__(self) -> None:
        section = "data.task.multi_hop"
        check_bounds(self, section)
        _require_range(section, "hops", self.min_hops, self.max_hops)
        fix = f"give a number below {section}.layers={self.layers}"
        require(self.max_hops < self.layers, f"{section}.max_hops", self.max_hops, fix)
        facts = self.layers * self.entities * self.relations
        fix = f"layers x entities x relations are {facts:,}; give at most {_MAX_FACTS:,} of these facts"
        require(facts <= _MAX_FACTS, f"{section}.entities", self.entities, fix)


@dataclass(frozen=True, kw_only=True)
class CausalLoopsConfig:
    """Programs of rules that change variables, with loops; labels are the variables' values.

    Args:
        kinds: 1 chains, 2 loops, 3 converging paths, 4 nested loops; each as likely as the others.
        prime: values are modulo this number; the smaller, the sooner rules are learned.
        max_constant: largest constant in a rule; mod has at least 2.
        names: different names of variables, of which a program uses some.
        min_variables: fewest variables of a program.
        max_variables: most variables of a program.
        min_rules: fewest rules of a program.
        max_rules: most rules of a program.
        max_passes: largest limit of a loop; limits are 2 to this number.
    """

    kinds: tuple[int, ...] = at_least(1, (1, 2, 3, 4), at_most=4)
    prime: int = at_least(5, 97, at_most=9973)
    max_constant: int = at_least(2, 9)
    names: int = positive(8, at_most=1000)
    min_variables: int = at_least(2, 2)
    max_variables: int = positive(4)
    min_rules: int = at_least(3, 3)
    max_rules: int = positive(6)
    max_passes: int = at_least(2, 3)

    def __post_init__(self) -> None:
        section = "data.task.causal_loops"
        check_bounds(self, section)
        _require_different(f"{section}.kinds", self.kinds)
        _require_range(section, "variables", self.min_variables, self.max_variables)
        _require_range(section, "rules", self.min_rules, self.max_rules)
        _require_names(section, "variables", self.names, self.max_variables)
        is_prime = all(self.prime % divisor for divisor in range(2, math.isqrt(self.prime) + 1))
        require(is_prime, f"{section}.prime", self.prime, "give a prime number")
        for name in ("max_constant", "max_passes"):
            value, fix = getattr(self, name), f"give a number below {section}.prime={self.prime}"
            require(value < self.prime, f"{section}.{name}", value, fix)
        rules, passes = self.max_rules, self.max_passes
        steps = {1: rules, 2: rules * passes, 3: rules, 4: passes * (passes * (rules - 1) + 1)}
        most = max(steps[kind] for kind in self.kinds)
        fix = f"with {section}.max_passes={passes} a program takes up to {most} steps, and 99 are allowed; lower either"
        require(most <= 99, f"{section}.max_rules", rules, fix)


@dataclass(frozen=True, kw_only=True)
class ReachabilityConfig:
    """A random directed graph, listed as edges; the label at every node is its distance from a source.

    Args:
        names: different names of nodes, of which a graph uses some.
        min_nodes: nodes of the smallest graph; above max_distance.
        max_nodes: nodes of the largest graph.
        max_distance: longest distance.
        extra_edges: edges beside those that make the distances.
    """

    names: int = positive(16, at_most=62)
    min_nodes: int = positive(8)
    max_nodes: int = positive(12)
    max_distance: int = positive(6)
    extra_edges: int = at_least(0, 4)

    def __post_init__(self) -> None:
        section = "data.task.reachability"
        check_bounds(self, section)
        _require_range(section, "nodes", self.min_nodes, self.max_nodes)
        _require_names(section, "nodes", self.names, self.max_nodes)
        fix = f"give a number above {section}.max_distance={self.max_distance}"
        require(self.min_nodes > self.max_distance, f"{section}.min_nodes", self.min_nodes, fix)
        pairs = self.max_nodes * (self.max_nodes - 1)
        fix = f"{section}.max_nodes={self.max_nodes} nodes have {pairs} pairs; give at most as many"
        require(self.extra_edges <= pairs, f"{section}.extra_edges", self.extra_edges, fix)


@dataclass(frozen=True, kw_only=True)
class SumsConfig:
    """Chains of additions and subtractions of two-digit numbers; the label after a chain is its value, units first.

    Args:
        min_terms: numbers of the shortest chains.
        max_terms: numbers of the longest chains.
        answer_digits: digits of every answer, with zeros in front.
    """

    min_terms: int = at_least(2, 2)
    max_terms: int = positive(5)
    answer_digits: int = at_least(3, 3, at_most=12)

    def __post_init__(self) -> None:
        section = "data.task.sums"
        check_bounds(self, section)
        _require_range(section, "terms", self.min_terms, self.max_terms)
        most = (10**self.answer_digits - 1) // 99
        fix = f"{section}.answer_digits={self.answer_digits} hold sums of {most} numbers; lower one or raise the other"
        require(self.max_terms <= most, f"{section}.max_terms", self.max_terms, fix)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A synthetic task; name exactly one, with its keys or as ``{}``.

    Args:
        word_problem: products of words over a group (arXiv 2404.08819).
        p_hop: dense p-hop induction (arXiv 2402.09268).
        depo: k-th successors on a cycle (Physics of Language Models, part 4.1).
        mano: prefix arithmetic modulo a number (arXiv 2510.25741, appendix B.2).
        capo: biographies to be memorized (arXiv 2404.05405).
        multi_hop: questions over the facts of a fixed world (arXiv 2510.25741, appendix B.3).
        causal_loops: variables under rules in sequence, with loops.
        reachability: distances in a directed graph (arXiv 2402.09268).
        sums: chains of two-digit additions and subtractions.
    """

    word_problem: WordProblemConfig | None = None
    p_hop: PHopConfig | None = None
    depo: DepoConfig | None = None
    mano: ManoConfig | None = None
    capo: CapoConfig | None = None
    multi_hop: MultiHopConfig | None = None
    causal_loops: CausalLoopsConfig | None = None
    reachability: ReachabilityConfig | None = None
    sums: SumsConfig | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "data.task")
        if len(self._named) != 1:
            names = [spec.name for spec in fields(self)]
            raise UserError(f"data.task: {self._named or None} is not allowed; name exactly one of {', '.join(names)}")

    @property
    def _named(self) -> list[str]:
        return [spec.name for spec in fields(self) if getattr(self, spec.name) is not None]

    @property
    def name(self) -> str:
        """The name of the task."""
        return self._named[0]


def _require_range(section: str, what: str, low: int, high: int) -> None:
    fix = f"give at least {section}.min_{what}={low}"
    require(low <= high, f"{section}.max_{what}", high, fix)


def _require_names(section: str, what: str, names: int, most: int) -> None:
    fix = f"give at least {section}.max_{what}={most}"
    require(names >= most, f"{section}.names", names, fix)


def _require_different(key: str, values: tuple[int, ...]) -> None:
    require(len(values) > 0, key, list(values), "give at least one")
    require(len(set(values)) == len(values), key, list(values), "give each number once")
