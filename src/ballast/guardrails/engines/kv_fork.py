"""The longest prompt of an exchange once into a cache, then what the other prompts add, over that cache.

The trunk runs as an ordinary causal prefill, without a mask, so memory grows with its length and not with
its square: the engine for long responses. The branches run side by side in one row, each token seeing its
own path only, so the cache is never copied once a branch.

Shape letters: T trunk tokens, n branch tokens of a forward, R prompts, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ballast.guardrails.engines.interface import Group, Verdict
from ballast.guardrails.engines.per_prefix import PerPrefixEngine
from ballast.guardrails.engines.sharing import Row, Tree, additive, in_tree_order, score_shared

if TYPE_CHECKING:
    import torch


class KVForkEngine:
    """Runs each group's longest prompt into a cache and the others' endings over it.

    Args:
        reference: the same model, prompt by prompt: for what does not fit a forward or spoils one.
        max_tokens: branch tokens a forward.
    """

    name = "kv_fork"

    def __init__(self, reference: PerPrefixEngine, max_tokens: int) -> None:
        self._reference, self._max_tokens = reference, max_tokens
        self._model = reference.model

    def score(self, groups: Sequence[Group]) -> list[list[Verdict]]:
        """Read the verdict after each prompt; see `VerdictEngine.score`."""
        return score_shared(self, self._reference, groups)

    def logits(self, groups: Sequence[Sequence[Row]]) -> "Iterator[tuple[list[Row], torch.Tensor]]":
        """See `LogitsReader.logits`; a prompt that leaves the trunk by more than `max_tokens` is left out."""
        for rows in filter(None, groups):
            trunk = max(rows, key=len)[:-1]
            chunks = list(self._chunks(trunk, in_tree_order(rows)))
            if not chunks:
                continue
            cache = self._prefill(trunk)
            for chunk in chunks:
                yield chunk.rows, self._forward(chunk, cache)

    def _chunks(self, trunk: Row, rows: Sequence[Row]) -> Iterator[Tree]:
        """What the prompts add to the trunk, in trees of at most `max_tokens`."""
        tree = Tree(trunk)
        for row in rows:
            if tree.rows and tree.size + tree.growth(row) > self._max_tokens:
                yield tree
                tree = Tree(trunk)
            if tree.growth(row) <= self._max_tokens:
                tree.add(row)
        if tree.rows:
            yield tree

    def _prefill(self, trunk: Row) -> Any:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        if trunk:
            with torch.inference_mode():
                self._model(
                    input_ids=torch.tensor([trunk], device=self._model.device),
                    position_ids=torch.arange(len(trunk), device=self._model.device)[None],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        return cache

    def _forward(self, tree: Tree, cache: Any) -> "torch.Tensor":
        """Logits (R, V) of the tree's leaves; the cache holds the trunk alone, before and after."""
        import torch

        ids, position, sees = tree.layout()
        device = self._model.device
        with torch.inference_mode():
            logits_RV: torch.Tensor = self._model(
                input_ids=torch.tensor([ids], device=device),
                attention_mask=additive(torch.from_numpy(sees).to(device), self._model.dtype)[None, None],
                position_ids=torch.tensor([position], device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=len(tree.rows),
            ).logits[0]
        cache.crop(-tree.size)
        return logits_RV
