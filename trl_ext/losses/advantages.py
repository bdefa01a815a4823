r"""Advantages: from rewards at some tokens of a group of completions to one advantage for every token.

Letters as in [`trl_ext.losses`]: N completions, in groups of G that answer the same prompt and follow each other; T
tokens. `rewards` are `(N, T)` and `given` is True where a token carries a reward (the last token of a step, say);
`mask` is True for the tokens that the policy wrote. Tokens outside the mask (padding, the answers of tools) have no
advantage, and credit passes over them without a discount.

Pure functions: they know no model, and nothing of where a reward comes from.
"""

from typing import Literal, get_args

import torch


# Added to standard deviations, as in TRL's GRPOTrainer.
EPSILON = 1e-4

Potential = Literal["last", "min", "sum"]


def group_normalize(
    rewards: torch.Tensor, group_size: int, scale: Literal["group", "batch", "none"] = "group"
) -> torch.Tensor:
    r"""
    One reward a completion, less its group's mean, over a standard deviation: the advantage of GRPO.

    $$ A_i = \frac{r_i - \mathrm{mean}(r_{group})}{\mathrm{std}(r) + 10^{-4}} $$

    See *DeepSeekMath* by Z. Shao et al. (https://huggingface.co/papers/2402.03300), section 4.1.2. Equals the
    advantage of `trl.GRPOTrainer` with `scale_rewards` of the same name.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`): NaN for a completion without a reward.
        group_size (`int`): G; N is a multiple of it.
        scale (`str`, *optional*, defaults to `"group"`): whose standard deviation divides, or `"none"`.

    Returns:
        `torch.Tensor` of shape `(N,)`, 0 where there is no reward.

    Example:

    ```python
    >>> group_normalize(torch.tensor([1.0, 0.0, 3.0, 3.0]), group_size=2)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    ```
    """
    groups = _grouped(rewards.float(), group_size)  # (N / G, G)
    centred = groups - groups.nanmean(1, keepdim=True)
    if scale == "group":
        centred = centred / (_nanstd(groups).unsqueeze(1) + EPSILON)
    elif scale == "batch":
        centred = centred / (_nanstd(rewards.float()[None]) + EPSILON)
    elif scale != "none":
        raise ValueError(f"scale={scale!r}; needed: 'group', 'batch' or 'none'.")
    return centred.nan_to_num(nan=0.0).flatten()


def normalize_steps(rewards: torch.Tensor, given: torch.Tensor, group_size: int) -> torch.Tensor:
    r"""
    Rewards of steps, normalised over all steps of all completions of a group.

    $$ \tilde r_{i,j} = \frac{r_{i,j} - \mathrm{mean}(R)}{\mathrm{std}(R) + 10^{-4}} $$

    See *DeepSeekMath* (https://huggingface.co/papers/2402.03300), section 4.1.3, process supervision.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`).
        given (`torch.BoolTensor` of shape `(N, T)`): where a reward is.
        group_size (`int`): G.

    Returns:
        `torch.Tensor` of shape `(N, T)`, 0 where no reward is given.
    """
    spread = _grouped(rewards.float().masked_fill(~given, torch.nan), group_size).flatten(1)  # (N / G, G * T)
    centred = (spread - spread.nanmean(1, keepdim=True)) / (_nanstd(spread).unsqueeze(1) + EPSILON)
    return centred.view(rewards.shape).masked_fill(~given, 0.0).nan_to_num(nan=0.0)


