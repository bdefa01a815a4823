"""`RewardEnsemble`: members alone and together, one base, normalising, intervals, files, and stock GRPO."""

import functools
import json
import logging
import shutil
import statistics

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.models.helpers import nf4
from tests.scoring.ensemble_helpers import by_length, largest_difference, only_short, rows, save_members
from tests.tiny import pair_rows
from trl_ext import RewardEnsemble, RewardScorer, load_reward_model
from trl_ext.data.validation import DataError
from trl_ext.evaluation.evaluate import as_reward_function
from trl_ext.models.building import keep_4bit_exact_on_cpu
from trl_ext.models.ensemble.ensemble_files import EnsembleFileError, read_ensemble
from trl_ext.models.fingerprint import fingerprint
from trl_ext.models.loading import BaseMismatchError
from trl_ext.pipelines.reward_functions import load_reward, reward_identity
from trl_ext.scoring.ensemble import load_scorer
from trl_ext.scoring.members import SharedBaseSource, StackedSource


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    return save_members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return save_members(
        tmp_path_factory.mktemp("nf4"), number=2, quantization=nf4(bnb_4bit_compute_dtype=torch.float32)
    )


def alone(paths):
    """(N, M): what each member says by itself."""
    return [list(row) for row in zip(*(RewardScorer(path)(*rows()) for path in paths), strict=True)]


def backbones(ensemble):
    """The distinct backbone weights that an ensemble holds."""
    named = [pair for model in ensemble.models for pair in model.named_parameters()]
    return {parameter.data_ptr() for name, parameter in named if name.endswith("embed_tokens.weight")}


# ------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize("kind", ["members", "quantized"])
def test_members_on_one_base_score_as_they_do_alone(kind, request):
    paths = request.getfixturevalue(kind)
    ensemble = RewardEnsemble(paths)
    found = ensemble.score_members(*rows())
    assert len(backbones(ensemble)) == 1
    assert largest_difference(found, alone(paths)) < 1e-6
    assert len({tuple(column) for column in zip(*found, strict=True)}) == len(paths)  # heads and adapters differ
    assert ensemble(*rows()) == pytest.approx([statistics.fmean(row) for row in found])
    assert ensemble.members == [path.name for path in paths]
    again = RewardEnsemble(paths[::-1]).score_members(*rows())
    assert largest_difference([row[::-1] for row in again], found) < 1e-6


def test_one_pass_gives_what_members_give_one_after_the_other(members, monkeypatch):
    stacked = RewardEnsemble(members)
    assert isinstance(stacked._sources[0][0], StackedSource)

    def refuse(*arguments):
        raise ValueError("not stacked")

    monkeypatch.setattr("trl_ext.scoring.members.StackedSource", refuse)
    looped = RewardEnsemble(members)
    assert isinstance(looped._sources[0][0], SharedBaseSource)
    prompts, completions = rows()
    for shared in (prompts, [prompts[0]] * len(prompts)):  # the latter as flat rows
        assert (
            largest_difference(stacked.score_members(shared, completions), looped.score_members(shared, completions))
            < 1e-5
        )


def test_adapters_that_cannot_be_stacked_share_the_base_all_the_same(members, tmp_path):
    other = shutil.copytree(members[1], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    sidecar = json.loads((other / "reward_model.json").read_text())
    (other / "reward_model.json").write_text(json.dumps(sidecar | {"probes": None}))
    ensemble = RewardEnsemble([members[0], other])
    assert isinstance(ensemble._sources[0][0], SharedBaseSource)
    assert len(backbones(ensemble)) == 1
    found = ensemble.score_members(*rows())
    assert largest_difference(found, alone([members[0], other])) < 1e-6
    assert largest_difference([row[1] for row in found], [row[1] for row in alone(members)]) > 1e-3


def test_members_that_bring_embeddings_have_a_base_of_their_own(tmp_path):
    paths = save_members(tmp_path, number=2, more_tokens=3)
    ensemble = RewardEnsemble(paths)
    prompts, completions = rows()
    assert len(backbones(ensemble)) == 2
    assert largest_difference(ensemble.score_members(prompts, completions), alone(paths)) < 1e-6
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base").requires_grad_(False)
    with pytest.raises(ValueError, match="sets model.embed_tokens.weight, so PEFT changes the weights"):
        RewardEnsemble(paths, base_model=policy)


def test_members_with_another_eos_token_are_not_scored_in_one_pass(members, tmp_path):
    other = shutil.copytree(members[1], tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False)[0])
    tokenizer.save_pretrained(other)
    found = RewardEnsemble([members[0], other]).score_members(*rows())
    assert largest_difference(found, alone([members[0], other])) < 1e-6
    assert largest_difference(found, alone(members[:2])) > 1e-3


