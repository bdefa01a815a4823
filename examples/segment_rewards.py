"""Train rewards for segments of a text in two categories, and combine them into one reward.

    python examples/segment_rewards.py            # your annotations, see below; for a GPU
    python examples/segment_rewards.py --smoke    # offline, a tiny model, under a minute on a CPU

A row has a prompt, a completion, and `segments`. A segment has `start` and `end` (not included), in characters of the
completion, a `label` (or a `score`) and a category. Categories may overlap and differ in granularity. The full run
reads data/segments/train.jsonl and test.jsonl with the categories factuality and relevance.
"""

import sys
import tempfile

from datasets import Dataset, load_dataset
from peft import LoraConfig

from trl_ext import RewardScorer, SegmentRewardConfig, SegmentRewardTrainer


LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
WEIGHTS = {"factuality": 0.5, "relevance": 0.3}  # from Fine-Grained RLHF (https://huggingface.co/papers/2306.01693)


def full_run() -> SegmentRewardTrainer:
    args = SegmentRewardConfig(
        output_dir="outputs/segment_rewards",
        categories=["factuality", "relevance"],
        loss_type="bce",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        eval_strategy="steps",
        eval_steps=0.2,  # five times in all
    )
    data = load_dataset("data/segments")
    return SegmentRewardTrainer(
        model="Qwen/Qwen3-0.6B",
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=LORA,
    )


def smoke_rows(start: int) -> list[dict]:
    """Two sentences, true (`yes`) or false (`no`); the text is relevant if it does not end in an exclamation mark."""
    rows = []
    for number in range(start, start + 48):
        sentences = ["Yes. " if number & 1 else "No. ", "Yes" if number & 2 else "No"]
        end = "!" if number & 4 else "."
        text = "".join(sentences) + end
        first = len(sentences[0])
        segments = [
            {"start": 0, "end": first - 1, "label": bool(number & 1), "category": "factuality"},
            {"start": first, "end": len(text), "label": bool(number & 2), "category": "factuality"},
            {"start": 0, "end": len(text), "label": not number & 4, "category": "relevance"},
        ]
        rows.append({"prompt": f"Is {number % 7} so? ", "completion": text, "segments": segments})
    return rows


def smoke_run(folder: str) -> SegmentRewardTrainer:
    from trl_ext.demo.model import tiny_reward_base

    args = SegmentRewardConfig(
        output_dir=f"{folder}/out",
        loss_type="bce",
        max_steps=60,
        learning_rate=3e-3,
        per_device_train_batch_size=12,
        logging_steps=5,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    return SegmentRewardTrainer(
        model=tiny_reward_base(f"{folder}/base", hidden_size=32),
        args=args,
        train_dataset=Dataset.from_list(smoke_rows(0)),
        eval_dataset=Dataset.from_list(smoke_rows(5)),  # the same texts: a smoke run does not test generalisation
        peft_config=LORA,
    )


def halves(text: str) -> list[tuple[int, int]]:
    """Split a text of two sentences at the first ". " into two segments."""
    end = text.find(". ") + 1
    return [(0, end), (end + 1, len(text))]


def main(smoke: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = smoke_run(folder) if smoke else full_run()
        trainer.train()
        trainer.save_model()
        print("losses:", *(f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry))
        metrics = trainer.evaluate()
        print(*(f"{name}={metrics[f'eval_{name}']:.3f}" for name in ("factuality_auc", "relevance_auc")))

        # the scorer cuts a completion into segments, sums each category, and returns the weighted sum; without a
        # `segmenter` the segments are sentences (pip install "trl-ext[segment]")
        scorer = RewardScorer(trainer.args.output_dir, aggregation=WEIGHTS, segmenter=halves)
        prompt, completions = "Is 3 so? ", ["Yes. Yes.", "Yes. No!"]
        spans = [halves(text) for text in completions]
        for text, values in zip(completions, scorer.score_segments([prompt] * 2, completions, spans), strict=True):
            for (start, end), value in zip(halves(text), values, strict=True):
                print(f"{text[start:end]:<6}", *(f"{name}={score:.3f}" for name, score in value.items()))
        print("rewards:", *(f"{score:.3f}" for score in scorer([prompt] * 2, completions)))


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
