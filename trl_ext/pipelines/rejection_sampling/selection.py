"""Selectors: which scored samples are kept, to fine-tune on, as preference pairs, or as ranked groups.

[`select`] leaves out the samples that no selector should see and hands the rest, sorted, to a selector of the
registry. All of it works on the arrays of `scored`.

Ties are decided the same way each time: among equal scores of a prompt the lowest sample index comes first, and among
prompts the one that comes first in the data set.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from trl_ext.pipelines.rejection_sampling.scored import Scored, Selection, group_numbers
from trl_ext.registry import Registry


selectors = Registry(kind="selector", group="trl_ext.selectors")


def select(
    scored: Scored, selection: str | Callable = "top_per_prompt", *, drop_truncated: bool = False, **kwargs: Any
) -> Selection:
    """
    Select samples.

    Samples without a score are left out, then on request those that were cut off at the length limit, and then exact
    duplicates within a prompt (the one with the lowest sample index stays). The selector gets the rest sorted by
    prompt, then best first, then by sample index. Some selectors also get the duplicates: the random controls, which
    draw each text as often as the policy generates it, and `budget_by_difficulty`, which measures how often the policy
    is right.

    Args:
        scored ([`Scored`]):
            All samples, in any order, which does not matter for the result.
        selection (`str` or `Callable`, *optional*, defaults to `"top_per_prompt"`):
            A selector by name, or a function `(Scored, **kwargs) -> Selection` that gets what is described above.
        drop_truncated (`bool`, *optional*, defaults to `False`):
            Leave out samples that did not end by themselves. `SFTTrainer` puts an EOS behind them.
        kwargs:
            Options of the selector.

    Returns:
        [`Selection`]: with row numbers of `scored`, and in its `counts`, beside what the selector counts: `samples`
        all; `unscorable`, `truncated_dropped`, `duplicates` left out, in this order; `candidates` the rest;
        `truncated` those among the candidates; `prompts` with samples, `prompts_selected`, and `selected` samples,
        pairs or groups.

    Raises:
        ValueError: on an option that the selector does not have, or if a sample is there twice.

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
            f"Sample {scored.sample[row]} of prompt {scored.prompt[row]} is there more than once ({len(twice)} such "
            "samples). Each sample of a prompt needs an index of its own."
        )
    counts = {"samples": len(scored), "prompts": len(np.unique(scored.prompt))}

    rows = order[~np.isnan(scored.score[order])]
    counts["unscorable"] = len(order) - len(rows)
    kept = rows[scored.finished[rows]] if drop_truncated else rows
    counts["truncated_dropped"] = len(rows) - len(kept)
    counts["duplicates"] = 0
    if function not in _SEE_DUPLICATES:  # after what was cut: a text that is whole may have been cut elsewhere
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
    The `n` best samples of each prompt (all of a prompt that has fewer).

    Args:
        n (`int`, *optional*, defaults to `1`): Samples a prompt.
    """
    _check_positive("n", n)
    return Selection(np.flatnonzero(_rank(scored) < n))


@selectors.register("top_k_overall")
def top_k_overall(scored: Scored, k: int) -> Selection:
    """
    The `k` best samples of all prompts together, best first. Easy prompts may give several, hard ones none.

    Args:
        k (`int`): Samples in all.
    """
    _check_positive("k", k)
    return Selection(np.lexsort((scored.sample, scored.prompt, -scored.score))[:k])


@selectors.register("threshold")
def threshold(scored: Scored, min_score: float, n: int | None = None) -> Selection:
    """
    Every sample with a score of at least `min_score`.

    Args:
        min_score (`float`): The lowest score to keep.
        n (`int`, *optional*): At most this many of a prompt, the best. All by default.
    """
    good = scored.score >= min_score
    if n is not None:
        _check_positive("n", n)
        good &= _rank(scored) < n
    return Selection(np.flatnonzero(good))


@selectors.register("random_per_prompt")
def random_per_prompt(scored: Scored, like: str | Callable = "top_per_prompt", seed: int = 0, **kwargs) -> Selection:
    """
    The random control of a selector: as many samples of each prompt as it selects, drawn without looking at scores.

    All samples are equally likely, duplicates included, so that a text is drawn as often as the policy generates it.
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
    The random control of a selector: as many samples in all as it selects, drawn without looking at scores.
    Duplicates are as likely as any sample.

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

    A prompt whose samples all have one score gives none; `no_spread` counts them, and `below_margin` those whose
    difference is under `min_margin`.

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
    Statistical rejection sampling: `n` samples a prompt that follow the policy tilted by the reward.

    See *Statistical Rejection Sampling Improves Preference Optimization* by Liu et al.
    (https://huggingface.co/papers/2309.06657), algorithm 1: going through the samples in the order in which they were
    drawn, each is accepted with probability \\( \exp((r - r_{max}) / \beta) \\), where \\( r_{max} \\) is the highest
    score that is left; then once more through those that are left, until there are `n` or none is left. Small `beta`
    gives the best `n`, large `beta` a random `n`.

    Args:
        n (`int`, *optional*, defaults to `8`): Samples a prompt (the paper's 8, of 64).
        beta (`float`, *optional*, defaults to `0.5`): Temperature, in units of the score (the paper's).
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.
        pairs (`bool`, *optional*, defaults to `False`): Pair the accepted two by two in the order of acceptance, the
            better one chosen (the paper's first-round ranking); equal scores make no pair, `no_spread` counts them.
    """
    _check_positive("n", n)
    if not beta > 0:
        raise ValueError(f"beta={beta} of the selector 'rso' is not positive. It is in units of the score, e.g. 0.5.")
    rows = np.lexsort((scored.sample, scored.prompt))  # the order in which they were drawn
    drawn = scored.take(rows)
    group, sizes = group_numbers(drawn.prompt)
    accepted_in = np.full(len(rows), -1)  # the pass in which a row was accepted
    for turn in range(n):  # the best that is left is accepted for certain, so n passes are enough
        taken = np.bincount(group[accepted_in >= 0], minlength=len(sizes))
        left = np.flatnonzero((accepted_in < 0) & (taken < n)[group])
        if not len(left):
            break
        top = np.full(len(sizes), -np.inf)
        np.maximum.at(top, group[left], drawn.score[left])
        at_top = drawn.score[left] == top[group[left]]
        with np.errstate(invalid="ignore", over="ignore"):  # infinities; where they are the top they are accepted
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

    Prompts whose samples all have one score say nothing about an order and are left out; `no_spread` counts them.
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
    dropped (`all_right`, `all_wrong` count them). The right samples of the others are taken, exact duplicates once. If
    they are more than `k`, the best of each prompt come first, then the second best, and so on; within each turn the
    hardest prompts come first. A prompt is hard if a small share of its samples is right, duplicates included: the
    share estimates how often the policy is right.

    Args:
        min_score (`float`, *optional*, defaults to `1.0`): The lowest score of a right sample.
        n (`int`, *optional*): At most this many of a prompt. All by default.
        k (`int`, *optional*): At most this many in all. All by default.
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
    before = np.cumsum(distinct) - distinct  # distinct samples before a row, in all
    rank = before - before[np.cumsum(sizes) - sizes][group] if len(sizes) else before  # and in its prompt
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
    Check before anything is generated that a selector exists, has these options, and gives what is needed.

    Args:
        selection (`str` or `Callable`): a selector.
        kwargs (`dict`, *optional*): its options.
        kinds (`tuple[str, ...]`, *optional*): what it may give: `"rows"`, `"pairs"`, `"groups"`. Anything by default.

    Raises:
        ValueError: an unknown name (with the nearest), an option that the selector does not have or cannot take, or
            another kind of result.
    """
    function, kwargs = selectors.get(selection), kwargs or {}
    _check_options(function, selection, kwargs)
    if "like" in kwargs:
        selectors.get(kwargs["like"])
    if not function.__module__.startswith("trl_ext."):
        return  # a plugin may want other samples than these
    tried = Scored([0, 0, 1, 1], [0, 1, 0, 1], [0.0, 1.0, 0.0, 1.0], [0, 1, 2, 3], [1] * 4, [True] * 4)
    found = select(tried, selection, **kwargs)
    if kinds and found.kind not in kinds:
        raise ValueError(
            f"selection={selection!r} gives {found.kind}, which are not for supervised fine-tuning. Use a selector of "
            "samples here, and rejection_sample(...) for pairs and groups."
        )


def _check_options(function: Callable, selection: str | Callable, kwargs: dict[str, Any]) -> None:
    name = selection if isinstance(selection, str) else function.__name__
    try:
        inspect.signature(function).bind(None, **kwargs)
    except TypeError as error:
        known = ", ".join(list(inspect.signature(function).parameters)[1:]) or "none"
        raise ValueError(f"The selector '{name}' cannot be called: {error}. Its options: {known}.") from error


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} selects nothing. Needed: 1 or more.")


def _matched(like: str | Callable, scored: Scored, kwargs: dict[str, Any]) -> np.ndarray:
    """The rows that a selector takes, of the samples that [`select`] would show it."""
    function = selectors.get(like)
    _check_options(function, like, kwargs)
    shown = np.arange(len(scored)) if function in _SEE_DUPLICATES else np.flatnonzero(_distinct(scored))
    matched = function(scored.take(shown), **kwargs)
    if matched.kind != "rows":
        raise ValueError(f"A random control matches a selector of samples; {like!r} selects {matched.kind}.")
    return shown[matched.rows]


def _distinct(scored: Scored) -> np.ndarray:
    """Which rows are the first of their text in a prompt, by sample index."""
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
    """0, 1, ... within each group, for groups of these sizes one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _rank(scored: Scored) -> np.ndarray:
    """Rank of each row within its prompt, 0 = best, of rows sorted as [`select`] sorts them."""
    return _position(group_numbers(scored.prompt)[1])


def _uniform(scored: Scored, *seeds: int) -> np.ndarray:
    """A number in [0, 1) for each row, from prompt, sample and seeds only: other rows do not change it."""
    mixed = np.zeros(len(scored), dtype=np.uint64)
    for part in (*(np.uint64(seed % 2**64) for seed in seeds), scored.prompt.astype(np.uint64), scored.sample):
        mixed = _mix(mixed ^ _mix(np.asarray(part).astype(np.uint64)))
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing function (Steele, Lea and Flood 2014), by element; it wraps around on purpose."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