def test_scores_do_not_depend_on_the_batch_or_on_other_rows(members):
    prompts, completions = rows()
    want = RewardEnsemble(members, reduce="mean_minus_std")(prompts, completions)
    one = RewardEnsemble(members, reduce="mean_minus_std", scorer_kwargs={"batch_size": 1})
    assert one(prompts, completions) == pytest.approx(want, abs=1e-6)
    assert one(prompts[::-1], completions[::-1])[::-1] == pytest.approx(want, abs=1e-6)
    assert [one([p], [c])[0] for p, c in zip(prompts, completions, strict=True)] == pytest.approx(want, abs=1e-6)


def test_a_mix_of_all_that_may_be_a_member(members, reward_path):
    full = RewardScorer(reward_path(), name="full")
    model = load_reward_model(members[0])
    partial = functools.partial(by_length)
    mix = [members[1], full, by_length, model, members[2], partial]
    kwargs = {"processing_class": full.processing_class}
    found = RewardEnsemble(mix, normalize=False, scorer_kwargs=kwargs)
    assert found.members == ["trained-1", "full", "by_length-2", "member-3", "trained-2", "by_length-5"]
    prompts, completions = rows()
    columns = list(zip(*found.score_members(prompts, completions), strict=True))
    each = [RewardScorer(path)(prompts, completions) for path in members]
    want = [each[1], full(prompts, completions), by_length(prompts, completions), each[0], each[2]]
    assert largest_difference(columns[:5], want) < 1e-6
    assert columns[5] == columns[2]


def test_rows_to_which_a_member_does_not_apply():
    ensemble = RewardEnsemble([by_length, only_short], reduce="min")
    texts = ["x" * 10, "x" * 50]
    assert ensemble.score_members(None, texts) == [[0.1, 1.0], [0.5, None]]
    assert ensemble(None, texts) == [0.1, 0.5]
    assert RewardEnsemble([only_short])(None, texts) == [1.0, None]
    assert RewardEnsemble([only_short]).score_with_interval(None, texts)[1] == (None, None, None)
    assert RewardEnsemble([by_length, only_short], "weighted", weights=[1.0, 2.0])(None, texts) == [2.1, 0.5]


def test_interval_and_disagreement(members):
    ensemble = RewardEnsemble(members, reduce="median")
    found = ensemble.score_members(*rows())
    for row, (reward, lower, upper) in zip(found, ensemble.score_with_interval(*rows()), strict=True):
        assert (lower, reward, upper) == pytest.approx(tuple(sorted(row)))
    assert ensemble.disagreement(found) == pytest.approx([statistics.pstdev(row) for row in found])
    assert ensemble.combine(found) == ensemble(*rows())


def test_aspects_with_weights_and_a_reducer_of_ones_own(members):
    weighted = RewardEnsemble(members[:2], reduce="weighted", weights=[0.75, 0.25])
    found = weighted.score_members(*rows())
    assert weighted(*rows()) == pytest.approx([0.75 * a + 0.25 * b for a, b in found])

    def second_best(scores, *, place=1):
        return scores.sort(dim=1, descending=True).values[:, place]

    own = RewardEnsemble(members, reduce=second_best, place=2)
    assert own(*rows()) == pytest.approx([min(row) for row in own.score_members(*rows())])


