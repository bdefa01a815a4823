"""`PPOTrainer`: TRL's numbers without a critic, a critic that learns known values, and runs that can be resumed."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from tests.tiny import pair_rows, save_tiny_model
from tests.trainers.helpers import SMALL, lora, trainer_for
from tests.trainers.helpers import config as reward_config
from trl_ext import RewardEnsemble, RewardScorer
from trl_ext.losses.advantages import gae, td_errors, whiten
from trl_ext.models import BaseMismatchError
from trl_ext.trainers.common.health import NotFiniteError
from trl_ext.trainers.policy.critic import CRITIC_FOLDER
from trl_ext.trainers.policy.ppo_config import PPOConfig
from trl_ext.trainers.policy.ppo_trainer import PPOTrainer
from trl_ext.trainers.policy.report import policy_report
from trl_ext.trainers.policy.watch import SAMPLES


PROMPTS = Dataset.from_list([{"prompt": text} for text in ("one", "two", "three", "four")])
COMMON = SMALL | {"num_generations": 4, "max_completion_length": 6, "max_steps": 2, "seed": 3}
ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def policy_path(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("policy"), "qwen2", seed=5))


@pytest.fixture(scope="module")
def reward_path(policy_path, tmp_path_factory):
    """A scalar reward model: an adapter on the policy's base."""
    folder = tmp_path_factory.mktemp("reward")
    trainer = trainer_for(policy_path, reward_config(folder, max_steps=2), pair_rows(8), peft_config=lora(r=2))
    trainer.train()
    trainer.save_model()
    return folder


def letters(prompts, completions, **columns):
    """A scalar reward that differs between completions."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def halves(prompts, completions, **columns):
    """A dense reward for the first half of each completion; nothing for the shortest ones."""
    return [[(0, len(text) // 2, 1.0)] if len(text) > 1 else None for text in completions]


def config(folder, **kwargs):
    return PPOConfig(output_dir=str(folder), **(COMMON | kwargs))


class Kept(PPOTrainer):
    """Keeps what generation and scoring returned."""

    def _generate_and_score_completions(self, inputs):
        self.output = super()._generate_and_score_completions(inputs)
        return self.output


def made(policy, folder, reward=letters, dense=None, peft=ADAPTER, trainer=Kept, value_model=None, **kwargs):
    args = config(folder, **kwargs)
    return trainer(policy, reward, dense, args, value_model, train_dataset=PROMPTS, peft_config=peft)


def copied(parameters):
    return {name: p.detach().clone() for name, p in parameters}


def test_without_a_critic_it_is_trls(policy_path, tmp_path):
    ours = made(policy_path, tmp_path, advantage="outcome", beta=0.0, peft=None)
    ours.train()
    args = GRPOConfig(output_dir=str(tmp_path), **COMMON)
    theirs = GRPOTrainer(policy_path, letters, args=args, train_dataset=PROMPTS)
    theirs.train()
    assert ours.value_model is None
    for name, weight in theirs.model.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), weight, atol=1e-7, rtol=0)


def test_the_critic_learns_values_that_are_known_exactly(policy_path, tmp_path):
    """The reward is 4 for two of the prompts, and 1 more if the first token is one of three: V is known at each token.

    The policy stands still and chooses among six tokens.
    """
    allowed, good = [40, 41, 42, 43, 44, 45], {40, 41, 42}
    worth = {"one": 4.0, "two": 0.0, "three": 4.0, "four": 0.0}

    def known(prompts, completions, completion_ids, **columns):
        return [worth[p] + (ids[0] in good) for p, ids in zip(prompts, completion_ids, strict=True)]

    size = len(AutoTokenizer.from_pretrained(policy_path))
    only = {"suppress_tokens": [token for token in range(size) if token not in allowed]}
    trainer = made(
        policy_path, tmp_path, known, learning_rate=0.0, value_learning_rate=2e-2, gae_lambda=1.0, beta=0.0,
        max_steps=25, per_device_train_batch_size=16, cliprange_value=None, lr_scheduler_type="constant",
        logging_steps=25, generation_kwargs=only,
    )  # fmt: skip
    before = copied(trainer.model.named_parameters())
    trainer.train()
    output = trainer.output
    policy, tokenizer = trainer.model, trainer.processing_class
    wrong = []
    for row, (ids, values) in enumerate(zip(output["completion_ids"], output["values"], strict=True)):
        prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
        with torch.no_grad():
            chance = policy(prompt[None]).logits[0, -1, allowed].softmax(0)[:3].sum()
        base = worth[tokenizer.decode(prompt)]
        wrong += [values[0] - (base + chance), *(values[1:] - (base + (ids[0].item() in good)))]
    assert trainer._metrics["train"]["critic/explained_variance"] == []  # logged and cleared
    trainer._log_critic("train", output["values"], output["returns"], output["value_mask"], output["value_mask"])
    assert trainer._metrics["train"]["critic/explained_variance"][0] > 0.9
    assert torch.stack(wrong).square().mean() < 0.25
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name]) or ".critic." in name


@pytest.fixture(scope="module")
def trained(policy_path, tmp_path_factory):
    """A trainer after two steps, its weights before, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp("ppo")
    trainer = made(policy_path, folder, dense=halves, beta=0.1, gamma=0.9, log_completions=True, verifier="letters")
    before = copied([*trainer.model.named_parameters(), *trainer.value_model.named_parameters()])
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return trainer, before, folder


