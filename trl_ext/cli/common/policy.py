"""The steps that `trl-ext dense-grpo` and `trl-ext ppo` share: load data and rewards, train, save, report.

It maps arguments to a trainer. It does not know how a trainer trains.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ext.cli.common.options import command_parser, parse
from trl_ext.cli.common.train import load_data


if TYPE_CHECKING:
    from transformers import Trainer

    from trl_ext.trainers.common.command_line import Parser


def policy_parser(arguments: type, config_class: type, prog: str | None) -> "Parser":
    """The parser over the command's `arguments`, our `config_class`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl import DatasetMixtureConfig, ModelConfig

    return command_parser((arguments, config_class, ModelConfig, DatasetMixtureConfig), prog)


def train_policy(parser: "Parser", trainer_class: "type[Trainer]", argv: list[str] | None) -> int:
    """Parse, train, save, and write the report page. Returns the exit status."""
    from trl_ext.logs import show_logs
    from trl_ext.trainers.common.command_line import build_trainer, check_resume
    from trl_ext.trainers.common.console import show_important_metrics
    from trl_ext.trainers.policy.report import policy_report

    script_args, training_args, model_args, dataset_args = parse(parser, argv)
    if model_args.model_name_or_path is None:
        raise ValueError("No model was named. Give `--model_name_or_path` a Hub id or a folder.")
    if not script_args.reward_funcs and not script_args.dense_reward_funcs:
        raise ValueError("No reward was named. Give `--reward_funcs` or `--dense_reward_funcs`.")
    if training_args.log_level != "passive" or not training_args.should_log:  # the user's, or another process
        show_logs(training_args.get_process_log_level())
    check_resume(training_args.resume_from_checkpoint, Path(training_args.output_dir))
    evaluate = training_args.eval_strategy != "no"
    train_dataset, eval_dataset = load_data(script_args, dataset_args, evaluate, training_args.seed)

    def rewards(specs: list[str] | None) -> list[Any]:
        return [load_policy_reward(spec, model_args, script_args.share_base) for spec in specs or []]

    more = {"reward_funcs": rewards(script_args.reward_funcs)}
    more["dense_reward_funcs"] = rewards(script_args.dense_reward_funcs)
    if getattr(script_args, "value_model", None) is not None:  # only PPO's arguments have it
        more["value_model"] = script_args.value_model
    trainer = build_trainer(trainer_class, training_args, model_args, train_dataset, eval_dataset, **more)
    show_important_metrics(trainer)
    trainer.dataset_name = script_args.dataset_name
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.save_state()  # all metrics
    trainer.accelerator.print(f"Saved the policy to {training_args.output_dir}.")
    if trainer.is_world_process_zero():
        print(f"Report: {policy_report(training_args.output_dir)}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    return 0


def load_policy_reward(spec: str, model_args: Any, share_base: bool) -> Any:
    """
    A reward function by its name, or a reward model by its folder.

    With `share_base`, an adapter that was trained on the policy's base in the same quantization is put on that base.
    """
    from trl_ext.pipelines.reward_functions import load_reward
    from trl_ext.scoring.shared_base_scorer import SharedBaseScorer, shares_base

    if share_base and shares_base(spec, model_args):
        return SharedBaseScorer(spec)
    return load_reward(spec)
