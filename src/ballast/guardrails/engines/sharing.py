"""What rendered prompts have in common, as a tree of tokens: what the fast engines compute once.

Prompts are compared token by token, so nothing is assumed of the tokenizer: where a cut changes how a word
is tokenised, the prompts part there. A node stands for one distinct beginning of the prompts and sees
exactly the nodes on its path; its position is its depth. So a node's hidden state is what a run of that
beginning alone would give, whatever other nodes share the forward.

Every prompt's last token is a leaf of its own and leaves stand last, whence a forward needs the logits of
its last columns only.

Shape letters: T trunk tokens, n nodes that are computed, R prompts (leaves) of a tree, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ballast.guardrails.engines.interface import Group, Verdict
from ballast.guardrails.engines.per_prefix import PerPrefixEngine, read_verdicts

if TYPE_CHECKING:
    import numpy as np
    import torch

Row: TypeAlias = tuple[int, ...]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts share from the start."""
    return sum(takewhile(bool, map(eq, a, b)))


def in_tree_order(rows: Iterator[Row] | Sequence[Row]) -> list[Row]:
    """Prompts in an order in which each shares with the one before it whatever it shares with any before it."""
    return sorted(rows, key=lambda row: (row[:-1], row[-1]))


class Tree:
    """Prompts that share a forward. They are added in tree order.

    Args:
        trunk: tokens that are computed already, which the prompts' beginnings may follow.
    """

    def __init__(self, trunk: Row = ()) -> None:
        self.rows: list[Row] = []
        self._trunk = trunk
        self._ids: list[int] = []  # (n - R,) the nodes that are no leaves
        self._position: list[int] = []
        self._parent: list[int] = []  # -1 for none; the trunk's nodes are 0 .. T-1, ours follow
        self._path: list[int] = []  # nodes of the last prompt without its leaf
        self._leaf_parent: list[int] = []  # (R,)

    @property
    def size(self) -> int:
        """n: the tokens that a forward computes."""
        return len(self._ids) + len(self.rows)

    def growth(self, row: Row) -> int:
        """By how many tokens the tree would grow."""
        return len(row) - self._known(row)

    def add(self, row: Row) -> None:
        """Take a prompt in, next in tree order."""
        known = self._known(row)
        on_trunk = shared_length(row[:-1], self._trunk)
        path = list(range(on_trunk)) + self._path[on_trunk:known]
        for position in range(known, len(row) - 1):
            self._parent.append(path[-1] if path else -1)
            path.append(len(self._trunk) + len(self._ids))
            self._ids.append(row[position])
            self._position.append(position)
        self._leaf_parent.append(path[-1] if path else -1)
        self._path = path
        self.rows.append(row)

    def _known(self, row: Row) -> int:
        last = self.rows[-1][:-1] if self.rows else ()
        return max(shared_length(row[:-1], last), shared_length(row[:-1], self._trunk))

    def layout(self) -> "tuple[list[int], list[int], np.ndarray]":
        """Ids (n,) and positions (n,), leaves last, and which of the trunk and of themselves they see (n, T + n)."""
        import numpy as np

        ids = self._ids + [row[-1] for row in self.rows]
        position = self._position + [len(row) - 1 for row in self.rows]
        trunk = len(self._trunk)
        sees = np.zeros((len(ids), trunk + len(ids)), dtype=bool)
        for node, parent in enumerate(self._parent + self._leaf_parent):
            if parent >= trunk:
                sees[node] = sees[parent - trunk]
            else:
                sees[node, : parent + 1] = True
            sees[node, trunk + node] = True
        return ids, position, sees


def additive(sees: "torch.Tensor", dtype: Any) -> "torch.Tensor":
    """0 where a key is seen and the least number of `dtype` where it is not: what sdpa and eager attention take."""
    import torch

    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


class LogitsReader(Protocol):
    """How an engine runs prompts that share tokens."""

    def logits(self, groups: Sequence[Sequence[Row]]) -> "Iterator[tuple[list[Row], torch.Tensor]]":
        """The next token's logits (R, V) after some of the prompts, again and again; what it leaves out is run alone.

        Args:
            groups: distinct prompts of at most the context's length; no prompt stands in two groups.
        """
        ...


def score_shared(reader: LogitsReader, reference: PerPrefixEngine, groups: Sequence[Group]) -> list[list[Verdict]]:
    """Verdicts of groups from an engine that shares tokens; see `VerdictEngine.score`.

    A token whose numbers are not finite spoils every prompt of its forward, masked or not (0 times NaN is
    NaN). So those that come out unscored are run again each by itself.
    """
    verdicts: dict[Row, Verdict] = {}
    seen: set[Row] = set()
    distinct: list[list[Row]] = []
    for group in groups:
        fresh = [row for row in dict.fromkeys(map(tuple, group)) if row not in seen]
        seen.update(fresh)
        distinct.append([row for row in fresh if len(row) <= reference.context])
    for rows, logits_RV in reader.logits(distinct):
        verdicts.update(zip(rows, read_verdicts(logits_RV.float(), reference.labels), strict=True))
    alone = [row for row in seen if row not in verdicts or verdicts[row].risk is None]
    verdicts.update(zip(alone, reference.score([alone])[0], strict=True))
    return [[verdicts[tuple(row)] for row in group] for group in groups]