@pytest.mark.parametrize("kind", ["outcome", "process", "segment"])
def test_token_level_members(tmp_path, kind):
    fields = {
        "outcome": dict(kind="outcome", loss_type="bce"),
        "process": dict(kind="process", loss_type="bce", step_separator="\n", label_placement="last"),
        "segment": dict(kind="segment", loss_type="mse", categories=["good", "short"], num_labels=2),
    }[kind]
    paths = save_members(tmp_path, number=2, **fields)
    aggregation = {"outcome": "mean", "process": "min", "segment": {"good": 1.0, "short": 0.5}}[kind]
    prompts = ["Question: a test.", "Question: snow."]
    completions = [" good. clear\n", " bad\n kind\n rude\n"]
    ensemble = RewardEnsemble(
        [RewardScorer(paths[0], aggregation=aggregation), paths[1]], scorer_kwargs={"aggregation": aggregation}
    )
    together = RewardEnsemble(paths, scorer_kwargs={"aggregation": aggregation})
    want = [RewardScorer(path, aggregation=aggregation)(prompts, completions) for path in paths]
    for one in (ensemble, together):
        assert largest_difference(list(zip(*one.score_members(prompts, completions), strict=True)), want) < 1e-6
        with pytest.raises(ValueError, match="trained-0 has its own aggregation|RewardScorer has its own aggregation"):
            one.save(tmp_path / "saved")
    if kind == "process":  # what is fitted for these scores stays away from the folders and from others
        plain = RewardEnsemble(paths)
        plain.save(tmp_path / "kept")
        RewardEnsemble(tmp_path / "kept").fit_normalizer(prompts, completions)
        file = (tmp_path / "kept" / "reward_ensemble.json").read_text()
        other = RewardEnsemble(tmp_path / "kept", scorer_kwargs={"aggregation": "sum"})
        assert other.normalizers == [None, None]
        other.fit_normalizer(prompts, completions)
        assert (tmp_path / "kept" / "reward_ensemble.json").read_text() == file


# -------------------------------------------------------------------------------------------------- normalising
def test_normalising_makes_members_comparable_and_moves_no_ranking(members, tmp_path):
    ensemble = RewardEnsemble([*members, by_length])
    raw = list(zip(*ensemble.score_members(*rows()), strict=True))
    fitted = ensemble.fit_normalizer(*rows())
    scaled = list(zip(*ensemble.score_members(*rows()), strict=True))
    for before, after, normalizer in zip(raw, scaled, fitted, strict=True):
        assert statistics.fmean(after) == pytest.approx(0, abs=1e-9)
        assert statistics.pstdev(after) == pytest.approx(1)
        assert sorted(range(12), key=before.__getitem__) == sorted(range(12), key=after.__getitem__)
        assert normalizer["mean"] == pytest.approx(statistics.fmean(before))
    again = RewardEnsemble([*members, by_length], normalize=False)
    again.normalizers = ensemble.normalizers
    assert largest_difference(list(zip(*again.score_members(*rows()), strict=True)), raw) < 1e-9


def test_a_member_s_own_normaliser_is_used_once(tmp_path):
    (path,) = save_members(tmp_path, number=1)
    scorer = RewardScorer(path)
    scorer.fit_normalizer(*rows())
    want = scorer(*rows())
    for member in (scorer, path):
        assert RewardEnsemble([member])(*rows()) == pytest.approx(want)
    raw = RewardEnsemble([path], normalize=False)(*rows())
    assert statistics.fmean(raw) == pytest.approx(scorer.normalizer["mean"])
    assert RewardScorer(path).normalizer == scorer.normalizer  # asking for raw scores changed nothing


def test_different_scales_are_said_once(caplog):
    def large(prompts, completions, **columns):
        return [100.0 * len(completion) for completion in completions]

    with caplog.at_level(logging.WARNING):
        ensemble = RewardEnsemble([by_length, large])
        ensemble(*rows())
        ensemble(*rows())
        assert caplog.text.count("different scales") == 1
        assert "by_length" in caplog.text and "fit_normalizer" in caplog.text
        caplog.clear()
        ensemble = RewardEnsemble([by_length, large])
        ensemble.fit_normalizer(*rows())
        ensemble(*rows())
        RewardEnsemble([by_length, large], normalize=False)(*rows())
        assert "scales" not in caplog.text


