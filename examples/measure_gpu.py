"""
Measure every GPU figure of this project in one run of a few minutes.

    python examples/measure_gpu.py --budget 540 --output outputs/measure_gpu          # on a machine with a GPU
    python examples/measure_gpu.py --smoke --output outputs/smoke                     # every row, tiny, on a CPU
    python examples/measure_gpu.py --model FOLDER --dataset FILE --output outputs/real   # train a real reward model
    python docs/make_gpu_page.py outputs/measure_gpu/rows.jsonl                          # the results as a page

A row is one measurement. All rows use a model of the shape `--shape` with random weights, created on the device (NF4,
LoRA on all linear layers, bf16 autocast, gradient checkpointing). Nothing is downloaded. The most useful rows run
first. Each row is written to `rows.jsonl` at once, so the same command continues where it stopped. A row does not
start if its usual time would exceed the budget. A row that cannot run records the error, and the others still run.

The rows measure (a) a reward step on flat rows, on padded rows, and for pairs in `trl.RewardTrainer`, (b) peak memory
under a cap of 24 GB, (c) an ensemble of four and one member, (d) scoring, (e) steps of outcome and process models, (f)
attention kernels for a flat row, (g) which operations take the time of a step, and the peaks of the 8B configs.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trl_ext.bench.runner import forget_peak, formatted, in_turns, medians, timed
from trl_ext.data.prefix_layout import PrefixLayout, build_layout
from trl_ext.losses import plackett_luce
from trl_ext.models.adapters import add_adapter
from trl_ext.models.building import keep_4bit_exact_on_cpu
from trl_ext.models.heads import candidate_scores, head_modules, make_head_exact, run_with_head_output
from trl_ext.models.shared_prefix import flat_scores, flat_token_logits, select_attention, shared_prefix_attention


GIB = 2**30
CAP = 24.0
BARS = {"peak of a pair, 2 x (512 + 512)": 20.0, "peak of K = 8, 512 + 512": 22.0}
"""The most reserved memory, in GiB, that passes."""
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BF16_LIMIT = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12, "A10": 125e12}
"""Dense bf16 operations per second, from the makers' data sheets."""
FIRST_ID = 10


