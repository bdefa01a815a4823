"""Every training argument either counts for a kept result or is listed as irrelevant with a reason, for every user."""

import copy
import dataclasses
from functools import partial

import pytest
import torch

from trl_ext import (
    ORMConfig,
    PRMConfig,
    RejectionSamplingConfig,
    RewardConfig,
    SegmentRewardConfig,
    WeakToStrongConfig,
)
from trl_ext.pipelines.rejection_sampling.config import ROUND_IRRELEVANT
from trl_ext.pipelines.rejection_sampling.rounds import Rounds
from trl_ext.pipelines.stages.cache_key import StaleError, canonical
from trl_ext.pipelines.stages.cached_stages import Stage, stage_keys
from trl_ext.pipelines.stages.training_arguments import IRRELEVANT, arguments_key
from trl_ext.pipelines.weak_to_strong.experiment import RUN_IRRELEVANT, cache_settings
from trl_ext.pipelines.weak_to_strong.generation_task import GenerationTask
from trl_ext.pipelines.weak_to_strong.runs import Run
from trl_ext.pipelines.weak_to_strong.tasks import OutcomeTask, PreferenceTask, ProcessTask


CONFIGS = [RewardConfig, ORMConfig, PRMConfig, SegmentRewardConfig, WeakToStrongConfig, RejectionSamplingConfig]
TASKS = {
    RewardConfig: PreferenceTask(),
    ORMConfig: OutcomeTask(),
    PRMConfig: ProcessTask(),
    WeakToStrongConfig: GenerationTask(),
}


def made(config, **kwargs):
    return config(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **kwargs)


def each_changed(args):
    """(name, the same arguments with another value of that name) for every argument."""
    for field in dataclasses.fields(args):
        if field.init:
            changed, value = copy.copy(args), getattr(args, field.name)
            another = (
                not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else "other"
            )
            setattr(changed, field.name, another)
            yield field.name, changed


def check(args, key, irrelevant):
    """That exactly the irrelevant arguments leave the key as it is; returns how many were changed."""
    before, count = key(args), 0
    for name, changed in each_changed(args):
        assert (key(changed) == before) == (name in irrelevant), name
        count += 1
    return count


def test_every_reason_is_a_sentence_and_every_name_an_argument():
    known = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    for table in (IRRELEVANT, ROUND_IRRELEVANT, RUN_IRRELEVANT):
        assert table.keys() <= known
        assert all(len(reason.split()) > 4 and reason.endswith(".") for reason in table.values())


@pytest.mark.parametrize("config", CONFIGS)
def test_cached_stages_run_again_or_the_argument_is_irrelevant(config):
    def key(args):
        return stage_keys([Stage("train", "Train", print, {"arguments": arguments_key(args)})])

    assert check(made(config), key, IRRELEVANT) > 100


@pytest.mark.parametrize("config", TASKS)
def test_runs_of_weak_to_strong_run_again_or_the_argument_is_irrelevant(config):
    task = TASKS[config]
    for loss in ("gold", "kd"):
        irrelevant = {*IRRELEVANT, *RUN_IRRELEVANT, *task.loss_arguments(loss, {})}  # the last are set for each run

        def key(args, loss=loss):
            return canonical(cache_settings(Run(task, "m", args, 0, loss=loss), "model", ["test"]))

        check(made(config), key, irrelevant)


def test_rounds_refuse_or_the_argument_is_irrelevant(tmp_path):
    args, rounds = made(RejectionSamplingConfig), Rounds(tmp_path)
    rounds.check(args.settings_of_a_round())
    for name, changed in each_changed(args):
        if name in IRRELEVANT | ROUND_IRRELEVANT:
            rounds.check(changed.settings_of_a_round())
        else:
            with pytest.raises(
                StaleError, match=rf"made with other settings \({name}.*, now .*give another output_dir"
            ):
                rounds.check(changed.settings_of_a_round())


def sign(scores, ratings, mask, *, sign=1.0, **kwargs):
    return sign * scores.sum(-1)


def test_a_callable_loss_counts_by_its_content_and_configs_by_their_values():
    one, other = (arguments_key(made(RewardConfig, loss_type=partial(sign, sign=s))) for s in (1.0, -1.0))
    assert one != other and one == arguments_key(made(RewardConfig, loss_type=partial(sign, sign=1.0)))
    plus, minus = (made(RewardConfig, loss_type=loss) for loss in (lambda s, r, m: s, lambda s, r, m: -s))
    assert arguments_key(plus) != arguments_key(minus)
    dtypes = [arguments_key(made(RewardConfig, model_init_kwargs={"dtype": d})) for d in (torch.float16, "float16")]
    assert dtypes[0] == dtypes[1] != arguments_key(made(RewardConfig))


def test_overrides_replace_values_before_they_are_compared():
    args = made(RewardConfig)
    assert arguments_key(args, {"learning_rate": 0.5}) == arguments_key(made(RewardConfig, learning_rate=0.5))
    assert arguments_key(args, {"logging_steps": 3}) == arguments_key(args)
    assert arguments_key(args, irrelevant={"max_length": "Not here."}).keys() == arguments_key(args).keys() - {
        "max_length"
    }
