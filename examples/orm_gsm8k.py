"""Train an outcome reward model on graded solutions of word problems, and use it to pick the best of several.

    python examples/orm_gsm8k.py            # your samples, see below; for a GPU
    python examples/orm_gsm8k.py --smoke    # offline, a tiny model, under a minute on a CPU

The full run reads data/gsm8k_samples.jsonl: GSM8K questions with the `answer` of the data set, which ends in
"#### 42", and `samples`, solutions that a policy generated and that end in the same way. A sample is right if its
final number is right. The split is by question, not by row: otherwise the test would contain questions from training.
"""

import sys
import tempfile

from datasets import Dataset, load_dataset
from peft import LoraConfig

from trl_ext import ORMConfig, ORMTrainer, RewardScorer


LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def final_number(text: str) -> str:
    """The text after the last "####", without thousands separators."""
    return text.rsplit("####", 1)[-1].strip().replace(",", "")


def graded(questions: list[dict]) -> Dataset:
    """One row for each sample of each question."""
    return Dataset.from_list(
        [
            {
                "prompt": row["question"] + "\n",
                "completion": sample,
                "label": final_number(sample) == final_number(row["answer"]),
            }
            for row in questions
            for sample in row["samples"]
        ]
    )


def split(questions: list[dict]) -> tuple[list[dict], list[dict]]:
    """Every fifth question is held out."""
    return [row for i, row in enumerate(questions) if i % 5], [row for i, row in enumerate(questions) if i % 5 == 0]


def full_run() -> tuple[ORMTrainer, list[dict]]:
    questions = load_dataset("json", data_files="data/gsm8k_samples.jsonl", split="train").to_list()
    train, held_out = split(questions)
    args = ORMConfig(
        output_dir="outputs/orm_gsm8k",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        eval_strategy="steps",
        eval_steps=0.2,  # five times in all
    )
    data = {"train_dataset": graded(train), "eval_dataset": graded(held_out)}
    return ORMTrainer(model="Qwen/Qwen3-0.6B", args=args, peft_config=LORA, **data), held_out


def smoke_questions() -> list[dict]:
    """Sums whose wrong samples are far off, so that a tiny model can learn the difference."""
    sums = [(a, b) for a in range(8) for b in range(8)]
    return [
        {
            "question": f"{a} + {b} = ?",
            "answer": f"#### {a + b}",
            "samples": [f"#### {a + b + wrong}" for wrong in (90, 0, 70)],
        }
        for a, b in sums
    ]


def smoke_run(folder: str) -> tuple[ORMTrainer, list[dict]]:
    from trl_ext.demo.model import tiny_reward_base

    train, held_out = split(smoke_questions())
    args = ORMConfig(
        output_dir=f"{folder}/out",
        max_steps=150,
        learning_rate=5e-3,
        per_device_train_batch_size=16,
        logging_steps=15,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    model = tiny_reward_base(f"{folder}/base", hidden_size=32)
    data = {"train_dataset": graded(train), "eval_dataset": graded(held_out)}
    return ORMTrainer(model=model, args=args, peft_config=LORA, **data), held_out


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer, held_out = smoke_run(folder) if smoke else full_run()
        trainer.train()
        trainer.save_model()
        print("losses:", *(f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry))
        metrics = trainer.evaluate()
        # look at question_auc: the pooled AUC mostly shows which questions are hard
        print(*(f"{name}={metrics[f'eval_{name}']:.3f}" for name in ("auc", "question_auc", "best_of_n", "mean_of_n")))

        scorer = RewardScorer(trainer.args.output_dir)  # the folder is all it needs
        prompt, samples = held_out[0]["question"] + "\n", held_out[0]["samples"]
        scores = scorer([prompt] * len(samples), samples)
        best = max(zip(scores, samples, strict=True))[1]
        print(f"best of {len(scores)}: {best}")
        # the estimate at each token: where does the solution go wrong?
        (tokens,) = scorer.score_tokens([prompt], [best])
        print("logits:", *(f"{logit:+.2f}" for logit in tokens))


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