def returns_to_go(rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    r"""
    The discounted sum of the rewards at a token and behind it: \\( G_t = r_t + \gamma G_{t+1} \\).

    With [`normalize_steps`] and gamma = 1 it is the advantage of process supervision in DeepSeekMath.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`): 0 where there is none.
        mask (`torch.BoolTensor` of shape `(N, T)`).
        gamma (`float`, *optional*, defaults to `1.0`): in [0, 1], per token.

    Returns:
        `torch.Tensor` of shape `(N, T)`.

    Example:

    ```python
    >>> returns_to_go(torch.tensor([[0.0, 1.0, 2.0]]), torch.ones(1, 3).bool(), gamma=0.5)
    tensor([[1., 2., 2.]])
    ```
    """
    return gae(rewards, torch.zeros_like(rewards, dtype=torch.float32), mask, gamma=gamma, gae_lambda=1.0)


def td_errors(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    r"""
    Temporal-difference errors \\( \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t) \\), with 0 behind the last token.

    See *Foundations of Large Language Models* by T. Xiao and J. Zhu, equation 10.42.

    Args:
        rewards, values (`torch.Tensor` of shape `(N, T)`): the value of a token is that of the state before it.
        mask, gamma: as in [`returns_to_go`].
    """
    return gae(rewards, values, mask, gamma=gamma, gae_lambda=0.0)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> torch.Tensor:
    r"""
    Generalised advantage estimation: \\( A_t = \delta_t + \gamma \lambda A_{t+1} \\).

    See *High-Dimensional Continuous Control Using Generalized Advantage Estimation* by J. Schulman et al.
    (https://huggingface.co/papers/1506.02438), equation 16. `gae_lambda=0` gives the TD errors (the chapter's A2C),
    `gae_lambda=1` the return less the value (Monte Carlo).

    Args:
        rewards, values (`torch.Tensor` of shape `(N, T)`).
        mask (`torch.BoolTensor` of shape `(N, T)`).
        gamma (`float`, *optional*, defaults to `1.0`): in [0, 1].
        gae_lambda (`float`, *optional*, defaults to `0.95`): in [0, 1].

    Returns:
        `torch.Tensor` of shape `(N, T)`, fp32, 0 outside the mask.

    Raises:
        ValueError: shapes differ, or `gamma` or `gae_lambda` is outside [0, 1].
    """
    if not rewards.shape == values.shape == mask.shape or rewards.dim() != 2:
        raise ValueError(
            f"found rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and mask {tuple(mask.shape)}; "
            "needed: one shape (N, T) for all."
        )
    for name, number in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}={number}; needed: a number from 0 to 1.")
    rewards, values = rewards.float().masked_fill(~mask, 0.0), values.float().masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    later = torch.zeros_like(rewards[:, 0])  # (N,): the advantage of the next written token
    following = torch.zeros_like(later)  # (N,): its value
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        advantage = rewards[:, t] + gamma * following - values[:, t] + gamma * gae_lambda * later
        later = torch.where(here, advantage, later)
        following = torch.where(here, values[:, t], following)
        advantages[:, t] = torch.where(here, advantage, 0.0)
    return advantages


def shape_rewards(
    rewards: torch.Tensor, potentials: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0
) -> torch.Tensor:
    r"""
    Potential-based shaping: \\( r'_t = r_t + \gamma \Phi(s_{t+1}) - \Phi(s_t) \\), with 0 behind the last token.

    It changes which tokens are credited, and not which policy is best: the sum over a completion changes by
    \\( -\Phi(s_0) \\) alone. See *Policy Invariance Under Reward Transformations* by A. Y. Ng et al. (ICML 1999),
    theorem 1, and Xiao and Zhu, equations 10.64 to 10.66.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`).
        potentials (`torch.Tensor` of shape `(N, T)`): of the state before each token, from any per-token scorer.
        mask, gamma: as in [`returns_to_go`].
    """
    return td_errors(rewards, potentials, mask, gamma)


def mean_to_go(rewards: torch.Tensor, given: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The mean of the rewards at a token and behind it; 0 where none is left.

    In place of [`returns_to_go`], so that a completion neither gains nor loses by its number of steps.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`).
        given, mask (`torch.BoolTensor` of shape `(N, T)`): where a reward is, and where the policy wrote.

    Example:

    ```python
    >>> mean_to_go(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[True, False, True]]), torch.ones(1, 3).bool())
    tensor([[2., 3., 3.]])
    ```
    """
    sums = returns_to_go(rewards.float().masked_fill(~given, 0.0), mask)
    return sums / returns_to_go(given.float(), mask).clamp(min=1.0)


def potentials_of(
    rewards: torch.Tensor, given: torch.Tensor, mask: torch.Tensor, group_size: int, form: Potential = "last"
) -> torch.Tensor:
    r"""
    A potential of the state before each token, from the dense rewards before it.

    A potential says how promising a state is, as the value of a critic does. P(correct) of the last step is one.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`).
        given, mask (`torch.BoolTensor` of shape `(N, T)`): where a reward is, and where the policy wrote.
        group_size (`int`): G.
        form (`str`, *optional*, defaults to `"last"`):
            `"last"` is the last reward before the token, `"min"` the lowest one: for rewards that are levels, such as
            P(correct) of a step. `"sum"` adds them up: for rewards that are changes. The states before the first
            reward have 0 with `"sum"`, and otherwise the mean of the first rewards of the group.

    Returns:
        `torch.Tensor` of shape `(N, T)`, fp32, 0 outside the mask.

    Example:

    ```python
    >>> rewards, given = torch.tensor([[0.5, 0.0, 0.25, 0.0]]), torch.tensor([[True, False, True, False]])
    >>> potentials_of(rewards, given, torch.ones(1, 4).bool(), group_size=1)
    tensor([[0.5000, 0.5000, 0.5000, 0.2500]])
    ```
    """
    if form not in get_args(Potential):
        raise ValueError(f"form={form!r}; needed: one of {get_args(Potential)}.")
    rewards = rewards.float().masked_fill(~given, 0.0)
    if form == "sum":
        return (rewards.cumsum(1) - rewards).masked_fill(~mask, 0.0)
    first = torch.where(given & (given.long().cumsum(1) == 1), rewards, 0.0).sum(1)  # (N,)
    counts = _grouped(given.any(1).float(), group_size).sum(1, keepdim=True)
    start = (_grouped(first, group_size).sum(1, keepdim=True) / counts.clamp(min=1)).repeat_interleave(group_size, 0)
    places = torch.arange(rewards.shape[1], device=rewards.device).expand_as(rewards)
    latest = places.masked_fill(~given, -1).cummax(1).values  # of the last reward up to a token; -1 before the first
    if form == "min":
        levels = rewards.masked_fill(~given, torch.inf).cummin(1).values
    else:
        levels = rewards.gather(1, latest.clamp(min=0))
    levels = torch.where(latest < 0, start, levels)
    return torch.cat([start, levels[:, :-1]], 1).masked_fill(~mask, 0.0)


def last_tokens(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor that is True at the last token of each row of a mask `(N, T)`."""
    return mask & (mask.flip(1).long().cumsum(1).flip(1) == 1)


