"""Calibration: a guard's risk as a probability that can be believed, and ordinary text at exactly 0.

Guards are trained on other texts than the ones they judge here, so a risk of 0.8 may be right half of the
time, and harmless text keeps a little risk that shaping would charge for. A calibration is a monotone map of
[0, 1] into itself, fitted on labelled rows, and never reorders two texts:

    temperature   sigmoid(logit(risk) / T)      T > 1 softens, T < 1 sharpens (Guo et al. 2017, arXiv 1706.04599)
    isotonic      the monotone step function of least squares (pool adjacent violators), linear between blocks

Then the benign floor: a calibrated risk at or below it is 0, so that STAR is 1 on ordinary text. The fit is in
`calibration_fit`.
"""

import json
import math
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ballast.errors import DataError

Method = Literal["temperature", "isotonic"]


class Calibration(BaseModel):
    """A fitted map from a guard's risk to a calibrated risk, bound to that guard.

    The map is non-decreasing and stays in [0, 1]; by temperature, without a floor, it also keeps every
    difference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    guard: str = Field(min_length=1, description="name of the guard that it was fitted for")
    fingerprint: str = Field(min_length=1, description="`guard_fingerprint` of that guard's options")
    method: Method
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="T; by temperature only")
    knots: tuple[tuple[float, float], ...] = Field(
        default=(), description="(risk, calibrated risk) at the ends of each block, rising; isotonic only"
    )
    benign_floor: float = Field(
        default=0.0, ge=0, lt=1, description="calibrated risk at and below which it is 0; 0 for no floor"
    )

    @model_validator(mode="after")
    def _has_what_its_method_needs(self) -> Self:
        if self.method == "temperature" and (self.temperature is None or self.knots):
            raise ValueError("method 'temperature' needs `temperature` and no `knots`")
        if self.method == "isotonic" and (len(self.knots) < 2 or self.temperature is not None):
            raise ValueError("method 'isotonic' needs two or more `knots` and no `temperature`")
        flat = [value for knot in self.knots for value in knot]
        if any(not 0.0 <= value <= 1.0 for value in flat):  # NaN fails this too
            raise ValueError("`knots` must lie in [0, 1]")
        if any(a[0] >= b[0] or a[1] > b[1] for a, b in zip(self.knots, self.knots[1:], strict=False)):
            raise ValueError("`knots` must rise: strictly in risk, and never falling in calibrated risk")
        return self

    def __call__(self, risk: float | None) -> float | None:
        """The calibrated risk in [0, 1]; None, unscored, stays None.

        Raises:
            ValueError: a risk outside [0, 1].
        """
        if risk is None:
            return None
        if not 0.0 <= risk <= 1.0:
            raise ValueError(f"risk must lie in [0, 1] or be None; got {risk}")
        mapped = self._tempered(risk) if self.temperature is not None else self._interpolated(risk)
        return 0.0 if mapped <= self.benign_floor else mapped

    def _tempered(self, risk: float) -> float:
        assert self.temperature is not None
        if risk in (0.0, 1.0):
            return risk
        # exp of a number that is never positive cannot overflow
        x = (math.log(risk) - math.log1p(-risk)) / self.temperature
        return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))

    def _interpolated(self, risk: float) -> float:
        import numpy as np

        xs, ys = zip(*self.knots, strict=True)
        # Rounding can leave the interval by one unit in the last place.
        return min(max(float(np.interp(risk, xs, ys)), ys[0]), ys[-1])

    def save(self, path: Path) -> None:
        """Write the calibration as a JSON file, which appears whole or not at all."""
        scratch = path.with_name(path.name + ".partial")
        scratch.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read a calibration.

        Raises:
            DataError: no such file, or one that holds no calibration.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"calibration '{path}': no such file; fit one, or correct the path") from error
        except OSError as error:
            raise DataError(f"calibration '{path}' cannot be read ({error.strerror}); check the path") from error
        except UnicodeDecodeError as error:
            raise DataError(f"calibration '{path}' is no UTF-8 text; give the JSON file of a fitted one") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(
                f"calibration '{path}' is not one ({where}: {first['msg']}); fit it again for the guard that is to carry it"
            ) from error
