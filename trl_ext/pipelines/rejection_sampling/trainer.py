"""Expert iteration with the arguments of `trl.GRPOTrainer`: sample, score, select, fine-tune, repeat.

Every finished round is on disk, and so are the samples and checkpoints of an unfinished one. If you run the same
script again, it continues where it stopped. Nothing stays in memory between stages; each stage loads the policy that
the previous one saved.
"""

import copy
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import trl
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import TrainOutput

from trl_ext.logs import follow_transformers
from trl_ext.models.fingerprint import model_identity, tokenizer_identity
from trl_ext.models.inputs import text_tokenizer
from trl_ext.models.loading import local_folder
from trl_ext.pipelines.generation.sampling import GRPOSamplingFields
from trl_ext.pipelines.generation.transformers_backend import load_policy
from trl_ext.pipelines.rejection_sampling.config import WITHOUT_EFFECT, RejectionSamplingConfig
from trl_ext.pipelines.rejection_sampling.diagnostics import (
    evaluation_metrics,
    hacking_warning,
    log_rounds,
    no_gain_warning,
    plot_rounds,
    round_metrics,
    rounds_card,
)
from trl_ext.pipelines.rejection_sampling.prompts import columns_of, prompts_digest
from trl_ext.pipelines.rejection_sampling.round_training import (
    chat_template_of,
    check_policy,
    check_rounds_on_server,
    check_selected,
    fine_tune,
    rows_that_fit,
    rows_to_learn_from,
)
from trl_ext.pipelines.rejection_sampling.rounds import Rounds, best_round
from trl_ext.pipelines.rejection_sampling.sampler import RejectionSampler
from trl_ext.pipelines.rejection_sampling.selection import check_selection
from trl_ext.pipelines.reward_functions import (
    RewardFunc,
    check_rewards,
    reward_names,
    reward_setting,
    weights_by_name,
    with_tokenizers,
)
from trl_ext.pipelines.stages.store import write_json
from trl_ext.pipelines.stages.values import plain
from trl_ext.trainers.common.inherited_arguments import warn_of_arguments_without_effect
from trl_ext.trainers.common.model_card import CARD_NAME, write_card
from trl_ext.trainers.common.tracking import without_missing_wandb


logger = logging.getLogger(__name__)


