"""`SegmentRewardTrainer`: trains rewards for sentences, chunks or any span. `trainer.py` has the training loop."""

import logging

from datasets import IterableDataset

from trl_ext.data.spans import find_categories
from trl_ext.models.sidecar import Sidecar
from trl_ext.trainers.token.evaluation import SegmentEvaluator
from trl_ext.trainers.token.segment_config import SegmentRewardConfig
from trl_ext.trainers.token.trainer import Rows, TokenRewardTrainer


logger = logging.getLogger(__name__)


class SegmentRewardTrainer(TokenRewardTrainer):
    """
    Trainer for fine-grained reward models: how good is this part of the completion, in each of several categories?

    One head has outputs for all categories (relevance, factuality, completeness ...). Categories may be annotated at
    different granularity, segments may overlap, and labels may be missing. Text without a label has no loss.

    Rows: `prompt`, `completion` and `segments`, a list of `{start, end, label or score, category?}` in characters of
    the completion, as text or chat.
    Metrics of each category (`<category>_<metric>`): with `mse`, R² and Spearman's correlation. Otherwise AUC,
    balanced accuracy, and per-class precision, recall and F1.

    The arguments are those of [`TokenRewardTrainer`]. `args` is a [`SegmentRewardConfig`].

    Example:

    ```python
    segments = [{"start": 0, "end": 13, "score": 1.0, "category": "factuality"}]
    row = {"prompt": "Paris?", "completion": "It is a city.", "segments": segments}
    trainer = SegmentRewardTrainer(
        model="Qwen/Qwen3-0.6B",
        args=SegmentRewardConfig(output_dir="outputs/segments"),
        train_dataset=Dataset.from_list([row, ...]),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl-ext", "segment-reward"]
    config_class = SegmentRewardConfig
    kind = "segment"
    rows = "segment"

    @classmethod
    def _outputs(cls, args: SegmentRewardConfig) -> int:
        return args.num_labels

    def _find_categories(
        self, args: SegmentRewardConfig, train_dataset: Rows | None, known: Sidecar | None
    ) -> tuple[str, ...]:
        saved = None if known is None or known.kind != self.kind else tuple(known.categories or ())
        if saved is not None and args.categories is not None and tuple(args.categories) != saved:
            raise ValueError(
                f"The model's outputs are the categories {list(saved)}, but `categories` is {args.categories}. Leave "
                "`categories` out to train the model further."
            )
        if args.categories is not None:
            return tuple(args.categories)
        if saved is not None:
            return saved
        if train_dataset is None or isinstance(train_dataset, IterableDataset):
            logger.info(
                "`categories` is not given and a stream cannot be searched for them, so segments must not have a "
                "category. Give `categories` if they do."
            )
            return ()
        if "segments" not in train_dataset.column_names:
            return ()  # prepare_spans raises the error about the missing column
        found = tuple(find_categories(train_dataset.select_columns("segments")))
        if found:
            logger.info(f"Categories, in the order of the outputs: {list(found)}.")
        return found

    def _make_evaluator(self) -> SegmentEvaluator:
        return SegmentEvaluator(self._objective, [*self._categories] or [""])
