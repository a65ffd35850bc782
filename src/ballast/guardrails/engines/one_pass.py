"""All cuts of an exchange in one forward: every distinct token once, under a mask that keeps the prompts apart.

With prompts [P | response[:c_k] | S] this runs P + N + K*S tokens where per_prefix runs sum_k (P + c_k + S).
Exchanges that share their prompt, as the completions of one group do, share its tokens too.

Shape letters: B trees of a forward, L tokens of the largest, R prompts of a tree, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ballast.guardrails.engines.interface import Group, Verdict
from ballast.guardrails.engines.per_prefix import PerPrefixEngine
from ballast.guardrails.engines.sharing import Row, Tree, additive, in_tree_order, score_shared

if TYPE_CHECKING:
    import torch

# Prompts of one tree. Their logits are held at once: 256 of a vocabulary of 150,000 take 150 MB in fp32.
_MOST_ROWS = 256


class OnePassEngine:
    """Runs prompts as trees of tokens under a 4-D mask.

    Args:
        reference: the same model, prompt by prompt: for what does not fit a forward or spoils one.
        max_tokens: tokens a forward, padding included.
    """

    name = "one_pass"

    def __init__(self, reference: PerPrefixEngine, max_tokens: int) -> None:
        self._reference, self._max_tokens = reference, max_tokens
        self._model = reference.model
        # Weights cost about 12 h^2 multiplications a layer and token, attention 2 h a layer and pair of tokens.
        self._token_cost = 6 * self._model.config.get_text_config().hidden_size

    def score(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """Read the verdict after each prompt; see `VerdictEngine.score`."""
        return score_shared(self, self._reference, groups)

    def logits(self, groups: Sequence[Sequence[Row]]) -> "Iterator[tuple[list[Row], torch.Tensor]]":
        """See `LogitsReader.logits`; a prompt longer than `max_tokens` is left out."""
        rows = in_tree_order([row for group in groups for row in group if len(row) <= self._max_tokens])
        for trees in self._batches(self._plant(rows)):
            logits_BRV = self._forward(trees)
            for b, tree in enumerate(trees):
                yield tree.rows, logits_BRV[b, -len(tree.rows) :]

    def _plant(self, rows: Sequence[Row]) -> list[Tree]:
        """Prompts in tree order as trees; one joins the tree before it where that costs less than a tree of its own."""
        trees: list[Tree] = []
        for row in rows:
            if not trees or not self._joins(trees[-1], row):
                trees.append(Tree())
            trees[-1].add(row)
        return trees

    def _joins(self, tree: Tree, row: Row) -> bool:
        before, after = tree.size, tree.size + tree.growth(row)
        if after > self._max_tokens or len(tree.rows) == _MOST_ROWS:
            return False
        return self._cost(after) - self._cost(before) <= self._cost(len(row))

    def _cost(self, tokens: int) -> int:
        return self._token_cost * tokens + tokens * tokens

    def _batches(self, trees: Sequence[Tree]) -> Iterator[list[Tree]]:
        """Trees of like size together: a fifth at most is padding, and `max_tokens` hold them all."""
        batch: list[Tree] = []
        for tree in sorted(trees, key=lambda tree: -tree.size):
            if batch and ((len(batch) + 1) * batch[0].size > self._max_tokens or tree.size < 0.8 * batch[0].size):
                yield batch
                batch = []
            batch.append(tree)
        if batch:
            yield batch

    def _forward(self, trees: Sequence[Tree]) -> "torch.Tensor":
        """Logits (B, R, V) of the trees' leaves, each tree's to the right."""
        import torch

        longest = max(tree.size for tree in trees)
        ids_BL = torch.zeros(len(trees), longest, dtype=torch.long)
        position_BL = torch.zeros(len(trees), longest, dtype=torch.long)
        # A padded column sees itself: a row that sees nothing would be NaN, and 0 times NaN is NaN elsewhere.
        sees_BLL = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1)
        for b, tree in enumerate(trees):
            ids, position, sees = tree.layout()
            start = longest - tree.size
            ids_BL[b, start:], position_BL[b, start:] = torch.tensor(ids), torch.tensor(position)
            sees_BLL[b, start:, start:] = torch.from_numpy(sees)
        device = self._model.device
        with torch.inference_mode():
            logits: torch.Tensor = self._model(
                input_ids=ids_BL.to(device),
                attention_mask=additive(sees_BLL.to(device), self._model.dtype)[:, None],
                position_ids=position_BL.to(device),
                use_cache=False,
                logits_to_keep=max(len(tree.rows) for tree in trees),
            ).logits
        return logits