def shrunken_steps(
    returns: torch.Tensor,
    ids: torch.Tensor,
    given: torch.Tensor,
    mask: torch.Tensor,
    group_size: int,
    prior: float = 1.0,
) -> torch.Tensor:
    r"""
    Step advantages from completions of a group that share a beginning, shrunken where few of them agree.

    A state is a beginning that several completions share, an action is the step that follows. The advantage of an
    action is its mean return less that of the state, times \\( n / (n + k) \\) for n completions with that action, and
    times the share of the variance at the state that lies between actions.

    See *When Denser Credit Is Not Enough: Evidence-Calibrated Policy Optimization for Long-Horizon LLM Agent Training*
    by Y. Li et al. (https://huggingface.co/papers/2606.05885). Both factors are the paper's ECPO, as summaries of it
    give the equations (we did not see the paper itself): an action's mean return is drawn to that of its state with
    the weight k, and a state counts by the variance between its actions. Of ECPO this function leaves out three parts:
    the factor \( \tanh(n_s / \tau) \) of a state that n_s completions reach, the scaling by the standard deviation
    of the actions of a state, and the advantage of GRPO that ECPO adds. The summaries name k = 2 as its default.

    Args:
        returns (`torch.Tensor` of shape `(N, T)`): rewards to go.
        ids (`torch.Tensor` of shape `(N, T)`): the tokens.
        given (`torch.BoolTensor` of shape `(N, T)`): the last token of each step.
        mask (`torch.BoolTensor` of shape `(N, T)`).
        group_size (`int`): G.
        prior (`float`, *optional*, defaults to `1.0`): k, at least 0; the default is ours.

    Returns:
        `torch.Tensor` of shape `(N, T)`: all tokens of a step have its advantage.
    """
    advantages = torch.zeros_like(returns, dtype=torch.float32)
    for group in range(len(_grouped(returns, group_size))):
        states: dict[tuple[int, ...], dict[tuple[int, ...], list[tuple[int, int, int]]]] = {}
        for row in range(group * group_size, (group + 1) * group_size):
            length = int(mask[row].sum())
            tokens = ids[row, :length].tolist()
            ends = sorted({*(given[row, :length].nonzero()[:, 0] + 1).tolist(), length})
            for start, end in zip([0, *ends], ends, strict=False):
                if start < end:
                    actions = states.setdefault(tuple(tokens[:start]), {})
                    actions.setdefault(tuple(tokens[start:end]), []).append((row, start, end))
        for actions in states.values():
            for places, advantage in _shrunken_actions(returns, list(actions.values()), prior):
                for row, start, end in places:
                    advantages[row, start:end] = advantage
    return advantages.masked_fill(~mask, 0.0)


def _shrunken_actions(
    returns: torch.Tensor, actions: list[list[tuple[int, int, int]]], prior: float
) -> list[tuple[list[tuple[int, int, int]], float]]:
    """The places of each action at one state, with its advantage."""
    found = [[returns[row, start].item() for row, start, _ in places] for places in actions]
    count = sum(map(len, found))
    mean = sum(map(sum, found)) / count
    means = [sum(own) / len(own) for own in found]
    between = sum(len(own) * (m - mean) ** 2 for own, m in zip(found, means, strict=True))
    within = sum((value - m) ** 2 for own, m in zip(found, means, strict=True) for value in own)
    gate = between / (between + within) if between else 0.0
    return [
        (places, gate * len(own) / (len(own) + prior) * (m - mean))
        for places, own, m in zip(actions, found, means, strict=True)
    ]