class RejectionSamplingTrainer:
    """
    Rounds of rejection sampling and supervised fine-tuning.

    A round draws `num_generations` completions of each prompt from the policy, scores them with the reward functions,
    selects samples, and fine-tunes on them with `trl.SFTTrainer` and a new optimizer. After each round the policy is
    evaluated on `eval_dataset`, and the best policy is kept: by the verifier if there is one, else by the reward.

    See *RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment* by Dong et al.
    (https://huggingface.co/papers/2304.06767) and, for `start_from="initial"`, *Beyond Human Data: Scaling
    Self-Training for Problem-Solving with Language Models* by Singh et al. (https://huggingface.co/papers/2312.06585).

    Args:
        model, reward_funcs, processing_class, reward_processing_classes, callbacks, quantization_config, peft_config:
            As in `trl.GRPOTrainer`. A model in memory is saved first and does not change; the trained policy is
            `trainer.model`. A model by path is trained in float32, as by `trl.SFTTrainer`, unless
            `args.model_init_kwargs` sets another `dtype`; it generates in the dtype of its checkpoint. Reward
            functions may also be reward models of this package, by path.
        args ([`RejectionSamplingConfig`] or `trl.GRPOConfig`, *optional*):
            The configuration. Only those arguments of a `GRPOConfig` are used that have a meaning here.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`):
            Rows with a `prompt`; the reward functions get the other columns.
        verifier (reward function, *optional*):
            The true objective that the reward approximates, such as a check of the answer. It does not select samples.
            It rates rounds on `eval_dataset`, and a warning is logged if the reward rises and the verifier's score
            does not.

    Attributes:
        history (`list[dict]`): the metrics of each round; round 0 is the policy before training.

    Example:

    ```python
    from trl_ext import RejectionSamplingConfig, RejectionSamplingTrainer  # was: trl's GRPOConfig and GRPOTrainer

    trainer = RejectionSamplingTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs="outputs/rankings",
        args=RejectionSamplingConfig(output_dir="outputs/rejection_sampling", num_rounds=3),
        train_dataset=prompts,
    )
    trainer.train()
    ```
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: RejectionSamplingConfig | trl.GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any | None = None,
        verifier: RewardFunc | None = None,
    ):
        if args is None:
            args = RejectionSamplingConfig(output_dir="rejection_sampling_output")
        elif isinstance(args, trl.GRPOConfig):
            args = RejectionSamplingConfig.from_grpo(args)
        elif not isinstance(args, RejectionSamplingConfig):
            raise ValueError(
                f"args is a {type(args).__name__}. Needed: a RejectionSamplingConfig, which has all arguments of "
                "trl.SFTConfig and those of the rounds, or a trl.GRPOConfig."
            )
        follow_transformers(args.get_process_log_level())
        given = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"RejectionSamplingTrainer cannot use `{name}` of GRPOTrainer.")
        if any(item is not None for item in optimizers):
            raise ValueError("Each round needs a new optimizer. Set `optim` and `learning_rate`, not `optimizers`.")
        if reward_funcs is None or train_dataset is None:
            missing = "reward_funcs" if reward_funcs is None else "train_dataset"
            raise ValueError(f"RejectionSamplingTrainer needs {missing}.")
        if isinstance(eval_dataset, dict):
            raise ValueError("eval_dataset is a dict; needed: one data set, on which rounds are compared.")
        if verifier is not None and eval_dataset is None:
            raise ValueError("A verifier rates the policy on eval_dataset, which is missing. Give both or neither.")
        check_rounds_on_server(args, model, peft_config)
        check_policy(model, peft_config)
        warn_of_arguments_without_effect(args, WITHOUT_EFFECT)
        check_selection(args.selection, args.selection_kwargs, ("rows",))
        without_missing_wandb(args)
        self.args = args
        self.history: list[dict[str, Any]] = []
        self._rewards = with_tokenizers(reward_funcs, reward_processing_classes)
        self._verifier = verifier
        check_rewards(self._rewards, columns_of(train_dataset))
        if eval_dataset is not None:
            check_rewards([*self._rewards, *([] if verifier is None else [verifier])], columns_of(eval_dataset))
        weights_by_name(self._rewards, args.reward_weights)  # their number is checked here
        self._names = reward_names([*self._rewards, *([] if verifier is None else [verifier])])
        self._train_dataset, self._eval_dataset = train_dataset, eval_dataset
        self._callbacks, self._peft_config = callbacks, peft_config
        self._init_kwargs = dict(args.model_init_kwargs or {})
        if args.trust_remote_code:
            self._init_kwargs["trust_remote_code"] = True
        if quantization_config is not None:
            self._init_kwargs["quantization_config"] = quantization_config
        self._rounds = Rounds(Path(args.output_dir) / "rounds")
        self._model: PreTrainedModel | PeftModel | None = None
        self._chat_template = chat_template_of(args)
        self._given = model
        self._in_memory = not isinstance(model, (str, Path))
        self._given_tokenizer = processing_class and text_tokenizer(processing_class)
        if self._in_memory and processing_class is None:
            source = model.get_base_model() if isinstance(model, PeftModel) else model
            self._given_tokenizer = AutoTokenizer.from_pretrained(source.config._name_or_path)
        self._tokenizer = copy.deepcopy(self._given_tokenizer)  # fine-tuning may change its tokens and its template

    def train(self, resume_from_checkpoint: bool | None = None) -> TrainOutput:
        """
        Run the rounds that are not done yet.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                `False` deletes the rounds in `output_dir`. By default, and with `True`, they are continued.

        Returns:
            `TrainOutput`: the optimizer steps of the rounds that this call finished, including steps before an
            interruption, and the loss and metrics of the last round.

        Raises:
            [`~trl_ext.pipelines.stages.cache_key.StaleError`]: the rounds in `output_dir` were made with other
                settings.
            ValueError: a selection kept no sample.
        """
        if isinstance(resume_from_checkpoint, (str, Path)):
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r}; needed: None, True or False. The rounds to "
                "resume are in output_dir."
            )
        self._begin(start_over=resume_from_checkpoint is False)
        self._model = None
        if not self.history:
            self._finish({"round": 0, **self._evaluate(0)})
        steps = 0
        while (number := len(self.history)) <= self.args.num_rounds:
            taken, metrics = self._round(number)
            steps += taken
            self._finish(metrics)
        if (warning := no_gain_warning(self.history, self.best_round)) is not None:
            logger.warning(warning)
        self.save_model()
        return TrainOutput(steps, self.history[-1]["train_loss"], dict(self.history[-1]))

    def evaluate(self) -> dict[str, float]:
        """Evaluate the kept policy on `eval_dataset`. Stored results are reused."""
        if self._eval_dataset is None:
            raise ValueError("There is no eval_dataset to evaluate on.")
        if not self.history:
            self._begin()
        return self._evaluate(self.best_round)

    @property
    def best_round(self) -> int:
        """The round whose policy is kept; 0 before training."""
        return best_round(self.history) if self.history else 0

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The kept policy. It is loaded on first use."""
        if self._in_memory and self.best_round == 0:
            return self._given
        if self._model is None:
            self._model = load_policy(self._policy(self.best_round), self._init_kwargs)
        return self._model

    @property
    def processing_class(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(
                self._given, revision=self._init_kwargs.get("revision"), trust_remote_code=self.args.trust_remote_code
            )
        if self._chat_template is not None:
            self._tokenizer.chat_template = self._chat_template
        return self._tokenizer

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Copy the kept policy, with its tokenizer, to `output_dir` (by default that of the arguments)."""
        if self.best_round == 0:
            raise ValueError("No round is done, so there is nothing to save. Call train() first.")
        if PartialState().is_main_process:
            target = Path(output_dir or self.args.output_dir)
            shutil.copytree(
                self._rounds.policy(self.best_round),
                target,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns(CARD_NAME),
            )
            base = self._given.config._name_or_path if self._in_memory else str(self._given)
            write_card(
                target, rounds_card(self, weights_by_name(self._rewards, self.args.reward_weights), base, target)
            )

    def _begin(self, start_over: bool = False) -> None:
        """Continue the rounds in `output_dir`, if they were made with the same settings."""
        state = PartialState()
        with state.main_process_first():
            if state.is_main_process and start_over:
                self._rounds.clear()
            if state.is_main_process:
                self._rounds.check(self._settings())
                self._save_initial()
        self.history = self._rounds.history()

    def _round(self, number: int) -> tuple[int, dict[str, Any]]:
        args = self.args
        selected = self._rounds.selected(number)
        PartialState().wait_for_everyone()  # all processes find the same, before one of them selects
        if selected is None:
            self._select(number)
        metrics = {"round": number, **self._rounds.selected(number)}
        rows = rows_to_learn_from(self._rounds, number, args.accumulate_rounds)
        rows = rows_that_fit(rows, number, args, self.processing_class)
        metrics["rows"] = len(rows)
        fresh = number == 1 or args.start_from == "initial"
        fine_tune(
            self._rounds,
            number,
            self._policy(0 if fresh else number - 1),
            rows,
            args,
            self.processing_class,
            self._trains_with(fresh),
            self._peft_config if fresh else None,
            self._callbacks,
        )
        trained = self._rounds.trained(number)
        return trained["steps"], metrics | {"train_loss": trained["loss"], **self._evaluate(number)}

    def _select(self, number: int) -> None:
        """Sample, score and select for a round. What is selected is stored, and not drawn again."""
        args = self.args
        sampler = self._sampler(
            number - 1, self._train_dataset, self._rounds.of(number) / "samples", args.seed + number
        )
        sampler.generate()
        sampler.score()
        with PartialState().main_process_first():
            selected = sampler.select(
                args.selection, args.selection_kwargs, drop_truncated=args.mask_truncated_completions
            )
        check_selected(number, selected, args)
        if PartialState().is_main_process:
            metrics = round_metrics(selected.scored, selected.selection)
            self._rounds.finish_selection(number, selected.dataset, metrics)
        PartialState().wait_for_everyone()

    def _sampler(
        self, number: int, dataset: Any, folder: Path, seed: int, evaluating: bool = False
    ) -> RejectionSampler:
        """A sampler with the policy of a round."""
        args = self.args
        rewards, weights = list(self._rewards), [*weights_by_name(self._rewards, args.reward_weights).values()]
        if evaluating and self._verifier is not None:
            rewards, weights = [*rewards, self._verifier], [*weights, 0.0]
        on_server = args.use_vllm and not evaluating
        host = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        server = {"server_base_url": host, "server_timeout": args.vllm_server_timeout}
        return RejectionSampler(
            str(self._policy(number)),
            rewards,
            dataset,
            folder,
            (args.num_generations_eval or args.num_generations) if evaluating else args.num_generations,
            seed=seed,
            backend="vllm" if on_server else "transformers",
            reward_weights=weights,
            # every policy but the first is saved with its tokenizer
            processing_class=self._given_tokenizer if number == 0 and not self._in_memory else None,
            generation_batch_size=args.generation_batch_size,
            model_init_kwargs=self._init_kwargs if number == 0 else self._generates_with(),
            server=server if on_server else None,
            chat_template=self._chat_template,
            **{item.name: getattr(args, item.name) for item in fields(GRPOSamplingFields)},
        )

    def _evaluate(self, number: int) -> dict[str, float]:
        """Evaluate the policy of a round, with the same prompts and seed for all rounds."""
        if self._eval_dataset is None:
            return {}
        folder = self._rounds.of(number) / "evaluation"
        sampler = self._sampler(number, self._eval_dataset, folder, self.args.seed, evaluating=True)
        sampler.generate()
        sampler.score()
        weights = weights_by_name(self._rewards, self.args.reward_weights)
        return evaluation_metrics(sampler.samples(), weights, self._names[-1] if self._verifier is not None else None)

    def _finish(self, metrics: dict[str, Any]) -> None:
        """Record and report a round, and delete the policies that are no longer needed."""
        self.history.append(metrics)
        warning = hacking_warning(self.history)
        if self._verifier is not None:
            metrics["hacking_suspected"] = float(warning is not None)
        if not PartialState().is_main_process:
            return
        if warning is not None:
            logger.warning(f"Round {metrics['round']}: {warning}")
        write_json(Path(self.args.output_dir) / "rounds.json", self.history)
        plot = Path(self.args.output_dir) / "rounds.png"
        drawn = plot_rounds(self.history, plot)
        self._rounds.record(metrics)  # last, because a rerun skips recorded rounds
        self._rounds.keep({metrics["round"], best_round(self.history)})
        if "wandb" in self.args.report_to:
            log_rounds(self.history[:2] if metrics["round"] == 1 else [metrics], plot if drawn else None)

    def _policy(self, number: int) -> str | Path:
        """The policy after a round; for round 0 the policy that training starts from."""
        if number:
            return self._rounds.policy(number)
        return self._rounds.folder / "initial" if self._in_memory else self._given

    def _trains_with(self, fresh: bool) -> dict[str, Any]:
        """The loading arguments for training: float32, as in `trl.SFTTrainer`, unless the user sets a dtype."""
        default = {} if self._in_memory else {"dtype": "float32"}  # a model in memory keeps its dtype, as in TRL
        return default | (self._init_kwargs if fresh else self._without_revision())

    def _generates_with(self) -> dict[str, Any]:
        """The loading arguments for generation: the dtype of the checkpoint that round 1 starts from."""
        return ({} if self._dtype is None else {"dtype": self._dtype}) | self._without_revision()

    @cached_property
    def _dtype(self) -> str | None:
        """The dtype of the full checkpoint that training starts from; `None` for an adapter or a model in memory."""
        folder = None if self._in_memory else Path(local_folder(self._given, self._init_kwargs.get("revision")))
        if folder is None or (folder / "adapter_config.json").is_file():
            return None
        config = AutoConfig.from_pretrained(folder, trust_remote_code=self.args.trust_remote_code)
        return plain(config.dtype)

    def _without_revision(self) -> dict[str, Any]:
        return {name: value for name, value in self._init_kwargs.items() if name != "revision"}

    def _save_initial(self) -> None:
        """Save a model that was passed in memory, once."""
        folder = self._rounds.folder / "initial"
        if not self._in_memory or folder.is_dir():
            return
        staging = folder.with_name("initial.partial")
        shutil.rmtree(staging, ignore_errors=True)
        self._given.save_pretrained(staging)
        self.processing_class.save_pretrained(staging)
        os.replace(staging, folder)

    def _settings(self) -> dict[str, Any]:
        """The settings that every round depends on."""
        settings = self.args.settings_of_a_round()
        settings["model"] = model_identity(self._given, self._init_kwargs.get("revision"))
        if self._given_tokenizer is not None:  # that of a model by path belongs to the model
            settings["tokenizer"] = tokenizer_identity(self._given_tokenizer)
        if "quantization_config" in self._init_kwargs:
            settings["quantization_config"] = plain(self._init_kwargs["quantization_config"])
        earlier = self._rounds.folder if self._rounds.of(0).is_dir() else None
        settings["rewards"] = [reward_setting(spec, earlier) for spec in self._rewards]
        if self._verifier is not None:
            settings["verifier"] = reward_setting(self._verifier, earlier)
        settings["prompts"] = prompts_digest(self._train_dataset)
        if self._eval_dataset is not None:
            settings["eval_prompts"] = prompts_digest(self._eval_dataset)
        if self._peft_config is not None:
            settings["peft"] = plain(self._peft_config)
        return settings