def test_policy_and_critic_move_and_the_base_does_not(trained):
    trainer, before, _ = trained
    now = dict([*trainer.model.named_parameters(), *trainer.value_model.named_parameters()])
    moved = {name for name, p in now.items() if not torch.equal(p, before[name])}
    assert any(".default." in name for name in moved)
    assert any("lora_" in name and ".critic." in name for name in moved)
    assert any("score" in name for name in moved)
    assert all(".default." in name or ".critic." in name for name in moved)
    logged = trainer.state.log_history[0]
    assert logged["critic/value_loss"] > 0 and logged["critic/grad_norm"] > 0
    assert {"critic/explained_variance", "critic/clip_share", "kl", "dense/advantage_size"} <= set(logged)
    assert {"watch/repetition", "watch/reward_trend", "watch/hacking_suspected"} <= set(logged)
    assert logged["dense/reward_at_step_1"] == 1.0 and logged["dense/without_low_step"] == 1.0


def test_a_report_shows_the_credit_of_every_token(trained):
    """`train` wrote it, because completions were kept."""
    trainer, _, folder = trained
    page = (folder / "policy.html").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (folder / "completions" / SAMPLES).read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4
    for row, ids, mask in zip(
        rows[4:], trainer.output["completion_ids"], trainer.output["completion_mask"], strict=True
    ):
        text = "".join(row["pieces"])
        assert text == trainer.processing_class.decode(ids[mask.bool()], skip_special_tokens=True)
        assert len(row["pieces"]) == len(row["advantages"]) == len(row["values"]) == len(row["rewards"]) == mask.sum()
        assert row["reward"] == letters(None, [text])[0]
        assert page.count(f'title="advantage {row["advantages"][0]:.3g}') >= 1
    assert page.count("piece rewarded") >= sum(reward is not None for row in rows[4:] for reward in row["rewards"]) > 0
    assert (folder / "policy_reward.png").stat().st_size > 1000
    assert "<td>Critic (1 is perfect, 0 is a constant)</td>" in page
    (folder / "policy.html").unlink()
    assert policy_report(folder) == folder / "policy.html"  # from the files that were saved
    with pytest.raises(FileNotFoundError, match="trainer.save_state"):
        policy_report(folder / "completions")


