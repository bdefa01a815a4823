"""How sure a single reward model is of its scores: what `RewardScorer` inherits to fit, store and use a posterior.

It reads rows, gets their features from the scorer, and hands them to `last_layer`, which knows the mathematics.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from trl_ext.data.schema import check_row, find_schema, template_arguments
from trl_ext.data.sources import content_key, load_source, select_split
from trl_ext.data.tokenization import Completion, Prompt
from trl_ext.data.validation import DataError, RowChecks
from trl_ext.losses import RankingLossProperties, bradley_terry, plackett_luce, ranking_losses
from trl_ext.models.fingerprint import model_identity, tokenizer_identity
from trl_ext.models.heads import output_layer
from trl_ext.models.loading import local_folder
from trl_ext.models.sidecar import Sidecar
from trl_ext.scoring.calibration import calibrated_scores, check_usable
from trl_ext.scoring.last_layer import (
    Information,
    LastLayerPosterior,
    PosteriorError,
    loss_curvature,
    read_posterior,
)
from trl_ext.scoring.remote import RemoteModel


logger = logging.getLogger(__name__)

# Losses under which score differences are log-odds; None: the model does not say.
LIKELIHOODS = (None, "bradley_terry", "pairwise", "plackett_luce")
# Rows whose features are in memory at a time.
CHUNK_ROWS = 256


class Candidates(NamedTuple):
    """What is compared in a row: completions of one prompt, and what the chat template needs."""

    prompt: Prompt | None
    completions: list[Completion]
    tools: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


def by_candidate(groups: Sequence[Candidates], score: Callable[[list, list, dict], list[Any]]) -> list[Any]:
    """
    What `score` gives for each completion of some rows, in one call with prompts, completions and columns.

    Raises:
        [`DataError`]: a completion cannot be scored or has no token. It names the row among `groups`.
    """
    owners = [number for number, group in enumerate(groups) for _ in group.completions]
    named = ("prompt", "tools", "chat_template_kwargs")
    prompts, tools, template = ([getattr(groups[owner], name) for owner in owners] for name in named)
    completions = [completion for group in groups for completion in group.completions]
    try:
        found = score(prompts, completions, {"tools": tools, "chat_template_kwargs": template})
    except DataError as error:  # it counts completions
        row = None if error.row is None else owners[error.row]
        raise DataError(error.found, error.needed, error.fix, row, error.column, error.dataset) from error
    missing = next((number for number, value in enumerate(found) if value is None), None)
    if missing is not None:
        row = owners[missing]
        raise DataError("a completion without any token", "at least one token", "Remove the row.", row, "completions")
    return found


def candidate_mask(groups: Sequence[Candidates]) -> torch.Tensor:
    """A mask (B, K), True for a real candidate."""
    sizes = torch.tensor([len(group.completions) for group in groups])
    return torch.arange(int(sizes.max())) < sizes[:, None]


class Uncertainty:
    """What `RewardScorer` inherits. It has `raw`, `kind`, `model`, `folder`, `normalizer` and `calibration`."""

    _hub_id: str | None = None
    _posterior: LastLayerPosterior | None = None

    def fit_uncertainty(
        self, dataset: Dataset | Iterable[dict[str, Any]] | str | Path, prior_precision: float | None = None
    ) -> dict[str, Any]:
        """
        Fit a Gaussian posterior of the last layer on the rows of training, and store it with the model.

        It is the Laplace approximation with the curvature of Bradley-Terry (pairs, with their margin or preference
        probability), Plackett-Luce (rankings) or the logistic loss (outcomes), see `trl_ext.scoring.last_layer`. The
        weights do not change. If the scorer was made from a local folder, `uncertainty/last_layer.safetensors` is
        written there, and every scorer that is made from the folder later can use it.

        Args:
            dataset (`Dataset`, iterable of rows, or `str`):
                The rows that the model was trained on: preference or ranked rows for a scalar model, outcome rows for
                an outcome model. Or the name of a data set (file, folder or Hub id), whose split `train` is used. If
                the stored posterior was fitted on the same rows with the same model, it is used again.
            prior_precision (`float`, *optional*):
                Precision of the Gaussian prior of each weight, above 0. By default the one with the largest marginal
                likelihood.

        Returns:
            `dict`: `prior_precision`, `chosen_by` (`"marginal_likelihood"` or `"given"`) and `rows`.

        Raises:
            [`DataError`]: a row cannot be read or scored.
            `ValueError`: the model is on a server, its score is put together from several outputs, it was not trained
                with a likelihood (an outcome model with a loss other than `bce`), or the rows say nothing.
        """
        self._check_kind()
        weight, data = self.last_weight(), None
        if isinstance(dataset, (str, Path)):
            name = dataset
            dataset = select_split(load_source(str(name)), "train", "fit_uncertainty(load_dataset(...)[SPLIT])")
            data = self._data_key(content_key(name) or dataset._fingerprint)  # of a Hub id: its commit and split
            posterior = self._read_posterior() if self._posterior is None else self._posterior
            found = posterior is not None and posterior.data == data and posterior.fits(weight)
            if found and _same_prior(posterior, prior_precision):
                self._posterior = posterior
                logger.info(f"{self.__name__}: its stored uncertainty was fitted on {name} already.")
                return self._about()
        information = Information(len(weight))
        seen, least = 0, 1 if self.kind == "outcome" else 2
        for groups, loss in _batches(dataset, self.kind, self.raw.sidecar):
            all_rows = len(groups)
            seen += all_rows
            places = [self._trained_places(group) for group in groups]
            kept = [number for number, own in enumerate(places) if len(own) >= least]
            if not kept:
                continue
            groups = [groups[n]._replace(completions=[groups[n].completions[p] for p in places[n]]) for n in kept]
            width = max(len(places[n]) for n in kept)
            of_candidates = torch.tensor([places[n] + [0] * (width - len(places[n])) for n in kept])  # (B, K)
            loss = partial(loss, torch.tensor(kept), of_candidates)
            try:
                features, mask = self.group_features(groups)  # (B, K, H), (B, K)
            except DataError as error:
                row = None if error.row is None else seen - all_rows + kept[error.row]
                raise DataError(error.found, error.needed, error.fix, row, error.column, "uncertainty") from error
            information.add(features, loss_curvature(features @ weight, mask, partial(loss, mask=mask)), mask)
        if seen > information.rows:
            logger.info(
                f"{self.__name__}: {seen - information.rows} of {seen} rows are longer than the {self._longest()} "
                "tokens of training, which left them out too."
            )
        self._posterior = information.posterior(weight, self.kind, prior_precision, data)
        if self.folder is None:
            logger.info(f"{self.__name__}: the uncertainty is not saved, because the model has no local folder.")
        else:
            self._posterior.save(self.folder)
        return self._about()

    def score_with_uncertainty(
        self, prompts: Sequence[Prompt] | None, completions: Sequence[Completion], **columns: Any
    ) -> tuple[list[float | None], list[float | None]]:
        """
        Each score with its standard deviation, from one forward pass. Arguments as in a call.

        Comparisons only identify differences of scores. For a scalar model the standard deviation is therefore that
        of the difference to the mean score of the completions that the uncertainty was fitted on. For an outcome model
        it is that of the log-odds. It is on the scale of the scores (normalised, and calibrated by a temperature).

        Returns:
            `(scores, standard deviations)`: two lists in the order of the rows, `None` for a row without tokens.

        Raises:
            [`~trl_ext.scoring.last_layer.PosteriorError`]: no uncertainty was fitted, or it belongs to another model.
        """
        posterior = self.posterior
        if self.reference is not None:
            raise ValueError("`reference` turns scores into probabilities, which have no standard deviation here.")
        weight, unit = self.last_weight(), self._unit()

        def score(found: list[torch.Tensor | None]) -> list[tuple[float, float] | None]:
            rows = [row for row, features in enumerate(found) if features is not None]
            pairs: list[tuple[float, float] | None] = [None] * len(found)
            if rows:
                features = self._with_bias(torch.stack([found[row] for row in rows]))
                values = zip((features @ weight).tolist(), posterior.std(features).tolist(), strict=True)
                for row, value in zip(rows, values, strict=True):
                    pairs[row] = value
            return pairs

        found = self.raw.features(prompts, completions, columns, score)
        raw = [None if pair is None else pair[0] for pair in found]
        spread = [None if pair is None else pair[1] * unit for pair in found]
        scores = self._normalized(raw)
        return calibrated_scores(scores, self.calibration) if self.calibrated else scores, spread

    @property
    def posterior(self) -> LastLayerPosterior:
        """The fitted or stored posterior. Raises [`PosteriorError`] if there is none for this model."""
        if self._posterior is None:
            found = self._read_posterior()
            if found is None:
                raise PosteriorError(
                    f"{self.__name__} has no uncertainty. Fit it on the rows of training: "
                    "`scorer.fit_uncertainty(dataset)`, or `trl-ext score --fit_uncertainty DATA`."
                )
            self._posterior = found
        self._posterior.check_weight(self.last_weight(), self.__name__)  # a model in memory may be trained further
        return self._posterior

    @property
    def has_uncertainty(self) -> bool:
        """Whether a posterior was fitted or is stored with the model."""
        return self._posterior is not None or self._read_posterior() is not None

    def group_features(self, groups: Sequence[Candidates]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The head's features of the candidates of some rows: fp32 (B, K, H), and a mask (B, K).

        A last feature of 1 stands for the bias of the head, if it has one. Raises [`DataError`] for a candidate
        without a token.
        """
        found = by_candidate(groups, lambda prompts, texts, columns: self.raw.features(prompts, texts, columns))
        mask = candidate_mask(groups)
        features = self._with_bias(torch.stack(found))
        padded = features.new_zeros(*mask.shape, features.shape[-1])
        padded[mask] = features
        return padded, mask

    def last_weight(self) -> torch.Tensor:
        """The weight of the head's output layer, (H,) in fp32 on the CPU, with the bias last if there is one."""
        if isinstance(self.model, RemoteModel):
            raise ValueError(
                f"{self.__name__} is on a server, which gives no features. Load the model here, by its folder."
            )
        layer = output_layer(self.model)
        parts = [layer.weight[0]] if layer.bias is None else [layer.weight[0], layer.bias]
        return torch.cat([part.detach().float().cpu().flatten() for part in parts])

    def _with_bias(self, features: torch.Tensor) -> torch.Tensor:
        if output_layer(self.model).bias is None:
            return features
        return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], dim=-1)

    def _read_posterior(self) -> LastLayerPosterior | None:
        folder = self.folder
        if folder is None and self._hub_id is not None:
            folder = local_folder(self._hub_id, None)  # it is here: the model was loaded from it
        return None if folder is None else read_posterior(folder)

    def _data_key(self, rows: str) -> str:
        """The cache key of what the posterior is fitted on: the features of some rows."""
        made_by = [model_identity(self.model), tokenizer_identity(self.processing_class)]
        parts = [rows, self.choices["max_length"], *made_by]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _longest(self) -> int | None:
        """The tokens of the longest candidate that was trained on, if there was a limit."""
        return None if self.raw.sidecar is None else self.raw.sidecar.max_length

    def _trained_places(self, group: Candidates) -> list[int]:
        """The places of the completions that training did not leave out because of their length."""
        longest, found = self._longest(), []
        for place, completion in enumerate(group.completions):
            if longest is not None:
                try:
                    encoded = self.raw.encoder(0, group.prompt, completion, group.tools, group.chat_template_kwargs)
                except DataError:
                    return list(range(len(group.completions)))  # it will be raised with the number of its row
                if encoded.truncated or len(encoded.ids) > longest:
                    continue
            found.append(place)
        return found

    def _about(self) -> dict[str, Any]:
        return {name: getattr(self._posterior, name) for name in ("prior_precision", "chosen_by", "rows")}

    def _check_kind(self) -> None:
        loss = None if self.raw.sidecar is None else self.raw.sidecar.loss_type
        if self.kind == "scalar" and loss not in LIKELIHOODS:
            logger.warning(
                f"{self.__name__} was trained with the loss {loss!r}, so its score differences may be no log-odds. "
                "The standard deviations then order completions, but their size means little."
            )
        if self.kind == "outcome" and loss not in (None, "bce"):
            raise ValueError(
                f"{self.__name__} was trained with the loss {loss!r}, which is no likelihood of right and wrong. "
                "Needed: an outcome model trained with loss_type='bce'."
            )

    def _unit(self) -> float:
        """What one unit of the raw score is on the scale of the scores."""
        unit = 1.0 if self.normalizer is None else 1 / self.normalizer["std"]
        if not self.calibrated:
            return unit
        check_usable(self.calibration, self.normalizer, self.__name__)
        if self.calibration["method"] != "temperature":
            raise ValueError(
                f"{self.__name__} gives scores through an isotonic map, which has no standard deviation. Fit a "
                "temperature, or leave `calibrated` out."
            )
        return unit / self.calibration["temperature"]


