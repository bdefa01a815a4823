"""`trl-ext bench generate`: time N completions of each prompt from a plain loop, our backend, and our stored shards.

The plain loop calls `generate` on prompts in the given order, left-padded, with `num_return_sequences=N` and the same
number of completions in a batch. All sides run the same model with the same sampling settings. The model has random
weights and never ends a completion, so every side generates the same number of tokens.
"""

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from trl_ext.bench.runner import (
    add_model_arguments,
    check_counts,
    circumstances,
    dtype_of,
    formatted,
    in_turns,
    medians,
    mib,
    place,
    plot_bars,
    timed,
)
from trl_ext.bench.synthetic import VOCABULARY, random_words, save_model, words_tokenizer


SIDES = {
    "plain": "plain generate loop",
    "backend": "our backend",
    "stored": "our backend, stored in shards",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `trl-ext bench generate`."""
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--num_generations", type=int, default=8, help="completions of each prompt")
    parser.add_argument(
        "--prompt_length", type=int, default=128, help="tokens of the longest prompt; the shortest has half"
    )
    parser.add_argument("--completion_length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--batch_size", type=int, default=32, help="completions in a batch")
    parser.add_argument("--shard_size", type=int, default=64, help="prompts in a stored shard")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, in turns")
    parser.add_argument("--output_dir", default="outputs/bench_generate", help="where bench.json and bench.png go")
    add_model_arguments(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """
    Generate from the same prompts on all sides.

    Returns:
        `dict` with `sides` (seconds, CPU seconds, new tokens per second, peak memory in MiB), `ratio` and `cpu_ratio`
        (time of that side divided by the time of the plain loop), and the [`circumstances`].

    Raises:
        ValueError: if an option is below its minimum, or if `batch_size` is not a multiple of `num_generations` (the
            plain loop generates all completions of a prompt in one batch).
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from trl_ext.pipelines.generation.backends import make_generator
    from trl_ext.pipelines.generation.sampling import Sampling
    from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler

    check_counts(args, num_prompts=1, num_generations=1, prompt_length=1, completion_length=1, batch_size=1, repeats=1)
    if args.batch_size % args.num_generations:
        raise ValueError(
            f"--batch_size is {args.batch_size}; the plain loop needs a multiple of --num_generations "
            f"{args.num_generations}."
        )
    rng = random.Random(args.seed)
    lengths = [rng.randint((args.prompt_length + 1) // 2, args.prompt_length) for _ in range(args.num_prompts)]
    prompts = [random_words(length, VOCABULARY, rng) for length in lengths]
    tokenizer = words_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, args, args.prompt_length + args.completion_length, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype_of(args),
            attn_implementation=args.attn_implementation,
            device_map="cuda" if torch.cuda.is_available() else None,
        ).eval()
    never_ends = {"suppress_tokens": [tokenizer.eos_token_id]}
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=args.completion_length,
        num_return_sequences=args.num_generations,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **never_ends,
    )

    def plain() -> int:
        found = 0
        at_a_time = args.batch_size // args.num_generations
        for first in range(0, len(prompts), at_a_time):
            batch = tokenizer(
                prompts[first : first + at_a_time], return_tensors="pt", padding=True, padding_side="left"
            ).to(model.device)
            with torch.inference_mode():
                output = model.generate(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
                )
            found += len(tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True))
        return found

    sampling = {"max_completion_length": args.completion_length, "generation_kwargs": never_ends}
    generator = make_generator(
        model,
        sampling=Sampling(**sampling),
        processing_class=tokenizer,
        generation_batch_size=args.batch_size,
    )

    def backend() -> int:
        return sum(map(len, generator.generate(prompts, args.num_generations, args.seed)))

    def stored() -> int:
        with tempfile.TemporaryDirectory() as folder:
            sampler = RejectionSampler(
                model,
                None,
                [{"prompt": prompt} for prompt in prompts],
                folder,
                args.num_generations,
                args.seed,
                processing_class=tokenizer,
                generation_batch_size=args.batch_size,
                shard_size=args.shard_size,
                isolate="never",
                **sampling,
            )
            sampler.generate()
        return args.num_prompts * args.num_generations

    calls = {"plain": plain, "backend": backend, "stored": stored}
    for call in calls.values():  # the warm-up
        assert call() == args.num_prompts * args.num_generations
    tokens = args.num_prompts * args.num_generations * args.completion_length
    runs = in_turns({name: partial(timed, call) for name, call in calls.items()}, args.repeats)
    sides = {name: medians(found, tokens) for name, found in runs.items()}
    return {
        "sides": sides,
        "ratio": {name: side["seconds"] / sides["plain"]["seconds"] for name, side in sides.items()},
        "cpu_ratio": {name: side["cpu_seconds"] / sides["plain"]["cpu_seconds"] for name, side in sides.items()},
        "completions": args.num_prompts * args.num_generations,
        **circumstances(args),
    }


def table(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    rows = [["", "s", "CPU s", "tokens/s", "peak MiB", "wall", "CPU"]]
    for name, side in report["sides"].items():
        rows.append(
            [
                SIDES[name],
                f"{side['seconds']:.3f}",
                f"{side['cpu_seconds']:.3f}",
                f"{side['tokens_per_second']:,.0f}",
                mib(side["peak_memory_mib"]),
                f"{report['ratio'][name]:.2f}x",
                f"{report['cpu_ratio'][name]:.2f}x",
            ]
        )
    return (
        f"{formatted(rows)}\nwall and CPU: time of that side / time of the plain loop. Medians over runs of "
        f"{report['completions']} completions.\n"
        f"{place(report)}"
    )


def plot(report: dict[str, Any], path: Path) -> bool:
    """Plot each side's time over the plain loop's as bars. Returns `False` if matplotlib is not installed."""
    series = {
        "time ratio (wall)": list(report["ratio"].values()),
        "time ratio (CPU)": list(report["cpu_ratio"].values()),
    }
    title = f"{report['completions']} completions: each side over a plain loop\n{report['machine']}, {report['dtype']}"
    return plot_bars(path, [SIDES[name] for name in report["sides"]], series, "times as long", title)
