"""The command that serves a reward model, and the files that it needs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.serving.served_folders import save_base, save_reward
from tests.tiny import TOKENIZER_KINDS, tiny_tokenizer
from trl_ext.cli import serve_info as command
from trl_ext.data.tokenization import TokenizationSettings, encode
from trl_ext.models.ensemble.ensemble_files import EnsembleFile, write_ensemble
from trl_ext.models.sidecar import read_sidecar
from trl_ext.serving.score_template import chat_template, text_template
from trl_ext.serving.serve_info import server_commands
from trl_ext.serving.server_pool import ServerError


LORA = dict(r=4, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("served") / "base")


def options(arguments: list[str]) -> dict[str, list[str]]:
    """`["--a", "1", "2"]` -> `{"--a": ["1", "2"]}`."""
    found: dict[str, list[str]] = {}
    for argument in arguments[1:]:
        if argument.startswith("--"):
            values = found.setdefault(argument, [])
        else:
            values.append(argument)
    return found


def test_a_full_model_adapters_and_an_ensemble(base, tmp_path, capsys):
    full = save_reward(base, tmp_path / "full", seed=1)
    for name, rank in (("one", 4), ("two", 12)):
        save_reward(base, tmp_path / name, seed=2, lora=LoraConfig(**(LORA | {"r": rank})))
    shutil.copytree(tmp_path / "one", tmp_path / "ensemble" / "member-0")
    write_ensemble(tmp_path / "ensemble", EnsembleFile(members=["member-0"]))

    first, second = server_commands([full, *(tmp_path / n for n in ("one", "two", "ensemble"))], tmp_path / "out")
    given = options(first.arguments)
    assert first.arguments[0] == str(full) and "--enable-lora" not in given
    assert given["--runner"] == ["pooling"] and given["--dtype"] == ["float32"]
    assert "--hf-overrides" not in given  # its own config says that its scores are raw
    assert json.loads((full / "config.json").read_text())["problem_type"] == "regression"

    given = options(second.arguments)
    assert second.arguments[0] == str(base) and given["--port"] == ["8001"]
    assert given["--max-lora-rank"] == ["16"] and given["--max-loras"] == ["3"]  # the ranks that vLLM takes
    assert given["--lora-modules"] == [
        f"one={tmp_path / 'one'}",
        f"two={tmp_path / 'two'}",
        f"member-0={tmp_path / 'ensemble' / 'member-0'}",
    ]
    assert json.loads(given["--hf-overrides"][0]) == {"num_labels": 1, "problem_type": "regression"}
    assert Path(given["--chat-template"][0]).read_text().startswith('{{ messages[0]["content"] }}')

    assert command.main([str(full), "--output_dir", str(tmp_path / "out"), "--port", "9000"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"vllm serve {full} \\\n    --runner pooling \\\n") and "--port 9000" in printed
    assert f'RewardScorer("http://localhost:9000", "{full}")' in printed
    assert f"trl-ext score --model http://localhost:9000#{full}" in printed


def test_what_vllm_cannot_serve_is_said(base, tmp_path):
    def changed(name: str, **config) -> Path:
        folder = save_reward(base, tmp_path / name, seed=1, lora=LoraConfig(**LORA))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    with pytest.raises(ServerError, match="'use_dora': True.*trl-ext merge"):
        server_commands([changed("dora", use_dora=True)], tmp_path)
    with pytest.raises(ServerError, match="type IA3; vLLM serves LoRA"):
        server_commands([changed("ia3", peft_type="IA3")], tmp_path)
    with pytest.raises(ServerError, match="rank 600; vLLM serves up to 512"):
        server_commands([changed("rank", r=600)], tmp_path)
    quantized = changed("quantized")
    sidecar = read_sidecar(quantized)
    sidecar.base.quantization = {"load_in_4bit": True}
    sidecar.save(quantized)
    with pytest.raises(ServerError, match="quantized base, which vLLM would round otherwise. Merge it"):
        server_commands([quantized], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ServerError, match="holds no model"):
        server_commands([tmp_path / "empty"], tmp_path)
    with pytest.raises(FileNotFoundError):
        server_commands(["/nowhere"], tmp_path)


def test_a_base_with_the_heads_of_token_level_adapters(base, tmp_path):
    """The outputs of the base with an adapter, at the adapter's places, are the adapter's; in plain transformers."""
    save_reward(base, tmp_path / "orm", seed=1, kind="outcome", lora=LoraConfig(**LORA))
    save_reward(base, tmp_path / "prm", seed=2, kind="process", lora=LoraConfig(**LORA))
    (made,) = server_commands([tmp_path / "orm", tmp_path / "prm"], tmp_path / "out")
    given = options(made.arguments)
    assert made.arguments[0] == str(tmp_path / "out" / "base")
    assert json.loads(given["--pooler-config"][0]) == {"task": "token_classify"} and "--chat-template" not in given
    check_served(made, {"orm": tmp_path / "orm", "prm": tmp_path / "prm"})
    assert AutoTokenizer.from_pretrained(made.arguments[0]).vocab_size


def check_served(made, adapters: dict[str, Path]) -> None:
    """The base with each adapter that the server gets has the saved scores of the adapter's probes, at its places."""
    served = dict(module.split("=", 1) for module in options(made.arguments)["--lora-modules"])
    assert list(served) == list(adapters) and options(made.arguments)["--max-loras"] == [str(len(adapters))]
    start = 0
    for name, folder in adapters.items():
        model = AutoModelForSequenceClassification.from_pretrained(made.arguments[0])
        model = PeftModel.from_pretrained(model, served[name]).eval()
        sidecar = read_sidecar(folder)
        found = []
        for ids in sidecar.probes["input_ids"]:
            with torch.no_grad():
                hidden = model.base_model.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
                found += model.base_model.model.score(hidden)[start : start + sidecar.num_labels].tolist()
        assert found == pytest.approx(sidecar.probes["scores"], abs=1e-5)
        start += sidecar.num_labels


