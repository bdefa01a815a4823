"""`RankedDPOTrainer`: TRL's numbers on pairs, the formula on rankings, and equal results from flat and padded rows."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from tests.tiny import pair_rows, ranked_rows, save_tiny_model
from tests.trainers.helpers import SMALL, without_time
from trl_ext import RankedDPOConfig, RankedDPOTrainer
from trl_ext.data.validation import DataError
from trl_ext.losses import plackett_luce
from trl_ext.losses.distillation import LogConfRanking
from trl_ext.models.shared_prefix import ATTENTION_NAME, current_attention


COMMON = SMALL | {"max_steps": 1, "seed": 3, "beta": 0.5}
ADAPTER = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("policy"), "qwen2", seed=5))


def trainer_for(policy, folder, rows, **more):
    options = {name: more.pop(name) for name in ("peft_config", "quantization_config", "eval_dataset") if name in more}
    args = RankedDPOConfig(output_dir=str(folder), **{**COMMON, **more})
    return RankedDPOTrainer(policy, args=args, train_dataset=Dataset.from_list(rows), **options)


def loss_and_gradients(trainer):
    """Of the first rows of the data, and the metrics that were recorded; the model is in training mode."""
    trainer._set_signature_columns_if_needed()
    columns = [name for name in trainer._signature_columns if name in trainer.train_dataset.column_names]
    if isinstance(trainer, RankedDPOTrainer):
        trainer._decide_flat_rows(trainer.model)
    rows = [{name: row[name] for name in columns} for row in trainer.train_dataset.select(range(4))]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.grad is not None}
    gradients = torch.cat([p.grad.flatten() for _, p in sorted(trained.items())])
    return loss.item(), gradients, {name: values[0] for name, values in trainer._metrics["train"].items()}, inputs


@pytest.mark.parametrize(("chat", "flat"), [(False, True), (True, False)])
def test_pairs_have_the_loss_the_gradients_and_the_metrics_of_trl(chat, flat, policy, tmp_path):
    rows = pair_rows(4, chat=chat)
    theirs = DPOTrainer(
        policy,
        args=DPOConfig(output_dir=str(tmp_path), loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.25], **COMMON),
        train_dataset=Dataset.from_list(rows),
        peft_config=ADAPTER,
    )
    ours = trainer_for(
        policy,
        tmp_path,
        rows,
        loss_type="bradley_terry",
        sft_coefficient=0.25,
        shared_prefix=flat,
        peft_config=ADAPTER,
    )
    assert ours.train_dataset["candidate_ids"][0][0] == [
        *theirs.train_dataset["prompt_ids"][0],
        *theirs.train_dataset["chosen_ids"][0],
    ]
    wanted_loss, wanted, wanted_metrics, _ = loss_and_gradients(theirs)
    loss, found, metrics, inputs = loss_and_gradients(ours)
    assert ("prefix_layout" in inputs) == flat
    assert loss == pytest.approx(wanted_loss, abs=1e-5) and wanted_loss != pytest.approx(0.693, abs=1e-2)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert set(metrics) >= set(wanted_metrics)
    for name, value in wanted_metrics.items():
        assert metrics[name] == pytest.approx(value, abs=1e-4), name


def test_rankings_follow_the_formula_from_flat_and_from_padded_rows(policy, tmp_path):
    """Ragged groups with ties; the implicit rewards from plain log-probabilities of two models."""
    rows = ranked_rows(4, k=4, ragged=True, ties=True)
    found = {}
    for flat in (True, False):
        trainer = trainer_for(policy, tmp_path, rows, shared_prefix=flat, peft_config=ADAPTER)
        found[flat] = loss_and_gradients(trainer)
    flat, padded = found[True], found[False]
    assert "prefix_layout" in flat[3] and "prefix_layout" not in padded[3]
    assert flat[0] == pytest.approx(padded[0], abs=1e-5)
    torch.testing.assert_close(flat[1], padded[1], atol=1e-5, rtol=1e-4)

    def log_probability(model, ids, start):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return sum(scores[place - 1, ids[place]].item() for place in range(start, len(ids)))

    model = trainer.model.eval()
    data, inputs = trainer.train_dataset, padded[3]
    rewards = torch.zeros(inputs["ratings"].shape)
    for number, row in enumerate(data.select(range(4))):
        for place, ids in enumerate(row["candidate_ids"]):
            own = log_probability(model, ids, row["completion_start"])
            with model.disable_adapter():
                rewards[number, place] = 0.5 * (own - log_probability(model, ids, row["completion_start"]))
    wanted = plackett_luce(rewards, inputs["ratings"], inputs["group_mask"]).mean().item()
    assert padded[0] == pytest.approx(wanted, abs=1e-4)
    begins = AutoTokenizer.from_pretrained(policy)(data[0]["prompt"])["input_ids"]
    assert data[0]["candidate_ids"][0][: data[0]["completion_start"]] == begins


def test_a_reference_that_was_computed_before_gives_the_same_loss(policy, tmp_path):
    rows = ranked_rows(6, k=3, ragged=True)
    now = trainer_for(policy, tmp_path, rows, peft_config=ADAPTER)
    before = trainer_for(policy, tmp_path, rows, peft_config=ADAPTER, precompute_ref_log_probs=True)
    assert len(before.train_dataset["ref_chosen_logps"][0]) == max(map(len, before.train_dataset["candidate_ids"]))
    first, second = loss_and_gradients(now), loss_and_gradients(before)
    assert "ref_logps" in second[3] and "ref_logps" not in first[3]
    assert first[0] == pytest.approx(second[0], abs=1e-5)
    torch.testing.assert_close(first[1], second[1], atol=1e-5, rtol=1e-4)


def test_a_full_policy_learns_the_order_and_can_generate_afterwards(policy, tmp_path):
    rows = ranked_rows(24, k=4)
    trainer = trainer_for(
        policy, tmp_path, rows, max_steps=24, eval_dataset=Dataset.from_list(rows[:8]), per_device_eval_batch_size=8
    )
    first = trainer.evaluate()
    assert first["eval_rewards/accuracies"] == 0  # policy and reference are equal, and ties are wrong
    assert first["eval_loss"] == pytest.approx(torch.tensor(24.0).log().item(), abs=1e-4)  # 1 of 4! orders
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_rewards/accuracies"] > 0.9 and last["eval_loss"] < 0.5 * first["eval_loss"]
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    assert logged["data/train/rows"] == 24 and logged["num_tokens"] > 0
    assert current_attention(trainer.model) != ATTENTION_NAME
    ids = torch.tensor([[5, 6, 7]])
    kwargs = dict(max_new_tokens=3, do_sample=False)
    assert trainer.model.generate(ids, **kwargs).shape[1] > 3
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.generate(ids, **kwargs).tolist() == trainer.model.generate(ids, **kwargs).tolist()


def test_an_adapter_on_a_4_bit_policy_has_the_base_as_reference(policy, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    fresh = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_for(
        policy, tmp_path, ranked_rows(8, k=3), peft_config=fresh, quantization_config=quantized, max_steps=2
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["rewards/chosen"] == pytest.approx(0, abs=1e-3) and logs[1]["rewards/margins"] != 0


@pytest.mark.parametrize(
    ("rows", "more", "error", "words"),
    [
        (ranked_rows(2), {"ld_alpha": 0.5}, ValueError, "ld_alpha=0.5"),
        (ranked_rows(2), {"truncation_mode": "keep_end"}, ValueError, "not cut"),
        (ranked_rows(2), {"loss_type": "plackett_luse"}, ValueError, "Did you mean 'plackett_luce'"),
        (ranked_rows(2), {"loss_type": "bradley_terry"}, DataError, "compares 2"),
        (ranked_rows(2, ranks=True), {"loss_type": "listnet"}, DataError, "ranks"),
        (ranked_rows(2), {"sft_coefficient": -1.0}, ValueError, "sft_coefficient=-1.0"),
        ([{"prompt": "a", "completions": ["b"], "ratings": [1.0]}] * 2, {}, DataError, "completions"),
        ([{"chosen_ids": [1, 2], "rejected_ids": [1, 3]}] * 2, {}, DataError, "where a completion begins"),
        ([{**row, "image": "x"} for row in pair_rows(2)], {}, ValueError, "images"),
        (pair_rows(2), {"max_length": 2}, DataError, "max_length"),
    ],
)
def test_what_cannot_work_is_refused(rows, more, error, words, policy, tmp_path):
    with pytest.raises(error, match=words):
        trainer_for(policy, tmp_path, rows, **more)
    with pytest.raises(TypeError, match="RankedDPOConfig"):
        RankedDPOTrainer(policy, args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_tied_batches_leave_the_metrics_of_an_evaluation_alone(policy, tmp_path):
    rows = ranked_rows(3, k=3)
    tied = [{**row, "ratings": [1.0] * 3} for row in rows[:1]]
    options = {"peft_config": ADAPTER, "per_device_eval_batch_size": 1}
    decided, mixed = (
        trainer_for(policy, tmp_path, rows, eval_dataset=Dataset.from_list(own), **options).evaluate()
        for own in (rows, [*tied, *rows])
    )
    assert mixed["eval_rewards/accuracies"] == pytest.approx(decided["eval_rewards/accuracies"])


@pytest.mark.parametrize("ranked", [False, True])
def test_a_prompt_that_whole_chats_repeat_is_no_part_of_the_completions(ranked, policy, tmp_path):
    """The columns of ultrafeedback_binarized: the prompt as text, and chats that hold it."""
    question = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("4", "five", "it is six")]
    if ranked:
        plain = {"prompt": question, "completions": answers, "ratings": [2.0, 1.0, 0.0]}
        whole = {**plain, "prompt": "2 + 2?", "completions": [question + own for own in answers]}
    else:
        plain = {"prompt": question, "chosen": answers[0], "rejected": answers[1]}
        whole = {"prompt": "2 + 2?", **{name: question + plain[name] for name in ("chosen", "rejected")}}
    wanted, found = (trainer_for(policy, tmp_path, [row] * 2).train_dataset for row in (plain, whole))
    for column in ("candidate_ids", "completion_start"):
        assert found[column][:] == wanted[column][:]
    assert found["completion_start"][0] > 5


@pytest.mark.parametrize("further", [False, True])
def test_the_reference_has_its_name(further, policy, tmp_path):
    model = policy
    if further:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy), ADAPTER)
    trainer = trainer_for(model, tmp_path, pair_rows(2), **({} if further else {"peft_config": ADAPTER}))
    wanted = "a frozen copy of the adapter" if further else "the base with its adapters off"
    assert trainer._facts()["reference"] == wanted


def test_pairs_without_a_prompt_share_their_beginning_as_in_trl(policy, tmp_path):
    rows = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in pair_rows(2)
    ]
    trainer = trainer_for(policy, tmp_path, rows)
    assert all(start > 0 for start in trainer.train_dataset["completion_start"])


def test_a_loss_of_the_user_trains_and_is_saved_by_its_name(policy, tmp_path):
    rows = pair_rows(8)
    trainer = trainer_for(policy, tmp_path, rows, loss_type=lambda *groups: plackett_luce(*groups), max_steps=1)
    named = trainer_for(policy, tmp_path, rows, max_steps=1)
    assert trainer.train().training_loss == named.train().training_loss
    trainer.save_model()
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert saved.loss_type == trainer.args.to_dict()["loss_type"] and "lambda" in saved.loss_type


def test_the_confidence_loss_follows_the_training(policy, tmp_path):
    loss = LogConfRanking(alpha=0.5, warmup=0.5)
    trainer = trainer_for(policy, tmp_path, pair_rows(8), loss_type=loss, max_steps=2)
    assert loss.confidence.weight == 0
    trainer.train()
    assert loss.confidence.weight == 0.5


@pytest.mark.parametrize("k", [2, 4])
def test_evaluation_metrics_do_not_depend_on_the_batch_size(k, policy, tmp_path):
    rows = pair_rows(9) if k == 2 else ranked_rows(9, k=k, ragged=True, ties=True)
    found = []
    for size in (1, 2, 8):
        trainer = trainer_for(
            policy, tmp_path, rows, eval_dataset=Dataset.from_list(rows), per_device_eval_batch_size=size, max_steps=2
        )
        trainer.train()
        found += [without_time(trainer.evaluate()), without_time(trainer.evaluate())]  # a second one begins anew
    assert "eval_rewards/margins" in found[0] and "eval_mean_token_accuracy" in found[0]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)