def test_the_base_is_held_once_and_each_backward_pass_reaches_its_own_adapter(trained):
    trainer, _, _ = trained
    policy = {p.data_ptr() for p in trainer.model.parameters()}
    alone = [name for name, p in trainer.value_model.named_parameters() if p.data_ptr() not in policy]
    assert alone and all("score" in name for name in alone)
    batch = dict(trainer.output)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, batch).backward()
    own = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert own and all(".default." in name for name in own)
    trainer.model.zero_grad()
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    trainer._train_critic(batch)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    assert all(p.grad is None for name, p in trainer.model.named_parameters() if ".critic." not in name)
    assert any(p.grad.abs().sum() > 0 for p in trainer._critic.parameters)
    trainer._gradients.on_optimizer_step()


def test_advantages_are_those_of_the_definition(trained):
    """Rewards of spans at their tokens, the scalar reward at the last token, less beta times the KL divergence."""
    trainer, _, _ = trained
    rows = [dict(PROMPTS[0]) for _ in range(4)]
    trainer.model.train()
    output = trainer._generate_and_score_completions(rows)
    mask = output["completion_mask"].bool()
    texts = trainer.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
    wanted = torch.zeros(mask.shape)
    for row, (text, reward) in enumerate(zip(texts, letters(None, texts), strict=True)):
        length = int(mask[row].sum())
        wanted[row, length - 1] += reward
        if len(text) > 1:
            ids = output["completion_ids"][row]
            decoded = [trainer.processing_class.decode(ids[: n + 1], skip_special_tokens=True) for n in range(length)]
            end = len(text) // 2
            wanted[row, next(n for n, d in enumerate(decoded) if len(d) >= end and text.startswith(d[:end]))] += 1.0
    wanted -= 0.1 * (output["old_per_token_logps"] - output["ref_per_token_logps"]) * mask
    advantages = gae(wanted, output["values"], mask, 0.9, 0.95)
    torch.testing.assert_close(output["returns"], advantages + output["values"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output["advantages"], whiten(advantages, mask), atol=1e-4, rtol=1e-4)
    trainer.args.gae_lambda = 0.0  # A2C
    torch.testing.assert_close(
        trainer._credit(
            output | {"advantages": torch.zeros(4)}, torch.zeros(mask.shape), torch.zeros_like(mask), mask
        ),
        whiten(td_errors(without_spans(trainer, output, texts, mask), output["values"], mask, 0.9), mask),
        atol=1e-4,
        rtol=1e-4,
    )
    trainer.args.gae_lambda = 0.95


def without_spans(trainer, output, texts, mask):
    rewards = -0.1 * (output["old_per_token_logps"] - output["ref_per_token_logps"]) * mask
    for row, reward in enumerate(letters(None, texts)):
        rewards[row, int(mask[row].sum()) - 1] += reward
    return rewards


def test_the_saved_critic_is_a_token_level_reward_model(trained):
    trainer, _, folder = trained
    scorer = RewardScorer(folder / CRITIC_FOLDER)
    output = {name: trainer.output[name][:2] for name in trainer.output if name != "num_items_in_batch"}
    values = trainer._values(output)
    tokenizer = trainer.processing_class
    for row in range(2):
        ids = output["completion_ids"][row][output["completion_mask"][row].bool()].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            continue  # other tokens spell the same text
        (found,) = scorer.score_tokens([tokenizer.decode(output["prompt_ids"][row])], [text])
        assert found[:-1] == pytest.approx(values[row, 1 : len(ids)].tolist(), abs=1e-4)
    assert len(scorer(["one"], ["two"])) == 1


def test_a_run_goes_on_from_a_checkpoint(policy_path, tmp_path):
    saving = dict(save_strategy="steps", save_steps=1)
    whole = made(policy_path, tmp_path / "whole", **saving)
    whole.train()
    again = made(policy_path, tmp_path / "whole", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for ours, theirs in ((again.model, whole.model), (again.value_model, whole.value_model)):
        theirs = dict(theirs.named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in ours.named_parameters())
    files = [tmp_path / "whole" / f"checkpoint-{n}" / CRITIC_FOLDER / "adapter_model.safetensors" for n in (1, 2)]
    one, two = map(load_file, files)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(FileNotFoundError, match="critic"):
        again.train(resume_from_checkpoint=str(tmp_path))


def test_both_passes_of_the_critic_have_one_precision(policy_path, tmp_path):
    trainer, dtypes = made(policy_path, tmp_path, bf16=True, max_steps=1), []
    values = trainer._critic.values

    def watched(*given):
        layer = trainer._critic.model.base_model.model.model.layers[0].mlp
        hook = layer.register_forward_hook(
            lambda module, inputs, result: dtypes.append((torch.is_grad_enabled(), result.dtype))
        )
        try:
            return values(*given)
        finally:
            hook.remove()

    trainer._critic.values = watched
    trainer.train()
    assert set(dtypes) == {(False, torch.bfloat16), (True, torch.bfloat16)}


def test_the_best_policy_has_the_critic_of_its_checkpoint(policy_path, tmp_path):
    calls = []

    def falling(prompts, completions, **columns):
        calls.append(len(completions))
        return [float(len(text) % 3 - len(calls)) for text in completions]

    args = config(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="reward", num_generations_eval=4,
    )  # fmt: skip
    trainer = PPOTrainer(
        policy_path, falling, None, args, train_dataset=PROMPTS, eval_dataset=PROMPTS, peft_config=ADAPTER
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    trainer.save_model()
    one, two, saved = (
        load_file(tmp_path / folder / CRITIC_FOLDER / "adapter_model.safetensors")
        for folder in ("checkpoint-1", "checkpoint-2", ".")
    )
    assert all(torch.equal(one[name], saved[name]) for name in one)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def critic_gradients(trainer, batches):
    """The critic's gradients, accumulated over some batches."""
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = len(batches)
    for batch in batches:
        trainer._train_critic(batch)
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    gradients = [p.grad.clone() for p in trainer._critic.parameters]
    trainer._gradients.on_optimizer_step()
    trainer.args.steps_per_generation = 1
    return gradients


def test_checkpointed_layers_and_accumulated_batches_give_the_same_gradients(trained):
    trainer, _, _ = trained
    whole = dict(trainer.output)
    halves_ = [{n: v if v.dim() == 0 else v[rows] for n, v in whole.items()} for rows in (slice(0, 2), slice(2, 4))]
    plain = critic_gradients(trainer, [whole])
    base = trainer.model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    checkpointed = critic_gradients(trainer, [whole])
    base.activation_checkpointing_disable()
    base.disable_input_require_grads()
    accumulated = critic_gradients(trainer, halves_)
    assert any(gradient.abs().sum() > 0 for gradient in plain)
    for other in (checkpointed, accumulated):
        for gradient, wanted in zip(other, plain, strict=True):
            torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-4)


def test_a_reward_model_starts_the_critic_and_rewards_on_the_same_base(policy_path, reward_path, tmp_path):
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_path), ADAPTER)
    reward = RewardEnsemble([reward_path], base_model=policy)
    trainer = made(policy, tmp_path, reward, peft=None, value_model=reward_path, learning_rate=0.0)
    output = trainer._generate_and_score_completions([dict(PROMPTS[0]) for _ in range(4)])
    scorer = RewardScorer(reward_path)
    tokenizer = trainer.processing_class
    prompt = tokenizer.decode(output["prompt_ids"][0])
    scorer.raw.encoder.tokenization = type(scorer.raw.encoder.tokenization)(append_eos=False)
    assert output["values"][0, 0].item() == pytest.approx(scorer([None], [prompt])[0], abs=1e-4)
    shared = {p.data_ptr() for p in policy.parameters()}
    assert all(p.data_ptr() in shared for n, p in trainer.value_model.named_parameters() if "score" not in n)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/RewardEnsemble/mean"] != 0