# --------------------------------------------------------------------------------------------------------- files
def test_saved_and_loaded(members, tmp_path):
    ensemble = RewardEnsemble(members, reduce="mean_minus_var", coefficient=0.25)
    ensemble.fit_normalizer(*rows())
    want = ensemble(*rows())
    ensemble.save(tmp_path / "ensemble")
    loaded = RewardEnsemble(tmp_path / "ensemble")
    assert loaded(*rows()) == pytest.approx(want, abs=1e-6)
    assert loaded.members == ["member-0", "member-1", "member-2"]
    assert RewardEnsemble(str(tmp_path / "ensemble"), reduce="min")(*rows()) == pytest.approx(
        [min(row) for row in loaded.score_members(*rows())]
    )
    stronger = RewardEnsemble(tmp_path / "ensemble", coefficient=0.5)
    assert stronger(*rows()) == pytest.approx(
        [statistics.fmean(r) - 0.5 * statistics.pvariance(r) for r in loaded.score_members(*rows())]
    )
    nested = RewardEnsemble([tmp_path / "ensemble", by_length], normalize=False)
    assert nested.members == ["ensemble", "by_length"]
    assert [row[0] for row in nested.score_members(*rows())] == pytest.approx(want, abs=1e-6)
    options = {"max_length": 3}  # they reach the members of the inner ensemble
    cut = RewardEnsemble([tmp_path / "ensemble"], scorer_kwargs=options, normalize=False)(*rows())
    assert cut == pytest.approx(RewardEnsemble(tmp_path / "ensemble", scorer_kwargs=options)(*rows()), abs=1e-6)
    assert cut != pytest.approx(want, abs=1e-6)
    # each member is an ordinary reward model
    assert RewardScorer(tmp_path / "ensemble" / "member-1")(*rows()) == RewardScorer(members[1])(*rows())

    loaded.fit_normalizer(*[part[:6] for part in rows()])
    file = read_ensemble(tmp_path / "ensemble")
    assert file.normalizers == loaded.normalizers and file.reduce == "mean_minus_var"
    assert json.loads((tmp_path / "ensemble" / "member-0" / "reward_model.json").read_text())["normalizer"] is None


def test_additional_chat_templates_are_saved_and_compared(members, tmp_path):
    other = shutil.copytree(members[1], tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    template = "{{ tools | length }} tools: {% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": template}
    tokenizer.save_pretrained(other)
    tool = {"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": {}}}
    row = {"prompts": [[{"role": "user", "content": "Hi."}]], "completions": [" So."], "tools": [[tool]]}
    ensemble = RewardEnsemble([members[0], other])
    want = [[RewardScorer(path)(**row)[0] for path in (members[0], other)]]
    assert largest_difference(ensemble.score_members(**row), want) < 1e-6
    assert want[0][1] != pytest.approx(RewardScorer(members[1])(**row)[0], abs=1e-4)
    ensemble.save(tmp_path / "ensemble")
    assert largest_difference(RewardEnsemble(tmp_path / "ensemble").score_members(**row), want) < 1e-6


def test_a_normaliser_that_was_taken_away_stays_away(members, tmp_path):
    path = shutil.copytree(members[0], tmp_path / "one")
    scorer = RewardScorer(path)
    scorer.fit_normalizer(*rows())
    scorer.normalizer = None
    ensemble = RewardEnsemble([scorer])
    ensemble.save(tmp_path / "saved")
    assert RewardEnsemble(tmp_path / "saved")(*rows()) == pytest.approx(ensemble(*rows()), abs=1e-6)
    assert RewardScorer(path).normalizer is not None