def _same_prior(posterior: LastLayerPosterior, given: float | None) -> bool:
    if given is None:
        return posterior.chosen_by == "marginal_likelihood"
    return posterior.chosen_by == "given" and posterior.prior_precision == given


# ------------------------------------------------------------------------------------------------------------ the rows
def _batches(
    dataset: Iterable[dict[str, Any]], kind: str, sidecar: Sidecar | None
) -> Iterator[tuple[list[Candidates], Callable]]:
    """
    Chunks of rows: their candidates, and a loss that takes row numbers (B,), the candidates' places in their rows,
    scores and a mask, (B, K) each, and returns (B,).
    """
    rows, start = iter(dataset), 0
    read = _outcomes if kind == "outcome" else _Comparisons({} if sidecar is None else sidecar.training)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield read(chunk, start)
        start += len(chunk)


class _Comparisons:
    """
    Reads preference and ranked rows as training did; the first row decides what the columns mean.

    Args:
        training (`dict`): the loss of training and its arguments, `loss_type` and `loss_kwargs`.
    """

    schema = None

    def __init__(self, training: dict[str, Any]):
        arguments, name = training.get("loss_kwargs") or {}, training.get("loss_type")
        self._margins = bool(arguments.get("margin_from_ratings"))
        try:
            properties = ranking_losses.properties_of(name or "bradley_terry")
        except ValueError:  # a loss of the user's own
            properties = RankingLossProperties(uses_distances=False)
        self._pair_ratings = properties.needs_ratings(arguments) or properties.learns_from_ties

    def __call__(self, rows: list[dict[str, Any]], start: int) -> tuple[list[Candidates], Callable]:
        if self.schema is None:
            self.schema = find_schema(
                list(rows[0]), rows[0], "uncertainty", loss_needs_ratings=False, use_pair_ratings=self._pair_ratings
            )
        if self.schema.tokenized:
            raise DataError(
                "token ids in place of texts", "rows of text or messages", "Give the rows before they were prepared."
            )
        groups = [
            check_row(row, self.schema, RowChecks(start + number, "uncertainty")) for number, row in enumerate(rows)
        ]
        width = max(len(group.ratings) for group in groups)
        ratings = torch.tensor([group.ratings + [0.0] * (width - len(group.ratings)) for group in groups])
        options = {}
        if self.schema.pair:
            named = {"margin": self.schema.margin, "target": self.schema.target}
            options = {
                name: torch.tensor([getattr(group, name) for group in groups]) for name, used in named.items() if used
            }
        loss = bradley_terry if self.schema.pair else plackett_luce
        candidates = [
            Candidates(group.prompt, group.completions, group.tools, group.chat_template_kwargs) for group in groups
        ]
        # only this loss is given for pairs; plackett_luce has no margins
        fixed = {"margin_from_ratings": self._margins} if self.schema.pair else {}

        def of_rows(
            numbers: torch.Tensor, places: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor
        ) -> torch.Tensor:
            given = {name: values[numbers] for name, values in options.items()}
            return loss(scores, ratings[numbers].gather(1, places), mask, **given, **fixed)

        return candidates, of_rows


def _outcomes(rows: list[dict[str, Any]], start: int) -> tuple[list[Candidates], Callable]:
    """Reads outcome rows. The score of a completion is read at its last token, so a row counts once."""
    groups = []
    for number, row in enumerate(rows):
        checks = RowChecks(start + number, "uncertainty")
        for column in ("completion", "label"):
            if column not in row:
                raise checks.error(column, "no such column", "rows with prompt, completion and label", "Rename it.")
        checks.number(row["label"], "label", minimum=0, maximum=1)
        _, prompt = checks.one_kind(checks.prompt(row.get("prompt")), [row["completion"]], ["completion"])
        groups.append(Candidates(prompt, [row["completion"]], *template_arguments(row, checks)))
    # the curvature of the logistic loss is the same for both labels
    return groups, lambda numbers, places, scores, mask: torch.nn.functional.softplus(scores[:, 0])
