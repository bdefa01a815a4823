"""`SharedBaseScorer`: a saved reward adapter that scores on the base of the policy that it trains.

It knows one adapter, and waits for a trainer to hand it the policy. `RewardEnsemble(..., base_model=policy)` is for
policies that are in memory already, and for several scalar models.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from trl import ModelConfig, get_quantization_config

from trl_ext.data.tokenization import Completion, Prompt
from trl_ext.models.bases import as_recorded, base_differences, same_source
from trl_ext.models.ensemble.shared_base import load_adapters, use_adapter
from trl_ext.models.inputs import load_tokenizer
from trl_ext.models.loading import local_folder
from trl_ext.models.sidecar import SidecarError, read_sidecar
from trl_ext.scoring.scorer import RewardScorer


def shares_base(spec: str, model: ModelConfig) -> bool:
    """Whether a reward model in a local folder is an adapter on the base of a policy with an adapter."""
    sidecar = read_sidecar(spec) if Path(spec).is_dir() else None
    if sidecar is None or not sidecar.is_adapter or not model.use_peft:
        return False
    quantization = as_recorded(get_quantization_config(model))
    same = same_source(model.model_name_or_path, sidecar.base.id)
    return same and not base_differences(sidecar.base, model.dtype, quantization)


class SharedBaseScorer:
    """
    A reward function from an adapter on the policy's base, for `DenseGRPOTrainer` and `PPOTrainer`.

    The trainer calls [`use_base`] once the policy is loaded. The base is then in memory once for policy and reward.

    Args:
        path (`str` or `Path`): folder or Hub id of an adapter that a trainer of trl_ext saved.
        name (`str`, *optional*): its name in metrics. Defaults to the folder's name.
        **scorer_kwargs: arguments of [`RewardScorer`], such as `max_length` and `aggregation`.

    Raises:
        [`SidecarError`]: the folder holds no adapter with a `reward_model.json`.

    Example:

    ```python
    PPOTrainer("Qwen/Qwen3-8B", SharedBaseScorer("outputs/reward"), args=args, peft_config=lora, ...)
    ```
    """

    def __init__(self, path: str | Path, name: str | None = None, **scorer_kwargs: Any):
        self.folder = local_folder(path, None)
        self.sidecar = read_sidecar(self.folder)
        if self.sidecar is None or not self.sidecar.is_adapter:
            raise SidecarError(
                f"{path} is no adapter with a reward_model.json, so it cannot share the policy's base. Use "
                "RewardScorer, which loads a model of its own."
            )
        self.__name__ = name or Path(path).name
        self.kind = self.sidecar.kind
        self._scorer_kwargs = scorer_kwargs
        self._model: nn.Module | None = None

    def use_base(self, policy: nn.Module) -> None:
        """
        Put the adapter on the policy's base. Raises [`BaseMismatchError`] if it was trained on another one.

        The policy's weights, and what of it is trained, do not change.
        """
        self._model, (self._adapter,) = load_adapters([self.folder], base_model=policy)
        with self._active():
            tokenizer = load_tokenizer(self.folder)
            self._scorer = RewardScorer(self._model, tokenizer, name=self.__name__, **self._scorer_kwargs)
            self._scorer.folder = Path(self.folder)  # where its uncertainty and calibration are
            if self._scorer.std_coefficient:
                _ = self._scorer.posterior  # an error now, not at the first batch

    def __call__(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        """One score for each completion, as [`RewardScorer`] gives it."""
        with self._active():
            return self._scorer(prompts, completions, **columns)

    def score_spans(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> list[list[tuple[int, int, float]]]:
        """The scored parts of completions, as [`RewardScorer.score_spans`] gives them."""
        with self._active():
            return self._scorer.score_spans(prompts, completions, **columns)

    @contextmanager
    def _active(self) -> Iterator[None]:
        if self._model is None:
            raise RuntimeError(
                f"{self.__name__} has no base yet. Pass it to DenseGRPOTrainer or PPOTrainer, or call "
                "`use_base(policy)`."
            )
        with use_adapter(self._model, self._adapter, self.sidecar):
            yield
