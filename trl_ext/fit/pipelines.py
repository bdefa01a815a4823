"""The phases of `trl-ext rejection-sample` and the legs of `trl-ext weak-to-strong`, from their configs.

On a GPU none of them shares memory with another: each has a process of its own. Knows the two commands and their
configs. Estimates and runs nothing itself.
"""

import argparse
import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_ext.fit.changes import Change, changes
from trl_ext.fit.config import TRAINERS, Parsed, objects, parse, sizes_of, values_of
from trl_ext.fit.phases import Phase, job, policy, reward_training, scoring, text_training, writing
from trl_ext.fit.rows import Sizes


PROMPT_LENGTH = 512
"""Tokens, where a config says nothing of prompts and `--prompt_length` is not given."""
SFT = {"load_in_4bit": True, "use_peft": True, "lora_target_modules": "all-linear", "dtype": "bfloat16"}
"""How selected rows are learnt from where `--sft_config` does not say: QLoRA with TRL's defaults."""
COMMANDS = {"preference": "reward", "outcome": "orm", "process": "prm"}
"""The command whose trainer a task of weak-to-strong learning uses."""


def rejection_phases(args: argparse.Namespace) -> list[Phase]:
    """Generation, scoring by each reward function, and learning from what was selected."""
    from trl_ext.cli._generation import sampling_kwargs
    from trl_ext.cli.rejection_sample import make_parser
    from trl_ext.pipelines.generation.sampling import Sampling
    from trl_ext.pipelines.rejection_sampling.sampler import check_request
    from trl_ext.pipelines.reward_functions import weights_by_name

    _no_candidates(args, "num_generations says how many completions a prompt has")
    (own,) = objects(make_parser(), values_of(args), trains=False)
    sampling = Sampling.of(**sampling_kwargs(own))
    check_request(own.num_generations, own.backend, sampling)
    weights_by_name(own.reward_funcs or [], own.reward_weights)
    prompt = PROMPT_LENGTH if args.prompt_length is None else args.prompt_length
    completion = own.max_completion_length if args.completion_length is None else args.completion_length
    phases = [_generation(own, sampling, prompt, completion, args)]
    for spec in own.reward_funcs or []:
        phases.append(_scoring_by(spec, own, prompt, completion, args))
    return [*phases, _fine_tuning(own, prompt, completion, args)]