def test_token_level_adapters_of_one_name_do_not_overwrite_each_other(base, tmp_path):
    folders = [tmp_path / run / "checkpoint-500" for run in ("prm-a", "prm-b")] + [tmp_path / "base"]
    for seed, folder in enumerate(folders, start=1):
        save_reward(base, folder, seed=seed, kind="process", lora=LoraConfig(**LORA))
    (made,) = server_commands([*folders, tmp_path / "prm-a" / ".." / "prm-a" / "checkpoint-500"], tmp_path / "out")
    check_served(made, {str(folders[0]): folders[0], str(folders[1]): folders[1], "base": folders[2]})


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_the_score_templates_give_the_token_ids_of_training(kind):
    """As vLLM does: the template makes a text of two messages, which the tokenizer reads with its special tokens."""
    tokenizer = tiny_tokenizer(kind)
    settings = TokenizationSettings.for_training(tokenizer)
    texts = ("2 + 2 =", " 4\n"), ('Is {{ this }} "quoted"?', "Yes.")
    for prompt, completion in texts:
        pair = [{"role": "query", "content": prompt}, {"role": "document", "content": completion}]
        template = text_template(tokenizer, settings)
        text = tokenizer.apply_chat_template(pair, chat_template=template, tokenize=False)
        assert tokenizer(text)["input_ids"] == encode(tokenizer, prompt, completion, settings).ids
    template = chat_template(tokenizer)
    assert (template is None) == (kind == "bert" or not tokenizer.chat_template)  # BERT puts [CLS] before every text
    if template is not None:
        chat = [{"role": "user", "content": "2 + 2 ="}]
        pair = [{"role": "query", "content": "2 + 2 ="}, {"role": "document", "content": "4"}]
        text = tokenizer.apply_chat_template(pair, chat_template=template, tokenize=False)
        assert tokenizer(text)["input_ids"] == encode(tokenizer, chat, "4", settings).ids
