"""From numbers to judgements: what is green, amber or red, why, and what to do about it.

All limits are here, with where they come from. A judgement uses the interval, not the number alone: what the sample
cannot show is not said. It knows the names of metrics, and nothing of how they were computed.
"""

import math
from collections.abc import Iterator, Sequence

from trl_ext.evaluation.probes import ProbeResult
from trl_ext.evaluation.report.findings import Findings, Verdict


# Our choices; each is stated in the guide beside the metric.
CALIBRATION_LIMIT = 0.1  # expected calibration error
TIES_LIMIT = 0.05  # share of decided pairs with equal scores
OMITTED_LIMIT = 0.01  # share of rows without a score
LENGTH_LIMIT = 0.3  # correlation of score and length within pairs: a medium effect after J. Cohen
SIGNAL_LIMIT = 0.2  # share of prompts whose samples all get the same score
VARIANCE_LIMIT = 0.1  # share of the score's variance that lies within prompts
DRIFT_LIMIT = 0.1  # change of the accuracy from the first to the last row
POSITION_LIMIT = 0.1  # correlation of score and place: a small effect after J. Cohen
PROBE_LIMIT = 0.5  # a bias that the probes must be able to show, in sd of the score: a medium effect after J. Cohen
PRECISION_LIMIT = 0.05  # an accuracy whose detectable difference is larger says little


def judge_report(report: Findings) -> list[Verdict]:
    """All verdicts on a report, the bad ones first."""
    verdicts = [verdict for prefix in report.prefixes() for verdict in _of_prefix(report, prefix)]
    verdicts += list(_of_probes(report.probes))
    total = report.settings.get("rows", 0)
    lost = sum(report.omitted.values())
    if total and lost / total > OMITTED_LIMIT:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.omitted.items())
        verdicts.append(
            Verdict("omitted_rows", "look", f"{lost} of {total} rows do not count ({reasons}).", "Mend these rows.")
        )
    order = {"bad": 0, "look": 1, "good": 2}
    return sorted(verdicts, key=lambda verdict: order[verdict.level])