class Bed:
    """The device, the current model on it, and the layout of rows. A model with other adapters replaces it."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shrink = 32 if args.smoke else 1
        self.repeats = 1 if args.smoke else 5
        self._built: tuple[int, str] | None = None  # number of members, and their adapter
        self._model: nn.Module | None = None

    @property
    def config(self) -> Any:
        from transformers import AutoConfig

        from trl_ext.fit.known_shapes import config_of

        if not self.args.smoke:
            return config_of(self.args.shape)[0]
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, head_dim=16)
        return AutoConfig.for_model("qwen3", vocab_size=256, num_key_value_heads=2, pad_token_id=0, **sizes)

    def lora(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=16, target_modules="all-linear")

    def model(self, members: int = 1, lora: Any = None) -> nn.Module:
        """The model with one adapter, or with the adapters of several members in the last quarter of the layers."""
        lora = lora or self.lora()
        wanted = (members, json.dumps(lora.to_dict(), sort_keys=True, default=str))
        if self._model is None or self._built != wanted:
            self._model = None
            base, head = random_base(self.config, self.device)
            if members == 1:
                self._model = add_adapter(base, lora, head)
            else:
                from trl_ext.models.ensemble.member_config import branch_at
                from trl_ext.models.ensemble.stacked_model import StackedRewardModel

                self._model = StackedRewardModel(base, branch_at(base, lora, 0.75), head, members, range(members))
            self._built = wanted
            checkpointing(self._model)
        self._model.train()
        return self._model

    def ids(self, length: int) -> list[int]:
        return torch.randint(FIRST_ID, 250, (max(2, length // self.shrink),)).tolist()

    def groups(self, number: int, p: int, c: int, k: int) -> list[tuple[list[int], list[list[int]]]]:
        return [(self.ids(p), [self.ids(c) for _ in range(k)]) for _ in range(number)]

    def both(self, groups: list) -> tuple[PrefixLayout, torch.Tensor]:
        """The groups as one flat row and as rows of one length."""
        rows = [[*prompt, *own] for prompt, candidates in groups for own in candidates]
        return build_layout(groups).to(self.device), torch.tensor(rows, device=self.device)


def random_base(config: Any, device: torch.device) -> tuple[nn.Module, list[str]]:
    """A reward model with random weights on the device. All but head, embeddings and norms is in NF4."""
    import bitsandbytes as bnb
    from transformers import AutoModelForSequenceClassification

    config.num_labels, config.pad_token_id = 1, 0
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    head = head_modules(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path not in head:
            new = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, torch.bfloat16)
            weight = torch.randn(module.weight.shape, dtype=torch.bfloat16, device=device) * 0.02
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
            new.bias = None if module.bias is None else nn.Parameter(torch.zeros_like(module.bias, device=device))
            model.set_submodule(path, new.requires_grad_(False))
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if tensor.device.type == "meta":
                made = torch.randn(tensor.shape, dtype=tensor.dtype, device=device) * 0.02
                made = made if tensor.dim() > 1 else torch.ones_like(made)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
    for path, module in list(model.named_modules()):  # buffers of positions are computed from the config
        if any(buffer.device.type == "meta" for buffer in module.buffers(recurse=False)):
            model.set_submodule(path, type(module)(config).to(device))
    model.is_quantized = model.is_loaded_in_4bit = True
    make_head_exact(model, head)
    keep_4bit_exact_on_cpu(model)
    return model, head


def checkpointing(model: nn.Module) -> None:
    """Switch on gradient checkpointing; the method has two names in the supported versions of transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stepper(bed: Bed, model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """A training step: loss and gradients. It leaves out the optimizer, which takes little time with LoRA."""

    def step() -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast(bed.device.type, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        wait()
        return float(loss.detach())

    return step


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def compare(
    bed: Bed, model: nn.Module, sides: dict[str, Callable], tokens: dict[str, int], ours: str
) -> dict[str, Any]:
    """Time the sides in turns; return times, ratios to ours, peaks, and the differences of losses and gradients."""
    steps = {name: stepper(bed, model, loss_of) for name, loss_of in sides.items()}
    losses, grads, peaks = {}, {}, {}
    for name, step in steps.items():
        forget_peak()
        losses[name], grads[name], peaks[name] = step(), gradients(model), memory()
    others = [name for name in sides if name != ours]
    apart = [(grads[ours] - grads[name]).norm() / grads[name].norm().clamp(min=1e-12) for name in others]
    runs = {
        name: medians(found)
        for name, found in in_turns({n: partial(timed, s) for n, s in steps.items()}, bed.repeats).items()
    }
    wall = {name: found["seconds"] for name, found in runs.items()}
    return {
        "seconds": wall,
        "ratio": {name: seconds / wall[ours] for name, seconds in wall.items() if name != ours},
        "token_bound": {name: tokens[name] / tokens[ours] for name in tokens if name != ours},
        "loss_difference": max(abs(losses[ours] - losses[name]) for name in others),
        "gradient_difference": float(max(apart)),
        "peaks": peaks,
        **speed(tokens[ours], wall[ours], operations_of(model, tokens[ours])),
        **peaks[ours],
    }


def memory() -> dict[str, float | None]:
    if not torch.cuda.is_available():
        return {"allocated_gib": None, "reserved_gib": None}
    return {
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
    }


def speed(tokens: int, seconds: float, operations: float) -> dict[str, float | None]:
    """Tokens per second, and the percentage of the card's bf16 limit (unknown for a card that is not listed)."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    limit = next((value for part, value in BF16_LIMIT.items() if part in name), None)
    percent = None if limit is None else 100 * operations / seconds / limit
    return {"tokens_per_second": tokens / seconds, "percent_of_bf16": percent}


def operations_of(model: nn.Module, tokens: int, training: bool = True) -> float:
    """
    Operations of the linear layers: 2 per weight and token in a forward pass.

    A training step has 6 with frozen weights: the forward pass twice (gradient checkpointing), and the gradient of the
    inputs. Adapters are counted like other layers. Attention is not counted.
    """
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    return (6 if training else 2) * float(weights) * tokens


# -------------------------------------------------------------------------------------------------------------- rows
def reward_step(bed: Bed, p: int, c: int, k: int) -> dict[str, Any]:
    """(a) A batch of two groups, as flat rows and as padded rows, with the same ranking loss; pairs also in TRL."""
    model = bed.model()
    groups = bed.groups(2, p, c, k)
    layout, rows = bed.both(groups)
    ratings = torch.arange(k, 0, -1.0, device=bed.device).expand(len(groups), k)
    mask = torch.ones_like(ratings, dtype=torch.bool)

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return plackett_luce(scores.view(len(groups), k), ratings, mask).mean()

    def padded() -> torch.Tensor:
        select_attention(model, "sdpa")
        return loss(candidate_scores(model, rows, torch.ones_like(rows)))

    sides = {"flat": lambda: loss(flat_scores(model, layout)[:, 0]), "padded": padded}
    tokens = {"flat": layout.num_tokens, "padded": rows.numel()}
    if k == 2:
        select_attention(model, "sdpa")
        sides["trl.RewardTrainer"], tokens["trl.RewardTrainer"] = trl_loss(model, rows), rows.numel()
    found = compare(bed, model, sides, tokens, "flat")
    return found | {"groups": groups_of(layout), "goal": 2.25 if (p, k) == (4 * c, 4) else None}


def trl_loss(model: nn.Module, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The loss of `trl.RewardTrainer` on pairs (chosen, rejected), collated and computed by TRL."""
    import trl
    from datasets import Dataset

    from trl_ext.bench.synthetic import words_tokenizer

    chosen, rejected = (part.tolist() for part in (rows[0::2], rows[1::2]))
    pairs = Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected})
    config = trl.RewardConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,  # `Bed` has switched it on
    )
    base = model.get_base_model()
    base.is_quantized = False  # Trainer asks a quantized model for the quantizer that loaded it, and none did
    trainer = trl.RewardTrainer(model=model, args=config, train_dataset=pairs, processing_class=words_tokenizer())
    base.is_quantized = True
    model.train()
    batch = {name: value.to(rows.device) for name, value in trainer.data_collator(list(trainer.train_dataset)).items()}

    def loss() -> torch.Tensor:
        select_attention(model, "sdpa")
        return trainer.compute_loss(model, dict(batch))

    return loss


