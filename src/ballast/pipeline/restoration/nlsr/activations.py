"""What goes into linear modules on calibration rows, gathered by forward hooks as second moments.

    B rows of a batch   T tokens   n inputs of a module   r rank of its change

Of the activations X (n, tokens) nothing but `X X^T` is kept, summed in fp64 batch by batch, so memory does not grow
with the rows. A change that is a product `left @ right` needs only `right X`, and so no more than r x r numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ballast.errors import DataError, ModelError

# Second moments of one pass over the rows; models whose modules need more are run over them several times.
BUDGET_BYTES = 4 << 30


@dataclass(frozen=True)
class CalibrationRow:
    """A request with its safe answer, as the model reads them.

    Attributes:
        ids: token ids of both.
        start: the first token that counts; activations of earlier ones, the request's, are left out.
    """

    ids: tuple[int, ...]
    start: int = 0

    def __post_init__(self) -> None:
        """Refuse a row without a token that counts."""
        if not 0 <= self.start < len(self.ids):
            raise DataError(
                f"a calibration row has {len(self.ids)} tokens, and those from number {self.start} on should count, which are none; "
                "give it an answer"
            )


def second_moments(
    model: Any,
    rows: Sequence[CalibrationRow],
    modules: Mapping[str, torch.Tensor | None],
    batch_size: int = 8,
) -> dict[str, torch.Tensor]:
    """`X X^T` of the inputs of linear modules, over the tokens that count.

    Args:
        model: a causal model; it is as before afterwards.
        rows: at least one.
        modules: by its name in the model, each module whose inputs are wanted, with (r, n) to multiply them with, or
            None to take them as they are.
        batch_size: rows a forward.

    Returns:
        (n, n) or (r, r) a module, fp64, on the model's device.

    Raises:
        DataError: there are no rows.
        ModelError: a module does not exist, is not linear, never ran, or got NaN or infinity.
    """
    if not rows:
        raise DataError(
            "there are no calibration rows to find safety neurons with; give harmful requests with safe answers"
        )
    sums: dict[str, torch.Tensor] = {}
    training = model.training
    model.eval()
    counted = _Counted()
    try:
        with _hooked(model, modules, counted, sums), torch.no_grad():
            for start in range(0, len(rows), batch_size):
                inputs, counted.mask = _batch(model, rows[start : start + batch_size])
                model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
    for name in modules:
        if name not in sums:
            raise ModelError(
                f"module '{name}' did not run on any calibration row, so its safety neurons cannot be told; leave it out of modules"
            )
        if not bool(torch.isfinite(sums[name]).all()):
            raise ModelError(
                f"module '{name}' got inputs that are NaN or infinite on the calibration rows; check that the model answers, lower "
                "beta, or calibrate in float32"
            )
    return sums


def passes(sizes: Mapping[str, int], budget: int = BUDGET_BYTES) -> Iterator[list[str]]:
    """Share modules out to passes over the rows, so that the second moments of one pass keep to a budget.

    Args:
        sizes: of each module, the side of its second moment.
        budget: bytes; a module that is larger alone has a pass of its own.
    """
    group: list[str] = []
    taken = 0
    for name, side in sizes.items():
        nbytes = 8 * side * side
        if group and taken + nbytes > budget:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += nbytes
    if group:
        yield group


class _Counted:
    """Which tokens of the batch that is running count: (B, T)."""

    mask: torch.Tensor


@contextmanager
def _hooked(
    model: Any, modules: Mapping[str, torch.Tensor | None], counted: _Counted, sums: dict[str, torch.Tensor]
) -> Iterator[None]:
    hooks = []
    try:
        for name, right in modules.items():
            hooks.append(_linear(model, name).register_forward_pre_hook(_adder(name, right, counted, sums)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adder(
    name: str, right: torch.Tensor | None, counted: _Counted, sums: dict[str, torch.Tensor]
) -> Callable[[Any, tuple[Any, ...]], None]:
    def add(module: Any, args: tuple[Any, ...]) -> None:
        states = args[0]
        if states.shape[:-1] != counted.mask.shape:
            raise ModelError(
                f"module '{name}' gets inputs of shape {tuple(states.shape)} for {tuple(counted.mask.shape)} tokens, so its inputs "
                "cannot be told apart by token; leave it out of modules (experts of a mixture are not supported)"
            )
        tokens = states[counted.mask].double()
        if right is not None:
            tokens = tokens @ right.to(tokens).T
        # fp64: outlier features are so large that fp32 sums would drown the directions of the rest.
        product = tokens.T @ tokens
        sums[name] = sums[name] + product if name in sums else product

    return add


def _linear(model: Any, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(
            f"the model has no module '{name}', though its files have that tensor; transformers renames or fuses it: leave it out of "
            "modules"
        ) from error
    if not isinstance(module, torch.nn.Linear):
        raise ModelError(
            f"module '{name}' is {type(module).__name__}, and safety neurons are told for linear modules only; leave it out of modules"
        )
    return module


def _batch(model: Any, rows: Sequence[CalibrationRow]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Right-padded inputs, and (B, T) which tokens count."""
    device = next(model.parameters()).device
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids] + [0] * (width - len(row.ids)) for row in rows], device=device)
    places = torch.arange(width, device=device)[None]
    ends = torch.tensor([[len(row.ids)] for row in rows], device=device)
    starts = torch.tensor([[row.start] for row in rows], device=device)
    real = places < ends
    return {"input_ids": ids, "attention_mask": real.long()}, real & (places >= starts)