def _of_prefix(report: Findings, prefix: str) -> Iterator[Verdict]:
    metrics = {k.removeprefix(prefix): v for k, v in report.metrics.items() if k.startswith(prefix)}
    intervals = {k.removeprefix(prefix): v for k, v in report.intervals.items() if k.startswith(prefix)}
    where = f" on {prefix[:-1]}" if prefix else ""
    if "length_accuracy" in metrics and not math.isnan(metrics["accuracy"]):
        yield from _of_accuracy(metrics, intervals, report.detectable.get(f"{prefix}accuracy"), where)
    if "auc" in metrics and "auc" in intervals:
        value, (low, high) = metrics["auc"], intervals["auc"]
        if low <= 0.5:
            yield _chance(f"The AUC{where} is {value:.3f} ({low:.3f} to {high:.3f})", high)
        else:
            yield Verdict("auc", "good", f"The AUC{where} is {value:.3f} ({low:.3f} to {high:.3f}).")
        within = metrics.get("within_prompt_auc", math.nan)
        if low > 0.5 and intervals.get("within_prompt_auc", (within, within))[0] <= 0.5:
            yield Verdict(
                "difficulty_only",
                "look",
                f"Among solutions of one prompt{where} the AUC is {within:.3f}: not shown to differ from chance.",
                "The model may know which prompts are easy, not which solution is right. Train on several solutions "
                "of each prompt before you use it for best-of-n.",
            )
    ece = metrics.get("ece", math.nan)
    if ece > CALIBRATION_LIMIT:
        yield Verdict(
            "miscalibrated",
            "look",
            f"Scores{where} are off by {ece:.2f} on average when read as log-odds (ECE).",
            "Fit a temperature on held-out pairs before you use scores as probabilities; rankings do not change.",
        )
    if metrics.get("prompts_without_signal", 0.0) > SIGNAL_LIMIT:
        yield Verdict(
            "no_signal",
            "bad",
            f"{metrics['prompts_without_signal']:.0%} of the prompts{where} get the same score for all samples.",
            "A policy learns nothing from them: sample with a higher temperature, or choose harder or easier prompts.",
        )
    share = metrics.get("within_prompt_variance_share", math.nan)
    if share < VARIANCE_LIMIT:
        yield Verdict(
            "low_reward_variance",
            "look",
            f"Only {share:.1%} of the score's variance{where} lies within prompts.",
            "With little variance a policy learns slowly (arXiv 2503.15477). Train it on the policy's samples.",
        )
    if "loss_at_largest_n" in intervals and intervals["loss_at_largest_n"][1] < 0:
        yield Verdict(
            "over_optimisation",
            "bad",
            f"Picking the best of the most samples{where} is worse by {-metrics['loss_at_largest_n']:.3g} gold reward "
            f"than the best n, {metrics.get('best_n', math.nan):.0f}.",
            f"Stay at or below n = {metrics.get('predicted_n', math.nan):.0f} (predicted on other prompts).",
        )
    if math.isfinite(metrics.get("gain", math.nan)):
        low, high = intervals.get("gain", (metrics["gain"], metrics["gain"]))
        if low > 0:
            yield Verdict(
                "gain", "good", f"Best-of-n gains {metrics['gain']:.3g} gold reward ({low:.3g} to {high:.3g})."
            )
        else:
            yield Verdict(
                "no_gain",
                "bad",
                f"Best-of-n is not shown to gain anything ({metrics['gain']:.3g}, {low:.3g} to {high:.3g}).",
                "Do not select with this model.",
            )
    yield from _of_order(metrics, intervals, where)
    if "f1" in metrics and "step_auc" in intervals and intervals["step_auc"][0] > 0.5:
        yield Verdict(
            "steps",
            "good",
            f"F1 of the first wrong step is {metrics['f1']:.3f} at a threshold chosen on other prompts. The AUC over "
            f"steps is {metrics['step_auc']:.3f}.",
        )
    elif "step_auc" in metrics:
        high = intervals.get("step_auc", (0.0, 1.0))[1]
        yield _chance(f"The AUC over steps{where} is {metrics['step_auc']:.3f}", high)


def _chance(what: str, high: float) -> Verdict:
    """The verdict on a number whose interval holds 0.5, or ends below it at `high`."""
    if high < 0.5:
        advice = "Check that higher scores mean better, and that chosen and rejected are not swapped."
        return Verdict("chance", "bad", f"{what}: worse than chance.", advice)
    advice = "Train longer or on more data, or evaluate on more rows."
    return Verdict("chance", "bad", f"{what}: not shown to differ from chance.", advice)


def _of_order(metrics: dict[str, float], intervals: dict[str, tuple[float, float]], where: str) -> Iterator[Verdict]:
    drift, (low, high) = metrics.get("accuracy_drift", math.nan), intervals.get("accuracy_drift", (0.0, 0.0))
    if abs(drift) > DRIFT_LIMIT and (low > 0 or high < 0):
        yield Verdict(
            "accuracy_drift",
            "look",
            f"The accuracy{where} changes by {drift:+.2f} ({low:.2f} to {high:.2f}) from the first row to the last.",
            "The file is in an order that matters: shuffle before you take its first rows or split it.",
        )
    place, (low, high) = metrics.get("position_correlation", math.nan), intervals.get("position_correlation", (0, 0))
    if abs(place) > POSITION_LIMIT and (low > 0 or high < 0):
        way = "later" if place > 0 else "earlier"
        yield Verdict(
            "position_bias",
            "look",
            f"Candidates that stand {way} in a row{where} score higher than their ratings explain (correlation "
            f"{place:.2f}, {low:.2f} to {high:.2f}).",
            "The model does not see the place. Look for what comes with it in the texts, length for example.",
        )