def groups_of(layout: PrefixLayout) -> list[list[Any]]:
    """The prompt's length and the completions' lengths of each group, from which the page estimates the memory."""
    groups: dict[int, list[Any]] = {}
    for own in layout.completions:
        groups.setdefault(own.prefix_start, [own.prefix_length, []])[1].append(own.length)
    return list(groups.values())


def peak_under_cap(bed: Bed, model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> dict[str, float | None]:
    """Peak memory of two optimizer steps (the second one has optimizer states) on a card that is capped at 24 GB."""
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * GIB / whole))
    try:
        forget_peak()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        step = stepper(bed, model, loss_of)
        for _ in range(2):
            step()
            optimizer.step()
        wait()
        return memory()
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)


def peak_of(bed: Bed, p: int, c: int, k: int, name: str) -> dict[str, Any]:
    """(b) Peak memory of a step with one group under a cap of 24 GB."""
    model = bed.model()
    layout, _ = bed.both(bed.groups(1, p, c, k))
    found = peak_under_cap(bed, model, lambda: -flat_scores(model, layout)[:, 0].log_softmax(0)[0])
    bar, reserved = BARS.get(name), found["reserved_gib"]
    met = None if reserved is None or bar is None else reserved <= bar
    return found | {"groups": groups_of(layout), "bar_gib": bar, "bar_met": met}


def config_peak(bed: Bed, path: Path) -> dict[str, Any]:
    """Peak memory of a step with the batch, the adapter and the members of a config, under a cap of 24 GB."""
    from trl_ext.fit.config import parse, sizes_of, training_step

    command = path.parent.name
    given = argparse.Namespace(config=str(path), override=[], candidates=None, prompt_length=None)
    given.completion_length = None
    parsed = parse(command, given)
    sizes = sizes_of(command, parsed, bed.config, given)
    own, rows = (sizes.rows, sizes.candidates) if command in ("reward", "ensemble") else (sizes.rows, 1)
    layout, _ = bed.both(bed.groups(own, sizes.prompt, sizes.completion, rows))
    wanted = training_step(command, parsed, bed.config, sizes)
    model = bed.model(wanted.members or 1, wanted.peft_config)
    found = peak_under_cap(bed, model, lambda: flat_token_logits(model, layout).float().square().mean())
    batch = f"{own} x {rows} candidates" if rows > 1 else f"{own} rows"
    return found | {
        "config": path.relative_to(CONFIGS.parent).as_posix(),
        "batch": f"{batch} of {sizes.prompt} + {sizes.completion} tokens",
    }