def test_a_path_is_an_ensemble_or_one_model(members, tmp_path, monkeypatch):
    RewardEnsemble(members[:2]).save(tmp_path)
    ensemble = load_scorer(tmp_path, name="quality", batch_size=2)
    assert isinstance(ensemble, RewardEnsemble) and ensemble.__name__ == "quality"
    one = load_scorer(tmp_path / "member-0", batch_size=2)
    assert isinstance(one, RewardScorer)
    assert one(*rows()) == pytest.approx([row[0] for row in ensemble.score_members(*rows())], abs=1e-6)
    assert isinstance(load_reward(str(tmp_path)), RewardEnsemble)
    # also by a Hub id, of which only the request is replaced
    snapshot = tmp_path / "cache" / "models--me--both" / "snapshots" / ("1" * 40)
    shutil.copytree(tmp_path, snapshot, ignore=lambda *_: ["cache"])
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    want = ensemble(*rows())
    for by_id in (as_reward_function("me/both"), RewardEnsemble(["me/both"])):
        assert by_id(*rows()) == pytest.approx(want, abs=1e-6)
    # what decides whether stored scores may be used again
    assert reward_identity(ensemble) is None
    folder, path = fingerprint(tmp_path), tmp_path / "reward_ensemble.json"
    path.write_text(path.read_text().replace('"mean"', '"min"', 1))
    changed = fingerprint(tmp_path)
    (tmp_path / "member-1" / "adapter_model.safetensors").write_bytes(b"other weights")
    assert len({folder, changed, fingerprint(tmp_path)}) == 3


def test_models_in_memory_are_saved_too(members, tmp_path):
    tokenizer = RewardScorer(members[0]).processing_class
    models = [load_reward_model(path) for path in members[:2]]
    ensemble = RewardEnsemble(models, scorer_kwargs={"processing_class": tokenizer})
    want = ensemble(*rows())
    ensemble.save(tmp_path)
    assert RewardEnsemble(tmp_path)(*rows()) == pytest.approx(want, abs=1e-6)
    with pytest.raises(ValueError, match="by_length is a reward function"):
        RewardEnsemble([members[0], by_length]).save(tmp_path / "more")


def test_fusion_is_fitted_stored_and_used(members, tmp_path):
    RewardEnsemble(members).save(tmp_path)
    ensemble = RewardEnsemble(tmp_path, reduce="fusion")
    with pytest.raises(ValueError, match="Call `fit_fusion` first"):
        ensemble(*rows())
    pairs = pair_rows(24, seed=7)
    prompts = [row["prompt"] for row in pairs]
    liked = [row["chosen"] for row in pairs]
    other = [row["rejected"] for row in pairs]
    by_first = (
        [s[0] for s in ensemble.score_members(prompts, liked)],
        [s[0] for s in ensemble.score_members(prompts, other)],
    )
    chosen = [a if x > y else b for a, b, x, y in zip(liked, other, *by_first, strict=True)]
    rejected = [b if x > y else a for a, b, x, y in zip(liked, other, *by_first, strict=True)]
    weights = ensemble.fit_fusion(prompts, chosen, rejected, l2=1e-4)
    assert weights[0] == max(weights) > 0  # the member whose order it is
    want = ensemble(*rows())
    assert want == pytest.approx(
        [sum(w * s for w, s in zip(weights, row, strict=True)) for row in ensemble.score_members(*rows())]
    )
    again = RewardEnsemble(tmp_path)
    assert again.weights == weights
    assert again(*rows()) == pytest.approx(want, abs=1e-6)
    again.fit_normalizer(*rows())  # another scale of the members, the same differences of the fused scores
    for one in (again, RewardEnsemble(tmp_path)):
        found = one(*rows())
        assert [a - found[0] for a in found] == pytest.approx([a - want[0] for a in want], abs=1e-6)
    assert len(ensemble.fit_fusion(prompts, chosen, rejected, method="bma")) == 3
    raw = RewardEnsemble(tmp_path, normalize=False)
    raw.fit_fusion(prompts, chosen, rejected)
    assert RewardEnsemble(tmp_path)(*rows()) == pytest.approx(raw(*rows()), abs=1e-6)  # on the scale it was learnt on