def _generation(own: Any, sampling: Any, prompt: int, completion: int, args: argparse.Namespace) -> Phase:
    from trl_ext.cli._generation import model_init_kwargs
    from trl_ext.fit.known_shapes import config_of
    from trl_ext.fit.policy_estimate import cache_bytes, weight_bytes

    name = f"generation ({own.backend})"
    if own.backend == "openai":
        return Phase(name, own.model_name_or_path, note="not estimated: another program's server has the model")
    config, _ = config_of(own.model_name_or_path)
    loaded = policy(config, own.dtype, own.load_in_4bit, False, None, own.attn_implementation)
    writes = job(loaded, sampling, own.generation_batch_size, prompt, completion)
    if own.backend == "vllm":
        gib = [size / 2**30 for size in (weight_bytes(loaded), cache_bytes(writes))]
        return Phase(
            name,
            own.model_name_or_path,
            note="not estimated: vLLM takes the share of its card that it is told (--gpu_memory_utilization) and "
            f"fills it with caches. Of that the weights are {gib[0]:.1f} GiB, and the cache of one completion "
            f"{gib[1]:.2f} GiB ({prompt} + {completion} tokens)",
        )
    halved = own.generation_batch_size // 2
    own_changes = [
        Change("half the generation_batch_size", {"generation_batch_size": halved}, True),
        Change("4-bit policy", {"load_in_4bit": True}, False),
    ]
    if args.completion_length is None:
        shorter = {"max_completion_length": completion // 2}
        own_changes.append(Change("half the max_completion_length", shorter, False))
    kwargs = model_init_kwargs(own)
    kwargs.pop("revision", None)
    phase = writing(name, own.model_name_or_path, writes, sampling, kwargs, args)
    phase.changes = [change for change in own_changes if change.values != {"load_in_4bit": own.load_in_4bit}]
    if args.prompt_length is None:
        phase.note = f"prompts are taken to have {prompt} tokens: --prompt_length says otherwise"
    return phase


def _scoring_by(spec: str, own: Any, prompt: int, completion: int, args: argparse.Namespace) -> Phase:
    """Scoring by a reward function; its model is known by a folder, a config beside this one, or its name."""
    from trl_ext.pipelines.reward_functions import reward_name

    name = f"scoring ({reward_name(spec)})"
    try:
        found = _reward_model(spec, args)
    except ValueError as error:
        return Phase(name, spec, note=f"not estimated: {error}")
    if found is None:
        return Phase(name, spec, note="not estimated: a function, which is not counted")
    command, parsed, config, source = found
    phase = scoring(name, command, parsed, config, Sizes(prompt, completion, own.num_generations, 1), args)
    phase.model, phase.note = parsed.model.model_name_or_path, f"reward model by {source}"
    return phase


def _reward_model(spec: str, args: argparse.Namespace) -> tuple[str, Parsed, Any, str] | None:
    """The command whose trainer made a reward model, its arguments, the architecture, and where that is known from."""
    from peft import PeftConfig
    from trl import ModelConfig

    from trl_ext.fit.known_shapes import config_of
    from trl_ext.models.ensemble.ensemble_files import ENSEMBLE_NAME
    from trl_ext.models.sidecar import read_sidecar
    from trl_ext.pipelines.reward_functions import is_function_name

    if is_function_name(spec):
        return None
    file = None
    around = Path(args.config).resolve().parent.parent
    for path in sorted(path for command in TRAINERS for path in around.glob(f"{command}/*.yaml")):
        if f"output_dir: {spec}" in path.read_text(encoding="utf-8").splitlines():
            file = path
    if file is not None and file.parent.name == "ensemble" or Path(spec, ENSEMBLE_NAME).is_file():
        raise ValueError(f"{spec} is an ensemble, which is not estimated as a scorer")
    if Path(spec).is_dir():
        sidecar = read_sidecar(spec)
        if sidecar is not None and sidecar.kind != "scalar":
            raise ValueError(f"{spec} is a reward model of the kind {sidecar.kind!r}")
        model = ModelConfig(spec if sidecar is None else sidecar.base.id)
        if sidecar is not None:
            model.dtype, model.use_peft = sidecar.base.dtype, sidecar.is_adapter
            model.load_in_4bit = bool((sidecar.base.quantization or {}).get("load_in_4bit"))
            model.use_bnb_nested_quant = bool((sidecar.base.quantization or {}).get("bnb_4bit_use_double_quant"))
            if sidecar.is_adapter:
                adapter = PeftConfig.from_pretrained(spec)
                model.lora_r, model.lora_target_modules = adapter.r, adapter.target_modules
        config, _ = config_of(model.model_name_or_path)
        return "reward", Parsed(training=None, model=model), config, f"the folder {spec}"
    if file is not None:
        parsed = parse(file.parent.name, argparse.Namespace(config=str(file), override=[]))
        config, _ = config_of(parsed.model.model_name_or_path)
        return file.parent.name, parsed, config, f"{file.parent.name}/{file.name}"
    try:
        return "reward", Parsed(training=None, model=ModelConfig(spec)), config_of(spec)[0], "its name"
    except ValueError as error:
        raise ValueError(
            f"the reward model {spec} is not there yet, and no config beside this one has it as its output_dir. "
            f"Train it, or name one that is there: --override 'reward_funcs=[PATH]'"
        ) from error


def _fine_tuning(own: Any, prompt: int, completion: int, args: argparse.Namespace) -> Phase:
    """SFT on what was selected."""
    from trl import ModelConfig, SFTConfig, TrlParser

    from trl_ext.fit.known_shapes import config_of
    from trl_ext.pipelines.rejection_sampling.scored import Scored
    from trl_ext.pipelines.rejection_sampling.selection import select

    two = Scored([0, 0], [0, 1], [0.0, 1.0], [0, 1], [2, 2], [True, True])
    kind = select(two, own.selection, **(own.selection_kwargs or {})).kind
    if kind != "rows":
        return Phase(
            "fine-tuning",
            own.model_name_or_path,
            note=f"not estimated: {own.selection} selects {kind}, which SFT does not learn from",
        )
    if own.backend == "openai":
        return Phase("fine-tuning", own.model_name_or_path, note="not estimated: the policy is another program's")
    from_file = {"model_name_or_path": own.model_name_or_path, "output_dir": own.output_dir, **SFT}
    if args.sft_config is not None:
        from_file = values_of(argparse.Namespace(config=args.sft_config, override=[]))
    parser = TrlParser((SFTConfig, ModelConfig))
    training, model = objects(parser, {k: v for k, v in from_file.items() if not k.startswith("dataset_")})
    longest = training.max_length or prompt + completion  # what is longer is cut
    completion = min(completion, longest - min(prompt, longest // 2))
    sizes = Sizes(min(prompt, longest - completion), completion, 1, training.per_device_train_batch_size)
    model.model_name_or_path = model.model_name_or_path or own.model_name_or_path
    shape, _ = config_of(model.model_name_or_path)
    phase = text_training("fine-tuning (SFT)", Parsed(training=training, model=model), shape, None, sizes, args)
    phase.note = "by `trl sft` with QLoRA and TRL's defaults: --sft_config FILE says otherwise"
    if args.sft_config is not None:
        phase.note = f"by {args.sft_config}"
    return phase


def weak_to_strong_phases(args: argparse.Namespace) -> list[Phase]:
    """Weak model, ceiling and student: each trains, and then labels or is tested."""
    from trl_ext.cli.weak_to_strong import make_parser, weak_model_config
    from trl_ext.pipelines.weak_to_strong.config import TASKS

    values = values_of(args)
    parser = make_parser(task=values.get("task", "preference"))
    _, config, training, weak_args, strong = objects(parser, values)
    TASKS[config.task].make().check(training, config.student_loss, [], [])
    weak = weak_model_config(strong, weak_args)
    legs = [("weak", name, weak, "gold") for name in config.weak_model_name_or_path]
    for name in config.strong_model_name_or_path:
        legs += [("ceiling", name, strong, "gold"), ("student", name, strong, config.student_loss)]
    phases: list[Phase] = []
    for role, name, loading, loss in legs:
        own = f" {name}" if len(legs) > 3 else ""
        found = _leg(config, training, role, name, loading, loss, args)
        for phase in found:
            if role == "student" and (loss != "kd" or phase.name != "training"):
                phase.same_as = f"ceiling{own}: {phase.name}"
            phase.name = f"{role}{own}: {phase.name}"
        phases += found
    return phases


def _leg(
    config: Any, training: Any, role: str, name: str, loading: Any, loss: str, args: argparse.Namespace
) -> list[Phase]:
    """A leg's training, and what its model does then."""
    from trl import get_peft_config, get_quantization_config

    from trl_ext.fit.known_shapes import config_of
    from trl_ext.pipelines.generation.sampling import Sampling
    from trl_ext.pipelines.generation.transformers_backend import TransformersGenerator
    from trl_ext.pipelines.weak_to_strong.config import TASKS
    from trl_ext.pipelines.weak_to_strong.runs import Run, changed_arguments

    model, weak = copy.copy(loading), role == "weak"
    model.model_name_or_path = name
    training = changed_arguments(training, config.weak_training if weak else {}, "weak_training")
    adapter, quantization = get_peft_config(model), get_quantization_config(model)
    task, kwargs = TASKS[config.task].make(), config.student_loss_kwargs
    run = Run(task, name, training, 0, adapter, quantization, loss, kwargs)
    own = run.arguments(Path(training.output_dir), "none")
    parsed, shape = Parsed(training=own, model=model), config_of(name)[0]
    if config.task in COMMANDS:
        command = COMMANDS[config.task]
        sizes = sizes_of(command, parsed, shape, args)
        trains = reward_training("training", command, parsed, shape, sizes, args)
        trains.changes = list(_leg_changes(command, weak, parsed, config))
        return [trains, scoring("judging", command, parsed, shape, sizes, args)]
    _no_candidates(args, "there is one text a prompt")
    prompt, completion = _lengths(own.max_length, config.max_completion_length, args)
    sizes = Sizes(prompt, completion, 1, own.per_device_train_batch_size)
    teachers = [config_of(teacher)[0] for teacher in config.weak_model_name_or_path if loss == "kd"]
    held = max(teachers, key=lambda teacher: teacher.get_text_config().hidden_size, default=None)
    trains = text_training("training", parsed, shape, held, sizes, args)
    trains.changes = list(_leg_changes("text", weak, parsed, config))
    # an adapter is loaded on its base as that was saved, all weights as they were trained
    reloaded = policy(shape, None if model.use_peft else model.dtype, False, False, adapter, None)
    temperature = config.generation_temperature if weak else 0.0
    sampling = Sampling(max_completion_length=completion, temperature=temperature)
    at_a_time = inspect.signature(TransformersGenerator).parameters["batch_size"].default
    return [
        trains,
        writing("writing", name, job(reloaded, sampling, at_a_time, prompt, completion), sampling, {}, args),
    ]


def _leg_changes(command: str, weak: bool, parsed: Parsed, config: Any) -> Iterator[Change]:
    """Changes of a leg's training as changes of the config."""
    for change in changes(command, parsed.training, parsed.model):
        values = dict(change.values)
        if weak:
            values = {f"weak_{name}": values[name] for name in ("use_peft", "load_in_4bit") if name in values}
            arguments = {name: value for name, value in change.values.items() if name in vars(parsed.training)}
            values |= {"weak_training": config.weak_training | arguments} if arguments else {}
        if values:
            yield change._replace(values=values)


def _no_candidates(args: argparse.Namespace, why: str) -> None:
    if args.candidates is not None:
        raise ValueError(f"--candidates has no meaning here: {why}.")


def _lengths(longest: int | None, written: int, args: argparse.Namespace) -> tuple[int, int]:
    """Tokens of prompt and completion of rows that fill `max_length`."""
    completion = written if args.completion_length is None else args.completion_length
    longest = PROMPT_LENGTH + completion if longest is None else longest
    completion = min(completion, longest // 2) if args.completion_length is None else completion
    prompt = longest - completion if args.prompt_length is None else args.prompt_length
    if prompt < 1 or completion < 2 or prompt + completion > longest:
        raise ValueError(
            f"{prompt} + {completion} tokens do not go with max_length={longest}. Needed: at least 1 of a prompt and "
            "2 of a completion, and no more in all."
        )
    return prompt, completion


PIPELINES = {"rejection_sampling": rejection_phases, "weak_to_strong": weak_to_strong_phases}
"""The folder of a pipeline's configs -> its phases."""