def test_a_full_policy_has_a_separate_critic(policy_path, reward_path, tmp_path, caplog):
    trainer = made(policy_path, tmp_path / "a", peft=None, value_model=reward_path, max_steps=1)
    assert "separate model" in caplog.text
    before = copied(trainer.value_model.named_parameters())
    trainer.train()
    moved = [n for n, p in trainer.value_model.named_parameters() if not torch.equal(p, before[n])]
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    trainer = made(policy_path, tmp_path / "b", peft=None, max_steps=1)
    trainer.train()
    trainer.save_model()
    scorer = RewardScorer(tmp_path / "b" / CRITIC_FOLDER)
    assert scorer(["one"], ["two"])[0] != 0
    again = made(policy_path, tmp_path / "c", peft=None, value_model=tmp_path / "b" / CRITIC_FOLDER)
    weights = dict(trainer.value_model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in again.value_model.named_parameters())


def test_qlora_keeps_the_critic_exact(policy_path, tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    args = config(tmp_path)
    trainer = PPOTrainer(
        policy_path, letters, None, args, train_dataset=PROMPTS, quantization_config=quantization, peft_config=ADAPTER
    )
    trainer.train()
    trainer.save_model()
    own = trainer._critic.parameters
    assert own and all(p.dtype == torch.float32 for p in own)
    assert {p.dtype for n, p in trainer.model.named_parameters() if ".default." in n} == {torch.bfloat16}  # as in TRL
    with trainer._critic.active():
        ids = trainer.processing_class("one two", return_tensors="pt")["input_ids"]
        here = trainer.value_model(ids).logits.item()
    assert RewardScorer(tmp_path / CRITIC_FOLDER)([None], ["one two"])[0] == pytest.approx(here, abs=1e-4)


def test_completions_without_a_reward_teach_nothing(policy_path, tmp_path):
    def half(prompts, completions, **columns):
        return [None if row % 2 else 1.0 for row in range(len(completions))]

    trainer = made(policy_path, tmp_path, half, beta=0.0)
    output = trainer._generate_and_score_completions([dict(PROMPTS[0]) for _ in range(4)])
    assert not output["value_mask"][1::2].any() and not output["advantages"][1::2].any()
    assert output["value_mask"][::2].any(1).all()
    assert trainer._metrics["train"]["critic/completions_without_reward"] == [0.5]


def test_what_cannot_work_is_refused(policy_path, reward_path, tmp_path):
    other = str(save_tiny_model(tmp_path / "other", "qwen2", seed=9))
    with pytest.raises(BaseMismatchError):
        made(other, tmp_path, value_model=reward_path)
    with pytest.raises(FileNotFoundError):
        made(policy_path, tmp_path, value_model="/nowhere")
    with pytest.raises(ValueError, match="needs no critic"):
        made("nowhere", tmp_path, advantage="outcome", value_model=reward_path)
    with pytest.raises(TypeError, match="PPOConfig"):
        PPOTrainer("nowhere", letters, args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="optimizers"):
        PPOTrainer("nowhere", letters, None, config(tmp_path), optimizers=(torch.optim.SGD, None))
    for wrong in ({"gae_lambda": 2}, {"vf_coef": 0}, {"cliprange_value": 0}, {"kl_in": "x"}, {"advantage": "x"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            config(tmp_path, **wrong)
    with pytest.raises(NotFiniteError):
        made(policy_path, tmp_path, lambda completions, **c: [float("inf")] * len(completions)).train()


def test_shaping_uses_lambda_without_a_critic_and_the_other_forms_do_not(tmp_path):
    shaped, process = (
        PPOConfig(str(tmp_path), advantage=form, use_cpu=True, bf16=False) for form in ("shaped", "process")
    )
    assert "gae_lambda" not in shaped.without_effect(dense=True)
    assert {"gae_lambda", "value_learning_rate"} <= set(process.without_effect(dense=True))
