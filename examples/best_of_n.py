"""Pick the best of n completions with a reward model, or by a vote among their answers.

    python examples/best_of_n.py            # a small chat model and the model of reward_rankings.py; for a GPU
    python examples/best_of_n.py --smoke    # offline, a tiny model and a rule as the reward

The curve shows how the reward grows with the number of samples: the mean reward of the best of k among the n samples,
computed over all subsets. The KL divergence of best-of-n from the policy is at most log n - (n - 1) / n nats.
"""

import sys
import tempfile

from trl_ext import best_of_n
from trl_ext.metrics.voting import best_of_k_curve, kl_bound


def share_of_vowels(prompts: list[str], completions: list[str], **kwargs) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def smoke_run(folder: str) -> dict:
    from trl_ext.demo.model import tiny_reward_base

    prompts = [f"say {number}:" for number in range(8)]
    sampling = dict(max_completion_length=24, backend_kwargs={"generation_batch_size": 128})
    return dict(model=tiny_reward_base(folder), reward_funcs=share_of_vowels, prompts=prompts, **sampling)


def full_run() -> dict:
    question = "A shop sells pens at 3 for 2 dollars. What do 12 pens cost? Put the answer in \\boxed{}."
    prompts = [[{"role": "user", "content": question}]]
    # math-verify reads the answers (pip install "trl-ext[math]"); the softmax of a score weighs its vote
    return dict(model="Qwen/Qwen3-0.6B", reward_funcs="outputs/reward_rankings", prompts=prompts, vote="softmax")


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        picks = best_of_n(n=16, return_candidates=True, **(smoke_run(folder) if smoke else full_run()))
    for pick in picks:
        print(f"{pick.score:+.3f}  {pick.completion!r}")
    scores = [[sample.score for sample in pick.candidates if sample.score is not None] for pick in picks]
    for k, mean in best_of_k_curve(scores, scores).items():
        print(f"best of {k:>2}: mean reward {mean:.4f}, at most {kl_bound(k):.2f} nats from the policy")


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
