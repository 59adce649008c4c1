"""What pictures are measured by beside rewards: image health, diversity, and intervals of the means."""

from fdfo_engine.metrics.diversity import DIVERSITY, DiversityMeasure
from fdfo_engine.metrics.health import HEALTH, HealthMeasure, health_drift, measure_health
from fdfo_engine.metrics.intervals import Interval, bootstrap_interval, t_interval

__all__ = [
    "DIVERSITY",
    "HEALTH",
    "DiversityMeasure",
    "HealthMeasure",
    "Interval",
    "bootstrap_interval",
    "health_drift",
    "measure_health",
    "t_interval",
]
