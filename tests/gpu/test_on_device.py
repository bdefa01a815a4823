"""On a CUDA device, with tiny models: NF4 checkpoints reload, the head is exact under autocast, batches are halved."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tests.tiny import pair_rows, save_tiny_model


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model trained for two steps on an NF4 base under bf16 autocast: its trainer and its folder."""
    from datasets import Dataset

    from trl_ext import RewardConfig, RewardTrainer

    folder = tmp_path_factory.mktemp("on_device")
    trainer = RewardTrainer(
        model=str(save_tiny_model(folder / "base", "llama")),
        args=RewardConfig(
            output_dir=str(folder / "out"),
            max_steps=2,
            bf16=True,
            report_to="none",
            save_strategy="no",
            learning_rate=1e-3,
        ),
        train_dataset=Dataset.from_list(pair_rows(16)),
        quantization_config=BitsAndBytesConfig(**NF4),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer, str(folder / "out")


def test_an_nf4_checkpoint_reloads_with_the_same_scores(trained):
    from trl_ext import RewardScorer

    trainer, folder = trained
    prompts, completions = ["What? "] * 4, ["one", "two", "three", "four and more"]
    before = RewardScorer(trainer.model, trainer.processing_class)(prompts, completions)
    after = RewardScorer(folder)(prompts, completions)
    assert after == pytest.approx(before, abs=1e-2)
    assert sorted(range(4), key=before.__getitem__) == sorted(range(4), key=after.__getitem__)


def test_the_head_is_exact_under_autocast(trained):
    from trl_ext.models.heads import last_head_module, unwrap

    model = trained[0].model
    head = last_head_module(unwrap(model))
    hidden = torch.randn(2, 3, model.config.hidden_size, device=model.device, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        output = head(hidden)
    assert output.dtype == torch.float32 and head.weight.dtype == torch.float32
    assert torch.allclose(output, hidden.float() @ head.weight.T, atol=1e-5)


def test_a_batch_that_does_not_fit_is_halved(trained):
    from trl_ext import RewardScorer

    scorer = RewardScorer(trained[1], batch_size=256)
    prompts, completions = [""] * 256, ["word " * 200] * 256
    expected = RewardScorer(trained[1], batch_size=2)(prompts[:4], completions[:4])
    torch.cuda.empty_cache()
    free = torch.cuda.memory_allocated() + 64 * 2**20
    torch.cuda.set_per_process_memory_fraction(free / torch.cuda.get_device_properties(0).total_memory)
    try:
        scores = scorer(prompts, completions)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scores[:4] == pytest.approx(expected, abs=2e-2)


def test_two_streams_of_stages_give_their_memory_back(trained, tmp_path):
    from datasets import Dataset

    from trl_ext import rejection_sample

    policy = str(save_tiny_model(tmp_path / "policy", "llama"))
    prompts = Dataset.from_list([{"prompt": text} for text in ("one", "two", "three", "four")])
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]

    def stream(number):
        folder = tmp_path / f"samples_{number}"
        return rejection_sample(
            policy,
            [trained[1]],
            prompts,
            output_dir=folder,
            num_generations=2,
            max_completion_length=8,
            isolate="always",
        )

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(stream, range(2)))
    assert all(len(rows) == len(prompts) for rows in results)
    assert free - torch.cuda.mem_get_info()[0] <= 500 * 2**20
