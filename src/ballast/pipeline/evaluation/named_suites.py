"""Published prompt sets by name: which column holds the request, of what kind a row is, and where the set is published.

A set keeps the columns that its authors gave it; its mirrors on the hub call the request `prompt`. Both layouts are
read. Which of them were tried on real rows is told in docs/evaluation.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ballast.errors import DataError
from ballast.pipeline.evaluation.suites import Kind


@dataclass(frozen=True)
class HubPlace:
    """A data set of the hub."""

    name: str
    split: str = "train"
    config: str | None = None


@dataclass(frozen=True)
class NamedSuite:
    """How the rows of one published set are read.

    Attributes:
        name: as a data source names it.
        title: with its source.
        licence: of the prompts, as the hub's card or the repository says.
        hub: where the name alone takes it from.
        prompts: columns that may hold the request; the first that the table has does.
        categories: the same for the topic; none of them need be there.
        kind: the kind of a record; None leaves the record out. The check of a kind that no set has is the caller's.
        needs: columns of which `kind` needs one.
    """

    name: str
    title: str
    licence: str
    hub: HubPlace
    prompts: tuple[str, ...]
    categories: tuple[str, ...]
    kind: Callable[[Mapping[str, Any]], str | None]
    needs: tuple[str, ...] = ()

    def prompt_column(self, columns: Sequence[str], source: str) -> str:
        """The column of the request.

        Raises:
            DataError: the table has none of those, or none that tells the kinds apart.
        """
        found = next((name for name in self.prompts if name in columns), None)
        if found is None or (self.needs and not set(self.needs) & set(columns)):
            lacks = self.prompts if found is None else self.needs
            raise DataError(
                f"data source '{source}' is no table of {self.name}: it has the columns {', '.join(columns)}, and none of "
                f"{', '.join(lacks)}; give the set's own file, or leave '{self.name}:' out and name the columns in "
                "data.prompt_column and data.kind_column"
            )
        return found

    def category(self, record: Mapping[str, Any]) -> str | None:
        """The topic of a record, in the set's own words; None where it has none."""
        return next((str(record[name]) for name in self.categories if record.get(name)), None)


def _all(kind: Kind) -> Callable[[Mapping[str, Any]], str]:
    return lambda record: kind


def _xstest(record: Mapping[str, Any]) -> str:
    """By label; the first version of the set has types alone, and its unsafe ones are named contrasts."""
    label = record.get("label")
    if label is None:
        label = "unsafe" if str(record["type"]).startswith("contrast_") else "safe"
    kinds: dict[Any, Kind] = {"safe": "scary", "unsafe": "harmful"}
    return kinds.get(label, str(label))


def _standard(record: Mapping[str, Any]) -> Kind | None:
    """Behaviours that stand alone: the others come with a text to read, or are about copyright."""
    return "harmful" if record.get("FunctionalCategory", "standard") == "standard" else None


_JBB = HubPlace("JailbreakBench/JBB-Behaviors", "harmful", "behaviors")

NAMED_SUITES: dict[str, NamedSuite] = {
    suite.name: suite
    for suite in (
        NamedSuite(
            "advbench",
            "AdvBench, harmful behaviours (Zou et al. 2023, arXiv 2307.15043)",
            "MIT",
            HubPlace("walledai/AdvBench"),
            ("goal", "prompt"),
            ("category",),
            _all("harmful"),
        ),
        NamedSuite(
            "harmbench",
            "HarmBench, standard behaviours (Mazeika et al. 2024, arXiv 2402.04249)",
            "MIT",
            HubPlace("walledai/HarmBench", config="standard"),
            ("Behavior", "prompt"),
            ("SemanticCategory", "category"),
            _standard,
        ),
        NamedSuite(
            "jbb-harmful",
            "JailbreakBench, harmful behaviours (Chao et al. 2024, arXiv 2404.01318)",
            "MIT",
            _JBB,
            ("Goal", "prompt"),
            ("Category", "category"),
            _all("harmful"),
        ),
        NamedSuite(
            "jbb-benign",
            "JailbreakBench, benign behaviours on the same topics (Chao et al. 2024, arXiv 2404.01318)",
            "MIT",
            HubPlace(_JBB.name, "benign", _JBB.config),
            ("Goal", "prompt"),
            ("Category", "category"),
            _all("scary"),
        ),
        NamedSuite(
            "xstest",
            "XSTest, safe prompts that sound unsafe and unsafe contrasts (Röttger et al. 2023, arXiv 2308.01263)",
            "CC-BY-4.0",
            HubPlace("walledai/XSTest", "test"),
            ("prompt",),
            ("type",),
            _xstest,
            needs=("label", "type"),
        ),
        NamedSuite(
            "strongreject",
            "StrongREJECT, forbidden prompts (Souly et al. 2024, arXiv 2402.10260)",
            "MIT",
            HubPlace("walledai/StrongREJECT"),
            ("forbidden_prompt", "prompt"),
            ("category",),
            _all("harmful"),
        ),
        NamedSuite(
            "do-not-answer",
            "Do-Not-Answer (Wang et al. 2023, arXiv 2308.13387)",
            "Apache-2.0 by its card on the hub",
            HubPlace("LibrAI/do-not-answer"),
            ("question", "prompt"),
            ("risk_area", "category"),
            _all("harmful"),
        ),
    )
}
