"""Let a judge label pairs, look at its position bias, and train a reward model on the labels.

    python examples/label_preferences.py            # an 8B judge on a vLLM server, your pairs; for a GPU
    python examples/label_preferences.py --smoke    # offline, a function as the judge and a tiny model

The judge of the smoke run knows the right answer, but it also likes what it sees first. Asked in one order it is often
wrong; the average of both orders is not.
"""

import math
import re
import sys
import tempfile

from datasets import load_dataset

from trl_ext import RewardConfig, RewardTrainer
from trl_ext.pipelines.feedback.judge_labels import judge_rows


def leaning_judge(chats: list[list[dict]]) -> list[dict[str, float]]:
    """Adds 1.5 to the log-odds of the answer that is shown first."""
    answers = []
    for chat in chats:
        text = chat[-1]["content"]
        a, b = map(int, re.search(r"(\d)\+(\d)=", text).groups())
        given = [int(number) for number in re.findall(r"### Answer \w\n(\d+)", text)]
        first, second = (float(number == a + b) for number in given)
        chance = 1 / (1 + math.exp(-(first - second + 1.5)))
        answers.append({"A": chance, "B": 1 - chance})
    return answers


def smoke_rows() -> list[dict]:
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    return [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"{a + b}0"} for a, b in sums]


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if smoke:
            from trl_ext.demo.model import tiny_reward_base

            judged = judge_rows(leaning_judge, smoke_rows(), f"{folder}/judged")
            model, short = (
                tiny_reward_base(folder),
                {"max_steps": 10, "learning_rate": 3e-3, "use_cpu": True, "bf16": False},
            )
        else:
            rows = load_dataset("json", data_files="data/pairs/train.jsonl", split="train")
            thinks = {"enable_thinking": False}
            judged = judge_rows("Qwen/Qwen3-8B", rows, "outputs/judged", backend="vllm", chat_template_kwargs=thinks)
            model, short = "Qwen/Qwen3-0.6B", {}
        judged.report.print()
        if "accuracy" in judged.report.metrics:
            one, both = (judged.report.metrics[name] for name in ("accuracy_one_order", "accuracy"))
            print(f"accuracy: {one:.3f} in one order, {both:.3f} in both")
        args = RewardConfig(output_dir=f"{folder}/reward", logging_steps=5, report_to="none", **short)
        trainer = RewardTrainer(model=model, args=args, train_dataset=judged.dataset)
        trainer.train()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print("losses:", *(f"{loss:.4f}" for loss in history))


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