def test_a_fusion_that_turns_the_members_round_is_said(caplog):
    ensemble = RewardEnsemble([by_length])
    weights = ensemble.fit_fusion(None, ["a" * n for n in range(1, 9)], ["a" * 2 * n for n in range(1, 9)])
    assert weights[0] < 0 and ensemble(None, ["a", "aa"]) == sorted(ensemble(None, ["a", "aa"]), reverse=True)
    assert "reverse the members' order, because on these 8 pairs" in caplog.text


# -------------------------------------------------------------------------------------------------- user mistakes
@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        (dict(members=[]), ValueError, "at least one"),
        (dict(members=[3]), TypeError, "Member 0 is a int"),
        (dict(members=[by_length], reduce="meen"), ValueError, "Did you mean 'mean'"),
        (dict(members=[by_length], reduce="weighted"), ValueError, "needs `weights`"),
        (dict(members=[by_length], weights=[1.0]), ValueError, "takes no weights.*reduce='weighted'"),
        (dict(members=[by_length], reduce="weighted", weights=[1.0, 2.0]), ValueError, "1 finite numbers"),
        (dict(members=[by_length], coefficient=1.0), TypeError, "coefficient"),
        (dict(members=[by_length], reduce="mean_minus_std", coefficient=-1.0), ValueError, ">= 0"),
        (dict(members=[by_length], scorer_kwargs={"max_length": 3}), TypeError, "max_length.*no member uses"),
        (dict(members=[by_length], base_model=torch.nn.Linear(1, 1)), ValueError, "no member is an adapter"),
    ],
)
def test_mistakes_at_construction(arguments, error, complaint):
    with pytest.raises(error, match=complaint):
        RewardEnsemble(**arguments)