def _of_accuracy(
    metrics: dict[str, float],
    intervals: dict[str, tuple[float, float]],
    detectable: float | None,
    where: str,
) -> Iterator[Verdict]:
    accuracy, pair = metrics["accuracy"], metrics["pair_accuracy"]
    longer, shorter = metrics["length_accuracy"], metrics["shorter_accuracy"]  # equal lengths are right in neither
    baseline = max(longer, shorter)
    low, high = intervals.get("pair_accuracy", (-math.inf, math.inf))
    shown = f"{pair:.3f}" + (f" ({low:.3f} to {high:.3f})" if math.isfinite(low) else "")
    if low <= 0.5:
        # equal scores count as wrong: a model that ties all pairs is not worse than chance
        yield _chance(f"{shown} of the pairs{where} are ordered right", high + metrics.get("tied_scores", 0.0) / 2)
    elif low <= baseline:
        way = "longer" if longer >= shorter else "shorter"
        yield Verdict(
            "not_better_than_length",
            "bad",
            f"{shown} of the pairs{where} are ordered right; always preferring the {way} one gives {baseline:.3f}.",
            "Until the interval lies above the baseline, assume that the model has learnt length.",
        )
    else:
        yield Verdict(
            "accuracy",
            "good",
            f"{shown} of the pairs{where} are ordered right, above what length alone gives ({baseline:.3f}); "
            f"accuracy by row is {accuracy:.3f}.",
        )
    correlation = metrics.get("length_correlation", math.nan)
    if abs(correlation) > LENGTH_LIMIT:
        yield Verdict(
            "length_bias",
            "look",
            f"Score and length correlate by {correlation:.2f} within pairs{where}; without its linear part in length "
            f"the accuracy is {metrics.get('length_controlled_accuracy', math.nan):.3f}.",
            "Balance lengths in the training data, or add margins or a length penalty.",
        )
    if metrics.get("tied_scores", 0.0) > TIES_LIMIT:
        yield Verdict(
            "tied_scores",
            "look",
            f"{metrics['tied_scores']:.1%} of the pairs{where} get equal scores.",
            "Keep the head in fp32; bf16 rounds scores of 4 to 8 to steps of 0.03.",
        )
    if detectable is not None and detectable > PRECISION_LIMIT:
        yield Verdict(
            "small_sample",
            "look",
            f"This sample shows a difference in accuracy{where} only from {detectable:.2f} on (80 % power).",
            "Evaluate on more rows before you compare models.",
        )


def _of_probes(probes: Sequence[ProbeResult]) -> Iterator[Verdict]:
    flags: dict[str, list[ProbeResult]] = {}
    for probe in probes:
        if probe.found and probe.flag != "ignores_truncation":
            flags.setdefault(probe.flag, []).append(probe)
    for flag, found in flags.items():
        moves = ", ".join(f"{probe.effect:+.2f} sd when {probe.says}" for probe in found)
        yield Verdict(
            flag,
            "look",
            f"The score moves by {moves} (p {'=' if len(found) == 1 else '<='} {max(p.p_value for p in found):.2g}).",
            "A policy will find this: add such completions as rejected ones, or filter for them.",
        )
    for probe in probes:
        if probe.found and probe.flag == "ignores_truncation":
            yield Verdict(
                probe.flag,
                "bad",
                f"Cutting off the second half of a completion changes its score by {probe.effect:+.2f} sd.",
                "A model that does not miss half an answer has not learnt what an answer is.",
            )
    if probes and not any(probe.found for probe in probes):
        effects = [probe.detectable for probe in probes if probe.detectable is not None]
        if effects and max(effects) > PROBE_LIMIT:
            yield Verdict(
                "few_probe_rows",
                "look",
                f"None of {len(probes)} bias probes finds a bias, but not all of them could have: one shows an effect "
                f"only from {max(effects):.2f} sd on.",
                "Evaluate on more rows, or raise probe_rows.",
            )
        elif effects:
            yield Verdict(
                "probes",
                "good",
                f"None of {len(probes)} bias probes moves the score; from {max(effects):.2f} sd on it would show.",
            )