def ensemble(bed: Bed) -> dict[str, Any]:
    """(c) A step of four branched members and of one member, on the same flat row."""
    seconds, losses, operations = {}, {}, {}
    layout, _ = bed.both(bed.groups(1, 512, 256, 4))
    for members in (1, 4):
        model = bed.model(members)
        forget_peak()
        step = stepper(bed, model, lambda model=model: flat_scores(model, layout).square().mean())
        losses[members] = step()
        seconds[members] = medians(in_turns({"": partial(timed, step)}, bed.repeats)[""])["seconds"]
        operations[members] = operations_of(model, layout.num_tokens)
    return {
        "seconds": seconds,
        "ratio": seconds[4] / seconds[1],
        "goal": 1.25,
        "loss": losses,  # of other random heads, so the two differ; a number that is not finite would show here
        **speed(layout.num_tokens, seconds[4], operations[4]),
        **memory(),
    }


def scoring(bed: Bed) -> dict[str, Any]:
    """(d) Score 16 completions of each of 4 prompts: flat rows, padded in given order, padded and sorted by length."""
    model = bed.model().eval()
    forget_peak()
    groups = [
        (bed.ids(512), [bed.ids(64 + 192 * ((5 * number + place) % 16) // 15) for place in range(16)])
        for number in range(4)
    ]
    rows = [[*prompt, *own] for prompt, candidates in groups for own in candidates]
    layouts = [build_layout([group]).to(bed.device) for group in groups]

    def padded(ordered: list[list[int]]) -> list[float]:
        select_attention(model, "sdpa")
        scores: list[float] = []
        for start in range(0, len(ordered), 16):
            part = ordered[start : start + 16]
            longest = max(map(len, part))
            ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in part], device=bed.device)
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part], device=bed.device)
            scores += candidate_scores(model, ids, mask).tolist()
        return scores

    sides = {
        "flat": lambda: [score for layout in layouts for score in flat_scores(model, layout)[:, 0].tolist()],
        "given order": lambda: padded(rows),
        "sorted": lambda: padded(sorted(rows, key=len)),
    }
    with torch.no_grad(), torch.autocast(bed.device.type, torch.bfloat16):
        flat, given = sides["flat"](), sides["given order"]()
        sides["sorted"]()
        runs = in_turns({name: partial(timed, call) for name, call in sides.items()}, bed.repeats)
    wall = {name: medians(found)["seconds"] for name, found in runs.items()}
    apart = max(abs(a - b) for a, b in zip(flat, given, strict=True))
    spread = torch.tensor(given).std().item()
    return {
        "seconds": wall,
        "ratio": {name: seconds / wall["flat"] for name, seconds in wall.items() if name != "flat"},
        "score_difference": apart,
        "score_std": spread,
        **speed(
            sum(map(len, rows)), wall["flat"], operations_of(model, sum(own.num_tokens for own in layouts), False)
        ),
        **memory(),
    }