def test_the_place_of_a_base_is_for_adapters(members, reward_path, tmp_path):
    RewardEnsemble([reward_path()]).save(tmp_path / "full")
    for none in ([reward_path()], [tmp_path / "full"], tmp_path / "full", [by_length]):
        with pytest.raises(ValueError, match="`base_model` says where the base of adapters is, and no member is one"):
            RewardEnsemble(none, base_model="/nowhere")
    bare = shutil.copytree(members[0], tmp_path / "bare")  # as of plain PEFT
    (bare / "reward_model.json").unlink()
    base = shutil.copytree(members[0].parent / "base", tmp_path / "moved")
    config = json.loads((bare / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere"}))
    found = RewardEnsemble([bare, tmp_path / "full", members[1]], base_model=base).score_members(*rows())
    assert [row[2] for row in found] == pytest.approx([row[0] for row in alone([members[1]])], abs=1e-6)


@pytest.mark.parametrize("option", [{"reference": 0.0}, {"std_coefficient": 1.0}, {"calibrated": True}])
def test_options_that_an_ensemble_would_not_use_are_refused(members, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"scorer_kwargs has {name}.*raw scores"):
        RewardEnsemble(members, scorer_kwargs=option)
    scorer = RewardScorer(members[0], name="first")
    setattr(scorer, name, option[name])
    with pytest.raises(ValueError, match=f"first has {name}"):
        RewardEnsemble([scorer, by_length])


def test_mistakes_in_what_members_return():
    async def slow(prompts, completions, **columns):
        return [0.0] * len(completions)

    with pytest.raises(TypeError, match="slow is asynchronous"):
        RewardEnsemble([slow])

    def nan(prompts, completions, **columns):
        return [0.0, float("nan")]

    with pytest.raises(DataError, match="row 1.*nan by the member nan"):
        RewardEnsemble([by_length, nan])(None, ["a", "b"])

    def short(prompts, completions, **columns):
        return [0.0]

    with pytest.raises(ValueError, match="short returned 1 rewards for 2"):
        RewardEnsemble([short])(None, ["a", "b"])


def test_a_folder_that_is_no_ensemble(members):
    with pytest.raises(EnsembleFileError, match="no reward_ensemble.json"):
        RewardEnsemble(members[0])


# ------------------------------------------------------------------------------------------- policy optimisation
def prompt_only():
    return Dataset.from_list([{"prompt": row["prompt"]} for row in pair_rows(4, seed=4)])


def grpo(model, ensemble, folder, **kwargs):
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        max_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    return GRPOTrainer(model=model, reward_funcs=[ensemble], args=args, train_dataset=prompt_only(), **kwargs)


def test_two_grpo_steps_log_the_disagreement(members, tmp_path):
    ensemble = RewardEnsemble([*members[:2], by_length], reduce="mean_minus_std", name="quality")
    calls = []

    class Recorded(RewardEnsemble):
        def __call__(self, prompts, completions, **columns):
            calls.append((prompts, completions))
            return super().__call__(prompts, completions, **columns)

    ensemble.__class__ = Recorded
    trainer = grpo(str(members[0].parent / "base"), ensemble, tmp_path)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == len(calls) == 2
    by_hand = RewardEnsemble([*members[:2], by_length], reduce="mean_minus_std")
    for log, (prompts, completions) in zip(logs, calls, strict=True):
        table = by_hand.score_members(prompts, completions)
        assert log["rewards/quality/mean"] == pytest.approx(statistics.fmean(by_hand.combine(table)), abs=1e-5)
        assert log["quality/disagreement"] == pytest.approx(statistics.fmean(by_hand.disagreement(table)), abs=1e-5)
        assert log["quality/trained-1"] == pytest.approx(statistics.fmean(row[1] for row in table), abs=1e-5)
    assert set(trainer._logs["extra"]) == {f"quality/{n}" for n in ("disagreement", *ensemble.members)}


@pytest.mark.parametrize("order", ["adapter first", "ensemble first"])
def test_a_qlora_policy_and_the_ensemble_share_one_4_bit_base(quantized, tmp_path, order):
    base = str(quantized[0].parent / "base")
    config = nf4(bnb_4bit_compute_dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    keep_4bit_exact_on_cpu(policy)
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    if order == "adapter first":
        policy = get_peft_model(policy, lora)
    else:
        with pytest.raises(ValueError, match="of the base are trainable"):
            RewardEnsemble(quantized, base_model=policy)
        policy.requires_grad_(False)  # what PEFT does only if it puts on the first adapter
    before = policy(ids).logits.detach()
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    mode = [module.training for module in policy.modules()]

    ensemble = RewardEnsemble(quantized, base_model=policy)
    assert backbones(ensemble) == {policy.get_input_embeddings().weight.data_ptr()}
    want = RewardEnsemble(quantized).score_members(*rows())
    assert largest_difference(ensemble.score_members(*rows()), want) < 1e-6
    assert torch.equal(policy(ids).logits, before)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trainable
    assert [m.training for n, m in policy.named_modules() if "member" not in n][: len(mode)]

    if order == "ensemble first":
        policy = get_peft_model(policy, lora)
    members_before = {n: p.detach().clone() for n, p in policy.named_parameters() if ".member-" in n}
    own_before = {n: p.detach().clone() for n, p in policy.named_parameters() if ".default." in n}
    trainer = grpo(policy, ensemble, tmp_path)
    trainer.train()
    now = dict(policy.named_parameters())
    assert members_before and all(torch.equal(now[n], p) for n, p in members_before.items())
    assert any(not torch.equal(now[n].float(), p.float()) for n, p in own_before.items())
    assert largest_difference(ensemble.score_members(*rows()), want) < 1e-6  # the policy moved, its rewards did not
    trainer.save_model(str(tmp_path / "policy"))
    saved = list((tmp_path / "policy").rglob("*.safetensors"))
    assert [path.name for path in saved] == ["adapter_model.safetensors"]


def test_a_policy_on_another_base_is_refused(quantized, members):
    base = str(members[0].parent / "base")
    policy = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    with pytest.raises(BaseMismatchError, match="another base than the model in memory.*quantization"):
        RewardEnsemble(quantized, base_model=policy)
    with torch.no_grad():
        next(policy.model.parameters()).add_(0.5)
    with pytest.raises(BaseMismatchError, match="probes moved"):
        RewardEnsemble(members, base_model=policy)
