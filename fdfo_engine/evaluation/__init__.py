"""Scores churn-free images of fixed prompts and seeds: while a run trains, and base against tuned afterwards."""

from fdfo_engine.evaluation.heldout import Evaluation, evaluate, evaluation_list, evaluation_prompts, metric_rewards

__all__ = ["Evaluation", "evaluate", "evaluation_list", "evaluation_prompts", "metric_rewards"]
