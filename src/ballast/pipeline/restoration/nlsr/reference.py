"""The aligned model as NLSR needs it: its changes module by module, and a super-aligned copy that runs."""

from collections.abc import Sequence
from typing import Any

import torch

from ballast.errors import ModelError
from ballast.pipeline.restoration.models import Models
from ballast.pipeline.restoration.nlsr.algebra import extrapolate
from ballast.pipeline.restoration.weights import Factors, difference


class AlignmentChanges:
    """The alignment's change in each module, `aligned - base`.

    Attributes:
        sides: by tensor, the side of the second moment that its change needs.

    Args:
        models: see `realignment`.
        names: the tensors that are looked at.
        device: where changes are computed with.
    """

    def __init__(self, models: Models, names: Sequence[str], device: str) -> None:
        self.models, self.device = models, device
        self.sides: dict[str, int] = {}
        for name in names:
            factors = self._factors(name)
            self.sides[name] = models.aligned.shape(name)[1] if factors is None else factors.right.shape[0]

    def of(self, name: str) -> Factors | torch.Tensor:
        """Factors, or (m, n)."""
        found = difference(self.models.aligned, self.models.base, name)
        assert found is not None  # `selected` leaves those out
        return found.to(self.device)

    def right(self, name: str) -> torch.Tensor | None:
        """(r, n) where the change has factors."""
        factors = self._factors(name)
        return None if factors is None else factors.right

    def _factors(self, name: str) -> Factors | None:
        aligned = self.models.aligned
        return aligned.factors(name) if aligned.base is self.models.base else None


def reference_model(models: Models, changes: AlignmentChanges, beta: float, device: str) -> Any:
    """The super-aligned model, to run on calibration rows, in the dtype that the aligned model is stored in.

    Raises:
        ModelError: transformers cannot load it, or has no such tensor.
    """
    from transformers import AutoModelForCausalLM

    aligned = models.aligned
    folder = aligned.folder if aligned.base is None else aligned.base.folder
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{aligned.label} '{folder}' cannot be loaded ({str(error).splitlines()[0]}), and nlsr runs it on calibration rows; give a "
            "causal language model of transformers"
        ) from error
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name in aligned.names:
        if name in changes.sides:
            value = extrapolate(aligned.tensor(name).to(device), changes.of(name), beta)
        elif aligned.base is not None and aligned.differs(name):
            value = aligned.tensor(name)
        else:
            continue
        if name not in parameters:
            raise ModelError(
                f"tensor '{name}' of {aligned.label} '{aligned.folder}' has another name in {type(model).__name__}; leave it out of "
                "modules"
            )
        parameters[name].data.copy_(value)
    return model.to(device)
