"""Selectors against worked numbers, against plain loops, and on a million samples."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from trl_ext.pipelines.rejection_sampling.scored import Scored, Selection, text_hash
from trl_ext.pipelines.rejection_sampling.selection import check_selection, select, selectors


# The worked example of the chapter on rejection sampling in Nathan Lambert's RLHF book (https://rlhfbook.com).
BOOK = [
    [0.7, 0.3, 0.5, 0.2],
    [0.4, 0.8, 0.6, 0.5],
    [0.9, 0.3, 0.4, 0.7],
    [0.2, 0.5, 0.8, 0.6],
    [0.5, 0.4, 0.3, 0.6],
]


def scored(scores, texts=None, finished=None, shuffle=None):
    """A row of scores a prompt; texts differ unless given; `shuffle` permutes all samples."""
    rows = [(prompt, sample, score) for prompt, row in enumerate(scores) for sample, score in enumerate(row)]
    texts = [f"{p}-{s}" for p, s, _ in rows] if texts is None else [text for row in texts for text in row]
    finished = [True] * len(rows) if finished is None else [end for row in finished for end in row]
    order = list(range(len(rows)))
    if shuffle is not None:
        random.Random(shuffle).shuffle(order)
    columns = [[rows[i][column] for i in order] for column in range(3)]
    return Scored(
        *columns, [text_hash(texts[i]) for i in order], [len(texts[i]) for i in order], [finished[i] for i in order]
    )


def named(data, rows):
    """(prompt, sample) of these rows."""
    return [(int(data.prompt[row]), int(data.sample[row])) for row in rows]


def random_scores(prompts=40, seed=0, levels=6):
    """Ragged groups with many ties, a few of them NaN, a few duplicated texts."""
    rng = random.Random(seed)
    scores, texts = [], []
    for prompt in range(prompts):
        size = rng.randint(1, 9)
        scores.append([float("nan") if rng.random() < 0.1 else float(rng.randrange(levels)) for _ in range(size)])
        texts.append([f"{prompt} {rng.randrange(7)}" for _ in range(size)])
    return scores, texts


def clean(scores, texts):
    """By loops, what a selector may see: prompt -> [(score, sample)], best first."""
    groups = defaultdict(list)
    for prompt, row in enumerate(scores):
        seen = set()
        for sample, score in enumerate(row):
            if score == score and texts[prompt][sample] not in seen:
                seen.add(texts[prompt][sample])
                groups[prompt].append((score, sample))
    return {prompt: sorted(group, key=lambda item: (-item[0], item[1])) for prompt, group in groups.items()}


class TestBook:
    def test_per_prompt(self):
        data = scored(BOOK, shuffle=3)
        chosen = select(data, "top_per_prompt")
        assert named(data, chosen.rows) == [(0, 0), (1, 1), (2, 0), (3, 2), (4, 3)]  # [1, 2, 1, 3, 4] counted from 1

    def test_five_best_overall_take_the_third_prompt_twice_and_the_fifth_never(self):
        data = scored(BOOK)
        chosen = select(data, "top_k_overall", k=5)
        assert chosen.rows.tolist() == [8, 5, 14, 0, 11]
        taken = Counter(prompt for prompt, _ in named(data, chosen.rows))
        assert taken[2] == 2 and taken[4] == 0
        assert chosen.counts["prompts_selected"] == 4

    def test_of_one_prompt_both_are_the_same(self):
        data = scored([BOOK[2]])
        assert select(data, "top_per_prompt").rows.tolist() == select(data, "top_k_overall", k=1).rows.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_against_loops(seed):
    scores, texts = random_scores(seed=seed)
    data = scored(scores, texts, shuffle=seed)
    groups = clean(scores, texts)

    def of(name, **kwargs):
        return select(data, name, **kwargs)

    def rows(name, **kwargs):
        return named(data, of(name, **kwargs).rows)

    for n in (1, 3):
        assert rows("top_per_prompt", n=n) == [(p, s) for p, g in groups.items() for _, s in g[:n]]
    flat = sorted((-score, p, s) for p, group in groups.items() for score, s in group)
    assert rows("top_k_overall", k=17) == [(p, s) for _, p, s in flat[:17]]
    assert rows("threshold", min_score=3) == [(p, s) for p, g in groups.items() for score, s in g if score >= 3]
    assert rows("threshold", min_score=3, n=1) == [(p, g[0][1]) for p, g in groups.items() if g[0][0] >= 3]

    pairs = of("best_worst_pairs", min_margin=2)
    expected = []
    for p, group in groups.items():
        worst = min(sample for score, sample in group if score == group[-1][0])
        if group[0][0] - group[-1][0] >= 2:
            expected.append(((p, group[0][1]), (p, worst), group[0][0] - group[-1][0]))
    assert list(zip(named(data, pairs.rows), named(data, pairs.rejected), pairs.margin, strict=True)) == expected
    spread = {p: group for p, group in groups.items() if group[0][0] > group[-1][0]}
    assert pairs.counts["no_spread"] == len(groups) - len(spread)
    assert pairs.counts["below_margin"] == len(spread) - len(expected)
    assert pairs.kind == "pairs" and pairs.counts["selected"] == len(expected)

    ranked = of("ranked_groups")
    assert ranked.kind == "groups"
    assert [named(data, group) for group in ranked.groups] == [[(p, s) for _, s in g] for p, g in spread.items()]
    assert ranked.counts["selected"] == len(spread)

    def share(p):  # of all samples with a score, duplicates too
        every = [score for score in scores[p] if score == score]
        return sum(score >= 4 for score in every) / len(every)

    mixed = {p: group for p, group in groups.items() if 0 < share(p) < 1}
    budget = of("budget_by_difficulty", min_score=4)
    assert named(data, budget.rows) == [(p, s) for p, g in mixed.items() for score, s in g if score >= 4]
    assert budget.counts["all_right"] == sum(share(p) == 1 for p in groups)
    assert budget.counts["all_wrong"] == sum(share(p) == 0 for p in groups)
    turns = sorted(
        (place, share(p), p, s) for p, group in mixed.items() for place, (score, s) in enumerate(group) if score >= 4
    )
    assert set(rows("budget_by_difficulty", min_score=4, k=7)) == {(p, s) for *_, p, s in turns[:7]}


def test_difficulty_is_how_often_the_policy_is_right_and_copies_count():
    # seven of eight are right, six of them the same text: without copies two of three, which looked harder than 4 of 7
    easy, even = [1.0] * 7 + [0.0], [1.0] * 4 + [0.0] * 3
    texts = [["a"] * 6 + ["b", "c"], list("abcdefg")]
    data = scored([easy, even], texts)
    chosen = select(data, "budget_by_difficulty", k=1)
    assert named(data, chosen.rows) == [(1, 0)]
    assert chosen.counts["duplicates"] == 5 and chosen.counts["candidates"] == 10
    assert named(data, select(data, "budget_by_difficulty").rows) == [(0, 0), (0, 6), (1, 0), (1, 1), (1, 2), (1, 3)]
    control = select(data, "random_per_prompt", like="budget_by_difficulty", n=1)
    assert sorted(set(data.prompt[control.rows].tolist())) == [0, 1]


@pytest.mark.parametrize(
    ("selection", "kwargs", "message"),
    [
        ("top_per_promt", {}, "Did you mean 'top_per_prompt'"),
        ("top_per_prompt", {"m": 2}, "cannot be called"),
        ("top_per_prompt", {"n": 0}, "n=0 selects nothing"),
        ("random_per_prompt", {"like": "treshold", "min_score": 1.0}, "Did you mean 'threshold'"),
        ("ranked_groups", {}, "gives groups"),
    ],
)
def test_a_selection_is_checked_before_there_are_samples(selection, kwargs, message):
    with pytest.raises(ValueError, match=message):
        check_selection(selection, kwargs, ("rows",))
    check_selection("best_worst_pairs", {"min_margin": 1.0})
    check_selection(lambda scored, only: scored.rows[only], {"only": 3}, ("rows",))


def test_order_of_the_samples_does_not_matter():
    scores, texts = random_scores(seed=7)
    options = {"top_k_overall": {"k": 9}, "threshold": {"min_score": 2}, "random_k_overall": {"k": 9}}
    names = [name for name, _ in selectors.available()]
    assert len(names) >= 9
    for name in names:
        results = []
        for order in (None, 1, 2):
            data = scored(scores, texts, shuffle=order)
            chosen = select(data, name, **options.get(name, {}))
            rejected = None if chosen.rejected is None else named(data, chosen.rejected)
            results.append((named(data, chosen.rows), rejected, chosen.counts))
        assert results[0] == results[1] == results[2], name


def test_everything_left_out_is_counted():
    nan = float("nan")
    data = scored(
        [[1.0, 2.0, nan, 1.0], [nan, nan], [0.0, 0.0]],
        texts=[["a", "b", "a", "a"], ["x", "y"], ["z", "w"]],
        finished=[[True, False, True, True], [True, True], [True, True]],
    )
    chosen = select(data)
    assert named(data, chosen.rows) == [(0, 1), (2, 0)]  # the tie of prompt 2 goes to the lowest sample index
    assert chosen.counts == {
        "samples": 8,
        "prompts": 3,
        "unscorable": 3,
        "duplicates": 1,
        "truncated_dropped": 0,
        "candidates": 4,
        "truncated": 1,
        "prompts_selected": 2,
        "selected": 2,
    }
    assert named(data, select(data, drop_truncated=True).rows) == [(0, 0), (2, 0)]
    assert select(data, drop_truncated=True).counts["truncated_dropped"] == 1


def test_a_text_that_is_cut_does_not_stand_for_the_same_text_that_ended():
    data = scored([[1.0, 1.0, 0.2]], texts=[["a", "a", "b"]], finished=[[False, True, True]])
    chosen = select(data, drop_truncated=True)
    assert named(data, chosen.rows) == [(0, 1)]
    assert (chosen.counts["truncated_dropped"], chosen.counts["duplicates"]) == (1, 0)


def test_the_same_text_of_two_prompts_is_no_duplicate():
    data = scored([[1.0], [1.0]], texts=[["same"], ["same"]])
    assert select(data).counts["duplicates"] == 0


@pytest.mark.parametrize("empty", [[], [[float("nan")] * 3]])
def test_nothing_to_select_from(empty):
    data = scored(empty)
    options = {"top_k_overall": {"k": 2}, "threshold": {"min_score": 0}, "random_k_overall": {"k": 2}}
    for name, _ in selectors.available():
        chosen = select(data, name, **options.get(name, {}))
        assert len(chosen.rows) == chosen.counts["selected"] == 0


class TestRandomControls:
    def test_per_prompt_takes_as_many_of_each_prompt(self):
        scores, texts = random_scores(seed=2)
        data = scored(scores, texts)
        for kwargs in ({"n": 2}, {"like": "threshold", "min_score": 3}, {"like": "top_k_overall", "k": 11}):
            like = {**kwargs}
            wanted = select(data, like.pop("like", "top_per_prompt"), **like)
            drawn = select(data, "random_per_prompt", **kwargs)
            assert Counter(data.prompt[wanted.rows].tolist()) == Counter(data.prompt[drawn.rows].tolist())
            assert len(set(drawn.rows.tolist())) == len(drawn.rows)

    def test_overall_takes_as_many_in_all(self):
        data = scored(BOOK)
        assert len(select(data, "random_k_overall", k=7).rows) == 7
        assert len(select(data, "random_k_overall", like="threshold", min_score=0.6).rows) == 8

    def test_every_sample_is_as_likely_whatever_its_score(self):
        data = scored([[float(sample) for sample in range(4)] for _ in range(50)])
        seen = Counter()
        for seed in range(80):
            seen.update(data.sample[select(data, "random_per_prompt", seed=seed).rows].tolist())
        # 4,000 draws of 4: a standard deviation is 27
        assert set(seen) == {0, 1, 2, 3} and all(abs(count - 1000) < 110 for count in seen.values())

    def test_a_prompt_s_draw_does_not_depend_on_the_other_prompts(self):
        data = scored(BOOK)
        few = data.take(np.flatnonzero(data.prompt >= 3))
        drawn = named(data, select(data, "random_per_prompt", seed=5).rows)
        assert named(few, select(few, "random_per_prompt", seed=5).rows) == [row for row in drawn if row[0] >= 3]

    def test_a_text_is_drawn_as_often_as_it_was_written(self):
        """Of eight samples six have one text: three in four draws are that one; the number is still matched."""
        texts = [["right"] * 6 + ["wrong", "worse"]] * 2000
        data = scored([[1.0] * 6 + [0.0, -1.0]] * 2000, texts)
        best = select(data, "top_per_prompt", n=2)
        assert best.counts["duplicates"] == 10000 and len(best.rows) == 4000
        for name in ("random_per_prompt", "random_k_overall"):
            like = {"like": "top_per_prompt", "n": 2}
            drawn = select(data, name, **like)
            assert len(drawn.rows) == len(set(drawn.rows.tolist())) == 4000 and drawn.counts["duplicates"] == 0
            assert abs((data.sample[drawn.rows] < 6).mean() - 0.75) < 0.03  # a standard deviation is under 0.007
        # what is matched is what the other selector would really keep, and of that the one with the lowest index
        few = select(data, "random_per_prompt", like="threshold", min_score=1.0, n=4)
        assert len(few.rows) == len(select(data, "threshold", min_score=1.0, n=4).rows) == 2000

    def test_pairs_have_no_control(self):
        with pytest.raises(ValueError, match="best_worst_pairs.* selects pairs"):
            select(scored(BOOK), "random_per_prompt", like="best_worst_pairs")


class TestRso:
    def test_extremes_are_the_best_and_a_blind_draw(self):
        data = scored([[float(value) for value in range(8)] for _ in range(300)])
        coldest = select(data, "rso", n=2, beta=1e-6)
        assert set(coldest.rows.tolist()) == set(select(data, "top_per_prompt", n=2).rows.tolist())
        # nothing is ever refused: the first two in the order of drawing
        assert set(data.sample[select(data, "rso", n=2, beta=1e9).rows].tolist()) == {0, 1}

    def test_acceptance_against_the_paper_s_loop(self):
        """How often each of four samples is among the two accepted: ours over 4,000 prompts, the loop over as many."""
        rewards, beta, n, prompts = [0.0, 1.0, 0.4, 0.9], 0.5, 2, 4000
        rng = random.Random(0)
        expected = Counter()
        for _ in range(prompts):
            left, accepted = dict(enumerate(rewards)), []
            while len(accepted) < n:
                top = max(left.values())
                for sample, reward in list(left.items()):
                    if rng.random() < np.exp((reward - top) / beta):
                        accepted.append(sample)
                        del left[sample]
                        if len(accepted) == n:
                            break
            expected.update(accepted)
        data = scored([rewards] * prompts)
        chosen = select(data, "rso", n=n, beta=beta, seed=1)
        seen = Counter(data.sample[chosen.rows].tolist())
        assert len(chosen.rows) == n * prompts
        for sample in range(4):  # the difference of two counts: a standard deviation is at most 45
            assert abs(seen[sample] - expected[sample]) < 180, (seen, expected)

    def test_takes_all_of_a_small_group_and_pairs_are_in_order(self):
        data = scored([[1.0, 3.0, 2.0], [0.0], [5.0, 5.0]])
        assert len(select(data, "rso", n=8).rows) == 6
        pairs = select(data, "rso", n=8, pairs=True)
        assert len(pairs.rows) == 1 and pairs.counts["no_spread"] == 1
        assert (data.score[pairs.rows] - data.score[pairs.rejected] == pairs.margin).all() and (pairs.margin > 0).all()

    def test_infinite_scores_do_no_harm(self):
        data = scored([[float("-inf"), 0.0, float("inf")], [float("-inf")] * 2])
        assert len(select(data, "rso", n=8).rows) == 5


def test_plugin_function_gets_clean_sorted_samples():
    seen = []

    def longest(samples, keep):
        seen.append(samples)
        return Selection(np.argsort(-samples.length, kind="stable")[:keep], counts={"asked": keep})

    data = scored([[0.1, float("nan"), 0.5], [0.9, 0.2]], texts=[["a", "bbb", "cc"], ["dddd", "dddd"]], shuffle=1)
    chosen = select(data, longest, keep=2)
    assert named(data, chosen.rows) == [(1, 0), (0, 2)] and chosen.counts["asked"] == 2
    assert seen[0].prompt.tolist() == [0, 0, 1] and seen[0].score.tolist() == [0.5, 0.1, 0.9]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("top_per_promt", {}, "Did you mean 'top_per_prompt'"),
        ("top_per_prompt", {"k": 3}, "unexpected keyword argument 'k'. Its options: n"),
        ("top_k_overall", {}, "missing a required argument: 'k'"),
        ("top_per_prompt", {"n": 0}, "n=0 selects nothing"),
        ("budget_by_difficulty", {"k": -1}, "k=-1 selects nothing"),
        ("rso", {"beta": 0.0}, "beta=0.0"),
    ],
)
def test_wrong_options_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        select(scored(BOOK), name, **kwargs)


def test_wrong_samples_are_named():
    with pytest.raises(ValueError, match="must have one shape"):
        Scored([0], [0], [0.1, 0.2], [1], [1], [True])
    with pytest.raises(ValueError, match="Sample 0 of prompt 0 occurs more than once"):
        select(Scored([0, 0], [0, 0], [0.1, 0.2], [1, 2], [1, 1], [True, True]))
    with pytest.raises(ValueError, match="holds rows"):
        _ = select(scored(BOOK)).groups


def test_text_hash_is_the_same_in_every_process():
    assert text_hash("a") == 3405396810240292928
    assert len({text_hash(text) for text in ("", "a", "b", "ä", "\ud800")}) == 5


@pytest.mark.parametrize("name", ["top_per_prompt", "top_k_overall", "best_worst_pairs", "ranked_groups", "rso"])
def test_a_million_samples_are_selected(name):
    rng = np.random.default_rng(0)
    count = 1_000_000
    data = Scored(
        np.repeat(np.arange(count // 8), 8),
        np.tile(np.arange(8), count // 8),
        rng.normal(size=count),
        rng.integers(0, 2**63, size=count).astype(np.uint64),
        rng.integers(1, 500, size=count),
        np.ones(count, dtype=bool),
    )
    chosen = select(data, name, **({"k": 1000} if name == "top_k_overall" else {}))
    assert chosen.counts["candidates"] == count
