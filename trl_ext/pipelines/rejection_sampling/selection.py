"""Selectors: choose scored samples for fine-tuning, as preference pairs, or as ranked groups.

[`select`] removes the samples that no selector should see and passes the rest, sorted, to a selector of the registry.
Selectors work on the arrays of `scored`.

Ties are always decided in the same way. Among equal scores of a prompt the lowest sample index comes first; among
prompts the one that comes first in the data set.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from trl_ext.pipelines.rejection_sampling.scored import Scored, Selection, group_numbers
from trl_ext.pipelines.user_functions import callable_name
from trl_ext.registry import Registry


selectors = Registry(kind="selector", group="trl_ext.selectors")


def select(
    scored: Scored, selection: str | Callable = "top_per_prompt", *, drop_truncated: bool = False, **kwargs: Any
) -> Selection:
    """
    Select samples.

    First, samples without a score are removed. Then, if `drop_truncated` is set, those that were cut at the length
    limit. Last, exact duplicates within a prompt (the one with the lowest sample index stays). The selector gets the
    rest sorted by prompt, then best first, then by sample index. Some selectors also get the duplicates: the random
    controls, which draw each text as often as the policy generates it, and `budget_by_difficulty`, which measures how
    often the policy is right.

    Args:
        scored ([`Scored`]):
            All samples. Their order does not change the result.
        selection (`str` or `Callable`, *optional*, defaults to `"top_per_prompt"`):
            A selector by name, or a function `(Scored, **kwargs) -> Selection`, which gets the samples as described
            above.
        drop_truncated (`bool`, *optional*, defaults to `False`):
            Remove samples that were cut at the length limit. `SFTTrainer` would append an EOS to them.
        kwargs:
            Options of the selector.

    Returns:
        [`Selection`]: row numbers of `scored`. Its `counts` hold the selector's counts and: `samples` (all);
        `unscorable`, `truncated_dropped` and `duplicates` (removed, in this order); `candidates` (the rest);
        `truncated` (candidates that were cut); `prompts` (with samples), `prompts_selected`, and `selected` (samples,
        pairs or groups).

    Raises:
        ValueError: the selector does not have an option, or a sample occurs twice.

    Example:

    ```python
    >>> scored = Scored([0, 0, 1, 1], [0, 1, 0, 1], [0.3, 0.7, np.nan, 0.1], [1, 2, 3, 4], [5, 5, 5, 5], [True] * 4)
    >>> chosen = select(scored, "top_per_prompt")
    >>> chosen.rows.tolist(), chosen.counts["unscorable"]
    ([1, 3], 1)
    ```
    """
    function = selectors.get(selection)
    _check_options(function, selection, kwargs)
    order = np.lexsort((scored.sample, scored.prompt))
    twice = np.flatnonzero((np.diff(scored.prompt[order]) == 0) & (np.diff(scored.sample[order]) == 0))
    if len(twice):
        row = order[twice[0]]
        raise ValueError(
            f"Sample {scored.sample[row]} of prompt {scored.prompt[row]} occurs more than once ({len(twice)} such "
            "samples). Each sample of a prompt needs a different index."
        )
    counts = {"samples": len(scored), "prompts": len(np.unique(scored.prompt))}

    rows = order[~np.isnan(scored.score[order])]
    counts["unscorable"] = len(order) - len(rows)
    kept = rows[scored.finished[rows]] if drop_truncated else rows
    counts["truncated_dropped"] = len(rows) - len(kept)
    counts["duplicates"] = 0
    if function not in _SEE_DUPLICATES:  # after truncated samples are removed: the same text may also occur uncut
        distinct = _first_of_each_text(scored.prompt[kept], scored.text_hash[kept])
        counts["duplicates"] = len(kept) - len(distinct)
        kept = kept[distinct]
    counts["candidates"] = len(kept)
    counts["truncated"] = int((~scored.finished[kept]).sum())

    kept = kept[np.lexsort((scored.sample[kept], -scored.score[kept], scored.prompt[kept]))]
    chosen = function(scored.take(kept), **kwargs)
    counts |= chosen.counts
    counts["prompts_selected"] = len(np.unique(scored.prompt[kept[chosen.rows]]))
    counts["selected"] = len(chosen.rows) if chosen.starts is None else len(chosen.starts)
    rejected = None if chosen.rejected is None else kept[chosen.rejected]
    return replace(chosen, rows=kept[chosen.rows], rejected=rejected, counts=counts)


@selectors.register("top_per_prompt")
def top_per_prompt(scored: Scored, n: int = 1) -> Selection:
    """
    The `n` best samples of each prompt (all samples of a prompt that has fewer).

    Args:
        n (`int`, *optional*, defaults to `1`): Samples per prompt.
    """
    _check_positive("n", n)
    return Selection(np.flatnonzero(_rank(scored) < n))


@selectors.register("top_k_overall")
def top_k_overall(scored: Scored, k: int) -> Selection:
    """
    The `k` best samples of all prompts together, best first. An easy prompt may give several, a hard one none.

    Args:
        k (`int`): Total number of samples.
    """
    _check_positive("k", k)
    return Selection(np.lexsort((scored.sample, scored.prompt, -scored.score))[:k])


@selectors.register("threshold")
def threshold(scored: Scored, min_score: float, n: int | None = None) -> Selection:
    """
    Every sample with a score of at least `min_score`.

    Args:
        min_score (`float`): The lowest score to keep.
        n (`int`, *optional*): Keep at most the `n` best of a prompt. All by default.
    """
    good = scored.score >= min_score
    if n is not None:
        _check_positive("n", n)
        good &= _rank(scored) < n
    return Selection(np.flatnonzero(good))


@selectors.register("random_per_prompt")
def random_per_prompt(scored: Scored, like: str | Callable = "top_per_prompt", seed: int = 0, **kwargs) -> Selection:
    """
    The random control of a selector: it draws as many samples of each prompt as the selector, and ignores scores.

    All samples are equally likely, duplicates included, so a text is drawn as often as the policy generates it.
    Without duplicates, the texts that the policy is surest of would be drawn too seldom, and training on the control
    would do harm.

    Args:
        like (`str` or `Callable`, *optional*, defaults to `"top_per_prompt"`): The selector to match.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw.
        kwargs: Options of that selector.
    """
    matched = _matched(like, scored, kwargs)
    group, sizes = group_numbers(scored.prompt)
    wanted = np.bincount(group[matched], minlength=len(sizes))
    shuffled = np.lexsort((_uniform(scored, seed), group))  # still prompt after prompt
    return Selection(np.sort(shuffled[_position(sizes) < np.repeat(wanted, sizes)]))


@selectors.register("random_k_overall")
def random_k_overall(scored: Scored, like: str | Callable = "top_k_overall", seed: int = 0, **kwargs) -> Selection:
    """
    The random control of a selector: it draws as many samples in all as the selector, and ignores scores. Duplicates
    are as likely as any other sample.

    Args:
        like (`str` or `Callable`, *optional*, defaults to `"top_k_overall"`): The selector to match.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw.
        kwargs: Options of that selector.
    """
    wanted = len(_matched(like, scored, kwargs))
    return Selection(np.sort(np.argsort(_uniform(scored, seed), kind="stable")[:wanted]))


@selectors.register("best_worst_pairs")
def best_worst_pairs(scored: Scored, min_margin: float = 0.0) -> Selection:
    """
    The best and the worst sample of each prompt, as a preference pair with the difference of their scores.

    A prompt whose samples all have the same score gives no pair; `no_spread` counts such prompts. `below_margin`
    counts prompts whose difference is below `min_margin`.

    Args:
        min_margin (`float`, *optional*, defaults to `0.0`): The smallest difference to keep.
    """
    _, sizes = group_numbers(scored.prompt)
    if not len(sizes):
        return Selection(_none(), rejected=_none(), margin=np.zeros(0), counts={"no_spread": 0, "below_margin": 0})
    best = np.cumsum(sizes) - sizes
    lowest = np.repeat(scored.score[best + sizes - 1], sizes)
    index = np.arange(len(scored))
    worst = np.minimum.reduceat(np.where(scored.score == lowest, index, len(scored)), best)
    spread = scored.score[best] > scored.score[worst]
    best, worst = best[spread], worst[spread]
    margin = scored.score[best] - scored.score[worst]
    wide = margin >= min_margin
    counts = {"no_spread": int((~spread).sum()), "below_margin": int((~wide).sum())}
    return Selection(best[wide], rejected=worst[wide], margin=margin[wide], counts=counts)


@selectors.register("rso")
def rso(scored: Scored, n: int = 8, beta: float = 0.5, seed: int = 0, pairs: bool = False) -> Selection:
    r"""
    Statistical rejection sampling: `n` samples per prompt that follow the policy tilted by the reward.

    See *Statistical Rejection Sampling Improves Preference Optimization* by Liu et al.
    (https://huggingface.co/papers/2309.06657), algorithm 1. It goes through the samples in the order in which they
    were drawn and accepts each with probability \\( \exp((r - r_{max}) / \beta) \\), where \\( r_{max} \\) is the
    highest score among those not accepted yet. It repeats this with the rest until `n` are accepted or none is left.
    Small `beta` gives the best `n`, large `beta` a random `n`.

    Args:
        n (`int`, *optional*, defaults to `8`): Samples per prompt (the paper takes 8 of 64).
        beta (`float`, *optional*, defaults to `0.5`): Temperature, in units of the score (the paper's value).
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.
        pairs (`bool`, *optional*, defaults to `False`): Pair the accepted samples two by two in the order of
            acceptance, with the better one as chosen (the paper's first-round ranking). Equal scores make no pair;
            `no_spread` counts them.
    """
    _check_positive("n", n)
    if not beta > 0:
        raise ValueError(f"beta={beta} of the selector 'rso' is not positive. It is in units of the score, e.g. 0.5.")
    rows = np.lexsort((scored.sample, scored.prompt))  # the order in which they were drawn
    drawn = scored.take(rows)
    group, sizes = group_numbers(drawn.prompt)
    accepted_in = np.full(len(rows), -1)  # the pass in which a row was accepted
    for turn in range(n):  # each pass accepts at least the best of the rest, so n passes are enough
        taken = np.bincount(group[accepted_in >= 0], minlength=len(sizes))
        left = np.flatnonzero((accepted_in < 0) & (taken < n)[group])
        if not len(left):
            break
        top = np.full(len(sizes), -np.inf)
        np.maximum.at(top, group[left], drawn.score[left])
        at_top = drawn.score[left] == top[group[left]]
        with np.errstate(invalid="ignore", over="ignore"):  # infinite scores; an infinite maximum is accepted
            chance = np.exp((drawn.score[left] - top[group[left]]) / beta)
        passed = left[at_top | (_uniform(drawn, seed, turn)[left] < chance)]
        counts = np.bincount(group[passed], minlength=len(sizes))
        room = (n - taken)[group[passed]]
        accepted_in[passed[_position(counts) < room]] = turn
    accepted = np.flatnonzero(accepted_in >= 0)
    if not pairs:
        return Selection(np.sort(rows[accepted]))
    accepted = accepted[np.lexsort((accepted, accepted_in[accepted], group[accepted]))]
    counts = np.bincount(group[accepted], minlength=len(sizes))
    place = _position(counts)
    paired = place < (counts // 2 * 2)[group[accepted]]
    first, second = rows[accepted[paired & (place % 2 == 0)]], rows[accepted[paired & (place % 2 == 1)]]
    chosen = np.where(scored.score[first] >= scored.score[second], first, second)
    rejected = np.where(scored.score[first] >= scored.score[second], second, first)
    spread = scored.score[chosen] > scored.score[rejected]
    chosen, rejected = chosen[spread], rejected[spread]
    margin = scored.score[chosen] - scored.score[rejected]
    return Selection(chosen, rejected=rejected, margin=margin, counts={"no_spread": int((~spread).sum())})


@selectors.register("ranked_groups")
def ranked_groups(scored: Scored) -> Selection:
    """
    All samples of each prompt as one ranked group, with the scores as ratings: data for `RewardTrainer`.

    Prompts whose samples all have the same score give no order and are dropped; `no_spread` counts them.
    """
    group, sizes = group_numbers(scored.prompt)
    first = np.cumsum(sizes) - sizes
    spread = scored.score[first] > scored.score[first + sizes - 1]
    kept = sizes[spread]
    counts = {"no_spread": int((~spread).sum())}
    return Selection(np.flatnonzero(spread[group]), starts=np.cumsum(kept) - kept, counts=counts)


@selectors.register("budget_by_difficulty")
def budget_by_difficulty(
    scored: Scored, min_score: float = 1.0, n: int | None = None, k: int | None = None
) -> Selection:
    """
    Right samples of the prompts that are neither solved nor hopeless.

    A sample is right if its score is at least `min_score`. Prompts whose samples are all right or all wrong are
    dropped (`all_right`, `all_wrong` count them). Of the other prompts the right samples are taken, exact duplicates
    once. If there are more than `k`, the best of each prompt come first, then the second best, and so on; within each
    turn the hardest prompts come first. A prompt is hard if a small share of its samples, duplicates included, is
    right: this share estimates how often the policy is right.

    Args:
        min_score (`float`, *optional*, defaults to `1.0`): The lowest score of a right sample.
        n (`int`, *optional*): Largest number of samples per prompt. All by default.
        k (`int`, *optional*): Largest number of samples in all. All by default.
    """
    for name, value in (("n", n), ("k", k)):
        if value is not None:
            _check_positive(name, value)
    group, sizes = group_numbers(scored.prompt)
    right = scored.score >= min_score
    share = np.bincount(group[right], minlength=len(sizes)) / np.maximum(sizes, 1)
    counts = {"all_right": int((share == 1).sum()), "all_wrong": int((share == 0).sum())}
    distinct = _distinct(scored)
    counts |= {"duplicates": int((~distinct).sum()), "candidates": int(distinct.sum())}
    before = np.cumsum(distinct) - distinct  # number of distinct samples before a row
    rank = before - before[np.cumsum(sizes) - sizes][group] if len(sizes) else before  # the same within its prompt
    kept = distinct & right & (share < 1)[group]
    if n is not None:
        kept &= rank < n
    rows = np.flatnonzero(kept)
    if k is not None:
        rows = np.sort(rows[np.lexsort((rows, share[group[rows]], rank[rows]))[:k]])
    return Selection(rows, counts=counts)


_SEE_DUPLICATES = (random_per_prompt, random_k_overall, budget_by_difficulty)


def check_selection(
    selection: str | Callable, kwargs: dict[str, Any] | None = None, kinds: tuple[str, ...] = ()
) -> None:
    """
    Check before anything is generated that a selector exists, has these options, and gives the right kind of result.

    Args:
        selection (`str` or `Callable`): a selector.
        kwargs (`dict`, *optional*): its options.
        kinds (`tuple[str, ...]`, *optional*): allowed kinds of result: `"rows"`, `"pairs"`, `"groups"`. All by
            default.

    Raises:
        ValueError: the name is unknown (the error names the nearest), the selector does not have an option or refuses
            its value, or it gives another kind of result.
    """
    function, kwargs = selectors.get(selection), kwargs or {}
    _check_options(function, selection, kwargs)
    if "like" in kwargs:
        selectors.get(kwargs["like"])
    if not function.__module__.startswith("trl_ext."):
        return  # a plugin may need other samples than these
    tried = Scored([0, 0, 1, 1], [0, 1, 0, 1], [0.0, 1.0, 0.0, 1.0], [0, 1, 2, 3], [1] * 4, [True] * 4)
    found = select(tried, selection, **kwargs)
    if kinds and found.kind not in kinds:
        raise ValueError(
            f"selection={selection!r} gives {found.kind}, which supervised fine-tuning cannot use. Use a selector of "
            "samples here, and rejection_sample(...) for pairs and groups."
        )


def _check_options(function: Callable, selection: str | Callable, kwargs: dict[str, Any]) -> None:
    name = selection if isinstance(selection, str) else callable_name(function)
    try:
        inspect.signature(function).bind(None, **kwargs)
    except TypeError as error:
        known = ", ".join(list(inspect.signature(function).parameters)[1:]) or "none"
        raise ValueError(f"The selector '{name}' cannot be called: {error}. Its options: {known}.") from error


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} selects nothing. Needed: 1 or more.")


def _matched(like: str | Callable, scored: Scored, kwargs: dict[str, Any]) -> np.ndarray:
    """The rows that a selector takes from the samples that [`select`] would pass to it."""
    function = selectors.get(like)
    _check_options(function, like, kwargs)
    shown = np.arange(len(scored)) if function in _SEE_DUPLICATES else np.flatnonzero(_distinct(scored))
    matched = function(scored.take(shown), **kwargs)
    if matched.kind != "rows":
        raise ValueError(f"like={like!r} selects {matched.kind}; needed: a selector of samples, which can be matched.")
    return shown[matched.rows]


def _distinct(scored: Scored) -> np.ndarray:
    """Whether each row is the first with its text in its prompt, by sample index."""
    order = np.lexsort((scored.sample, scored.prompt))
    first = np.zeros(len(scored), dtype=bool)
    first[order[_first_of_each_text(scored.prompt[order], scored.text_hash[order])]] = True
    return first


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


def _first_of_each_text(prompt: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Positions of the first row of each (prompt, text), ascending."""
    order = np.lexsort((text, prompt))  # stable: equal rows stay in their order
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(prompt[order]) != 0) | (text[order][1:] != text[order][:-1])
    return np.sort(order[new])


def _position(sizes: np.ndarray) -> np.ndarray:
    """The place of each row in its group (0, 1, ...), for consecutive groups of these sizes."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _rank(scored: Scored) -> np.ndarray:
    """The rank of each row within its prompt, 0 = best, for rows in the order of [`select`]."""
    return _position(group_numbers(scored.prompt)[1])


def _uniform(scored: Scored, *seeds: int) -> np.ndarray:
    """A number in [0, 1) for each row. It depends only on prompt, sample and seeds, not on other rows."""
    mixed = np.zeros(len(scored), dtype=np.uint64)
    for part in (*(np.uint64(seed % 2**64) for seed in seeds), scored.prompt.astype(np.uint64), scored.sample):
        mixed = _mix(mixed ^ _mix(np.asarray(part).astype(np.uint64)))
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing function (Steele, Lea and Flood 2014) for each element. It overflows on purpose."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