def token_step(bed: Bed, steps: bool) -> dict[str, Any]:
    """(e) A step of an outcome model (loss on every token) or of a process model (loss on the end of each step)."""
    model = bed.model()
    layout, rows = bed.both(bed.groups(1, 512, 512, 4))
    start, every = layout.completions[0].prefix_length, max(2, 64 // bed.shrink) if steps else 1
    places = range(every - 1, layout.completions[0].length, every)
    flat_index = torch.tensor([own.start + place for own in layout.completions for place in places], device=bed.device)
    padded_index = torch.tensor([start + place for place in places], device=bed.device)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy_with_logits(
            logits.flatten().float(), torch.ones(logits.numel(), device=bed.device)
        )

    def padded() -> torch.Tensor:
        select_attention(model, "sdpa")
        return loss(run_with_head_output(model, rows, torch.ones_like(rows))[1][:, padded_index])

    sides = {"flat": lambda: loss(flat_token_logits(model, layout)[flat_index]), "padded": padded}
    found = compare(bed, model, sides, {"flat": layout.num_tokens, "padded": rows.numel()}, "flat")
    return found | {"groups": groups_of(layout)}


def kernels(bed: Bed, length: int) -> dict[str, Any]:
    """(f) Time each attention kernel on a flat row of one prompt and four completions, with backward on a GPU."""
    on_gpu = bed.device.type == "cuda"  # on a CPU flex_attention has no backward pass
    heads, kv_heads, width = (4, 2, 16) if bed.args.smoke else (32, 8, 128)
    prompt, candidates = bed.groups(1, 4 * length // 5, length // 5, 4)[0]
    layout = build_layout([(prompt, candidates)]).to(bed.device)
    q, k, v = (
        torch.randn(1, n, layout.num_tokens, width, device=bed.device, dtype=torch.bfloat16, requires_grad=on_gpu)
        for n in (heads, kv_heads, kv_heads)
    )
    exact = shared_prefix_attention(None, *(t.float() for t in (q, k, v)), None, prefix_layout=layout)[0]
    found: dict[str, Any] = {"tokens": layout.num_tokens, "seconds": {}, "difference": {}, "not_run": {}}
    forget_peak()
    for name, attention in {
        "sdpa by buckets": by_buckets,
        "varlen": by_varlen,
        "flex": by_flex,
        "merged": by_merging,
    }.items():
        try:
            call = attention(layout, compiled=on_gpu)
            output = call(q, k, v)
            found["difference"][name] = float(((output.float() - exact).abs().max() / exact.abs().max()).detach())

            def once(call: Callable = call) -> None:
                total = call(q, k, v).float().sum()
                if on_gpu:
                    total.backward()
                wait()

            once()
            found["seconds"][name] = medians(in_turns({"": partial(timed, once)}, bed.repeats)[""])["seconds"]
        except (ImportError, RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            found["not_run"][name] = " ".join(str(error).split())[:200] or repr(error)
    equal = [name for name in found["seconds"] if found["difference"][name] <= 1e-2]
    fastest = min(equal, key=found["seconds"].get, default=None)
    seen = len(prompt) * (len(prompt) + 1) / 2  # pairs of a query and a key
    seen += sum(own.length * (len(prompt) + (own.length + 1) / 2) for own in layout.completions)
    operations = 4 * heads * width * seen * (3.5 if on_gpu else 1)  # the backward pass has 2.5 times as many
    measured = {} if fastest is None else speed(layout.num_tokens, found["seconds"][fastest], operations)
    return found | {"fastest": fastest, **measured, **memory()}


def by_buckets(layout: PrefixLayout, compiled: bool) -> Callable:
    return lambda q, k, v: shared_prefix_attention(None, q, k, v, None, prefix_layout=layout)[0]


def by_varlen(layout: PrefixLayout, compiled: bool) -> Callable:
    """Attention with one sequence per completion; its keys are a copy of the prompt's and its own."""
    from torch.nn.attention.varlen import varlen_attn

    device, own = layout.last.device, layout.completions
    prompt = own[0].prefix_length
    keys = [torch.arange(prompt), *(torch.cat([torch.arange(prompt), torch.arange(o.start, o.end)]) for o in own)]
    key_index = torch.cat(keys).to(device)
    ends = lambda sizes: torch.tensor([0, *sizes]).cumsum(0).int().to(device)  # noqa: E731
    queries = [prompt, *(o.length for o in own)]
    cu_q, cu_k = ends(queries), ends(map(len, keys))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (states[0].transpose(0, 1) for states in (q, k, v))
        sizes = (max(queries), max(map(len, keys)))
        return varlen_attn(q, k[key_index], v[key_index], cu_q, cu_k, *sizes, window_size=(-1, 0), enable_gqa=True)[
            None
        ]

    return call


def by_flex(layout: PrefixLayout, compiled: bool) -> Callable:
    """Attention with a block mask: a token sees the prompt and the tokens of its completion up to itself."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, size = layout.last.device, layout.num_tokens
    owner = torch.zeros(size, dtype=torch.long, device=device)  # 0: the prompt
    for number, own in enumerate(layout.completions, start=1):
        owner[own.start : own.end] = number

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & ((owner[key] == 0) | (owner[key] == owner[query]))

    mask = create_block_mask(sees, None, None, size, size, device=device)
    attention = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
    return lambda q, k, v: attention(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def by_merging(layout: PrefixLayout, compiled: bool) -> Callable:
    """Attention to the prompt and attention within the completion, merged by their log-sum-exp."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    own = layout.completions
    prompt, length = own[0].prefix_length, own[0].length
    attention = torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    masks = {
        size: create_block_mask(causal, None, None, size, size, device=layout.last.device) for size in {prompt, length}
    }
    options = {"enable_gqa": True, "return_aux": AuxRequest(lse=True)}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        first = attention(*(t[:, :, :prompt] for t in (q, k, v)), block_mask=masks[prompt], enable_gqa=True)
        rest, keys, values = (
            t[0, :, prompt:].unflatten(1, (len(own), length)).transpose(0, 1) for t in (q, k, v)
        )  # (K, H, C, D)
        inner, inner_aux = attention(rest, keys, values, block_mask=masks[length], **options)
        outer, outer_aux = attention(q[:, :, prompt:], k[:, :, :prompt], v[:, :, :prompt], **options)
        outer = outer[0].unflatten(1, (len(own), length)).transpose(0, 1)
        outer_lse = outer_aux.lse[0].unflatten(1, (len(own), length)).transpose(0, 1)
        share = torch.sigmoid(inner_aux.lse - outer_lse)[..., None]
        merged = inner.float() * share + outer.float() * (1 - share)
        merged = merged.transpose(0, 1).flatten(1, 2)[None].to(first.dtype)
        return torch.cat([first, merged], dim=2).transpose(1, 2)

    return call


def profile_of(bed: Bed) -> dict[str, Any]:
    """(g) Time shares in a flat reward step at K = 4, P = 4C: products, attention, dequantization, the rest, gaps."""
    from torch.profiler import ProfilerActivity, profile

    model = bed.model()
    layout, _ = bed.both(bed.groups(2, 1024, 256, 4))
    step = stepper(bed, model, lambda: flat_scores(model, layout).square().mean())
    step()
    on_gpu = torch.cuda.is_available()
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as recorded:
        step()
    wall = (time.perf_counter() - started) * 1e6
    clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kinds = {
        "dequantization": ("dequant", "kdequant"),
        "attention": ("attention", "flash", "fmha", "attn"),
        "matrix products": ("gemm", "mm", "cutlass", "matmul"),
    }
    shares = dict.fromkeys([*kinds, "the rest"], 0.0)
    for event in recorded.key_averages():
        kind = next(
            (kind for kind, parts in kinds.items() if any(part in event.key.lower() for part in parts)), "the rest"
        )
        shares[kind] += getattr(event, clock)
    busy = sum(shares.values())
    return {
        "shares": {kind: spent / busy for kind, spent in shares.items()},
        "share_without_work": max(0.0, 1 - busy / wall) if on_gpu else None,
    }


# name -> (the row, its usual seconds on an H100); the most useful first
ROWS: dict[str, tuple[Callable[[Bed], dict[str, Any]], int]] = {
    "reward step, K = 4, P = 4C": (partial(reward_step, p=1024, c=256, k=4), 60),
    "peak of a pair, 2 x (512 + 512)": (
        partial(peak_of, p=512, c=512, k=2, name="peak of a pair, 2 x (512 + 512)"),
        30,
    ),
    "peak of K = 8, 512 + 512": (partial(peak_of, p=512, c=512, k=8, name="peak of K = 8, 512 + 512"), 30),
    "reward step, K = 4, P = C": (partial(reward_step, p=512, c=512, k=4), 40),
    "reward step, pairs, P = C": (partial(reward_step, p=512, c=512, k=2), 30),
    "ensemble of 4, branched": (ensemble, 45),
    "scoring, 16 completions a prompt": (scoring, 40),
    "ORM step, 4 answers": (partial(token_step, steps=False), 30),
    "PRM step, 4 answers": (partial(token_step, steps=True), 30),
    "attention, 512 tokens": (partial(kernels, length=512), 40),
    "attention, 2k tokens": (partial(kernels, length=2048), 20),
    "attention, 8k tokens": (partial(kernels, length=8192), 20),
    "profile of a reward step": (profile_of, 15),
    **{
        f"config {path.parent.name}/{path.stem}": (partial(config_peak, path=path), 20)
        for path in sorted(CONFIGS.glob("*/*_qlora_8b.yaml"))
        if path.parent.name in ("reward", "orm", "prm", "segment", "ensemble")
    },
}


def train_real(args: argparse.Namespace) -> dict[str, Any]:
    """Train a real model with QLoRA on real rows for one epoch; return held-out accuracy and tokens per second."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from trl_ext import RewardConfig, RewardTrainer

    rows = load_dataset("json", data_files=args.dataset, split="train").train_test_split(test_size=0.1, seed=0)
    cuda = torch.cuda.is_available()
    compute = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    ranked = "completions" in rows["train"].column_names
    trainer = RewardTrainer(
        model=args.model,
        args=RewardConfig(
            output_dir=f"{args.output}/model",
            num_train_epochs=1,
            max_steps=2 if args.smoke else -1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=8,
            learning_rate=1e-4,
            loss_type="plackett_luce" if ranked else "bradley_terry",
            bf16=cuda,
            use_cpu=not cuda,
            gradient_checkpointing=True,
            report_to="none",
            save_strategy="no",
            model_init_kwargs={"dtype": "bfloat16" if cuda else "float32"},
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        quantization_config=compute if cuda else None,
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    found = trainer.evaluate()
    trainer.save_model()
    tokens = trainer.state.log_history[-2].get("num_tokens") or found.get("eval_num_tokens")
    return {
        "model": args.model,
        "rows": len(rows["train"]),
        "metrics": {name: value for name, value in found.items() if isinstance(value, float)},
        "seconds": seconds,
        "tokens_per_second": None if tokens is None else tokens / seconds,
        **memory(),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure every missing row. Returns 1 if a memory limit was exceeded or a row failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="Qwen/Qwen3-8B", help="a known shape, or a folder with config.json")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds; rows that would exceed it do not start")
    parser.add_argument("--only", nargs="*", default=None, help="run only rows whose name contains one of these")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, also on a CPU, to see that all rows run")
    parser.add_argument("--model", default=None, help="train a reward model from this folder instead")
    parser.add_argument("--dataset", default=None, help="with --model: JSONL file of pairs or rankings")
    parser.add_argument("--output", default="outputs/measure_gpu")
    args = parser.parse_args(argv)
    started = time.monotonic()
    if not (torch.cuda.is_available() or args.smoke):
        print(
            "measure_gpu: found no CUDA device; needed: one, or --smoke to check that every row runs.", file=sys.stderr
        )
        return 2
    if (args.model is None) != (args.dataset is None):
        print("measure_gpu: found one of --model and --dataset; needed: both or neither.", file=sys.stderr)
        return 2
    file = Path(args.output, "rows.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"machine": machine, "shape": "tiny" if args.smoke else args.shape, "torch": torch.__version__}
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    found = {row["row"]: row for row in known if about.items() <= row.items() and "error" not in row}
    rows = ROWS if args.model is None else {"real reward model": (lambda bed: train_real(args), 0)}
    bed, late = Bed(args), []
    for name, (row, usual) in rows.items():
        if name in found or (args.only is not None and not any(part in name for part in args.only)):
            continue
        if time.monotonic() - started + usual > args.budget:
            late.append(name)
            continue
        torch.manual_seed(0)
        before = time.monotonic()
        try:
            measured = row(bed)
        except (RuntimeError, ImportError, ValueError, NotImplementedError) as error:  # memory, a wheel, an old torch
            measured = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
            bed = Bed(args)
        found[name] = {"row": name, **about, **measured, "took": round(time.monotonic() - before, 1)}
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(found[name]) + "\n")
            out.flush()
            os.fsync(out.fileno())
        print(json.dumps(found[name]), flush=True)
    print(
        formatted(
            [
                ["row", "took, s", "ratio", "bar met"],
                *([cell(row.get(n)) for n in ("row", "took", "ratio", "bar_met")] for row in found.values()),
            ]
        )
    )
    if late:
        print(f"Not started within {args.budget:g} s: {'; '.join(late)}. Run the same command again.")
    return int(any("error" in row or row.get("bar_met") is False for row in found.values()))


def cell(value: Any) -> str:
    """Format a value as a table cell."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.2f}x" for name, number in value.items())
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
