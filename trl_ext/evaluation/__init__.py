"""Is this reward model any good? Benchmarks, bias probes, intervals, and reports that say what to do."""

from trl_ext.evaluation.evaluate import evaluate_reward_model
from trl_ext.evaluation.report.evaluation_report import EvaluationReport


__all__ = ["EvaluationReport", "evaluate_reward_model"]
