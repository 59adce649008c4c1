"""The settings of the three churn schedules."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fdfo_engine.config.section import Section


class RawChurn(Section):
    """The same churn at every grid point but the last."""

    schedule: Literal["raw"] = "raw"
    """Name of the schedule."""

    weight: float = Field(default=0.0025, ge=0)
    """gamma of each grid point; 0 makes the two images of a pair equal."""


class PriorChurn(Section):
    """Churn on the initial noise only."""

    schedule: Literal["prior"]
    """Name of the schedule."""

    weight: float = Field(gt=0)
    """Median over pairs of log(1 + gamma) at t = 1."""

    weight_sigma: float = Field(default=0.0, ge=0)
    """Standard deviation of the log of the weight over pairs; 0 gives all pairs the same."""


class IntervalChurn(Section):
    """Churn on a stretch of the grid, whose centre is drawn for each pair."""

    schedule: Literal["interval"]
    """Name of the schedule."""

    weight: float = Field(default=1.0, ge=0)
    """Sum over the grid of log(1 + gamma)."""

    mu: float = 1.0
    """Mean of the centre, in logits of t."""

    sigma: float = Field(default=1.5, ge=0)
    """Standard deviation of the centre over pairs, in logits of t."""

    soft_sigma: float = Field(default=0.25, gt=0)
    """Width of the stretch, in logits of t."""


def _schedule(value: Any) -> str | None:
    """The tag of a churn section: `raw` where none is given."""
    found = value.get("schedule", "raw") if isinstance(value, dict) else getattr(value, "schedule", None)
    return found if isinstance(found, str) else None


ChurnConfig = Annotated[
    Annotated[RawChurn, Tag("raw")] | Annotated[PriorChurn, Tag("prior")] | Annotated[IntervalChurn, Tag("interval")],
    Discriminator(_schedule),
]