def min_form(rewards: torch.Tensor, given: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    r"""
    Rewards of steps weighted so that their sum is (nearly) the lowest of them: a chain is as good as its worst step.

    $$ r^*_j = \frac{e^{-r_j / \tau}}{\sum_k e^{-r_k / \tau}} \, r_j $$

    See *Stop Summation: Min-Form Credit Assignment Is All Process Reward Model Needs for Reasoning* by J. Cheng et al.
    (https://huggingface.co/papers/2504.15275). As the temperature falls, the sum falls to the minimum.

    Args:
        rewards (`torch.Tensor` of shape `(N, T)`).
        given (`torch.BoolTensor` of shape `(N, T)`): where a reward is.
        temperature (`float`, *optional*, defaults to `0.1`): tau, above 0; the paper's.

    Example:

    ```python
    >>> min_form(torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[True, True, True]]), temperature=0.01).sum()
    tensor(0.)
    ```
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}; needed: a number above 0.")
    rewards = rewards.float().masked_fill(~given, 0.0)
    weights = (-rewards / temperature).masked_fill(~given, -torch.inf).softmax(1).nan_to_num(nan=0.0)
    return weights * rewards


def whiten(
    advantages: torch.Tensor,
    mask: torch.Tensor,
    group_size: int | None = None,
    shift_mean: bool = True,
    scale_by: Literal["group", "batch"] = "group",
) -> torch.Tensor:
    """
    Advantages with mean 0 and standard deviation 1 over the tokens of the mask: of the batch, or of each group.

    Args:
        advantages (`torch.Tensor` of shape `(N, T)`).
        mask (`torch.BoolTensor` of shape `(N, T)`).
        group_size (`int`, *optional*): G; the whole batch by default.
        shift_mean (`bool`, *optional*, defaults to `True`): with false, only the standard deviation changes.
        scale_by (`str`, *optional*, defaults to `"group"`):
            `"batch"` takes off each group's mean and divides all by one standard deviation.
    """
    spread = _grouped(advantages.float().masked_fill(~mask, torch.nan), group_size or len(advantages)).flatten(1)
    shifted = spread - spread.nanmean(1, keepdim=True) if shift_mean else spread
    deviation = _nanstd(shifted if scale_by == "group" else shifted.flatten()[None])
    scaled = shifted / (deviation.unsqueeze(1) + EPSILON)
    return scaled.view(advantages.shape).masked_fill(~mask, 0.0).nan_to_num(nan=0.0)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float | None = 0.2
) -> torch.Tensor:
    r"""
    The squared error of a critic, clipped as in PPO.

    $$ L_t = \frac{1}{2} \max\left((V_t - R_t)^2,\;
       (\mathrm{clip}(V_t, V^{old}_t - \epsilon, V^{old}_t + \epsilon) - R_t)^2\right) $$

    The squared error is equation 10.32 of *Foundations of Large Language Models* by T. Xiao and J. Zhu. The clipping,
    the factor and the default of `cliprange` are those of TRL's `PPOTrainer` (up to 1.12).

    Args:
        values, old_values, returns (`torch.Tensor` of one shape):
            The critic's values now, its values when the completions were sampled, and what it should predict.
        cliprange (`float`, *optional*, defaults to `0.2`): epsilon, above 0; `None` for no clipping.

    Returns:
        `torch.Tensor` of that shape, fp32.

    Example:

    ```python
    >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), cliprange=0.2)
    tensor([0.3200])
    ```
    """
    values, old_values, returns = values.float(), old_values.float(), returns.float()
    errors = (values - returns).square()
    if cliprange is not None:
        if cliprange <= 0:
            raise ValueError(f"cliprange={cliprange}; needed: a number above 0, or None for no clipping.")
        clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
        errors = torch.maximum(errors, (clipped - returns).square())
    return errors / 2


def _grouped(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """(N, ...) -> (N / G, G, ...)."""
    if group_size < 1 or len(values) % group_size:
        raise ValueError(f"{len(values)} completions do not make groups of {group_size}.")
    return values.view(-1, group_size, *values.shape[1:])


def _nanstd(values: torch.Tensor) -> torch.Tensor:
    """The sample standard deviation of each row without its NaN, (R, C) -> (R,); 0 where fewer than two are there."""
    count = values.isfinite().sum(1)
    squares = (values - values.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares / (count - 1).clamp(min=1)).sqrt()
