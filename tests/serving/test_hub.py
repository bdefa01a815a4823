"""What `push_to_hub` uploads of every kind of model: plain transformers loads it, and serve-info serves it by its id.

Only the requests to the Hub are replaced, by a cache folder as `huggingface_hub` keeps it.
"""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import save_tiny_model
from tests.trainers.helpers import lora
from tests.trainers.table import ENSEMBLES, SINGLE, TABLE, TOKEN, tiny_trainer
from trl_ext.models.ensemble.ensemble_files import member_folders, read_ensemble
from trl_ext.models.loading import HUB_FILES
from trl_ext.models.sidecar import read_sidecar
from trl_ext.serving.serve_info import server_commands


COMMIT = "1" * 40
KINDS = [("reward", False), *((kind, True) for kind in (*SINGLE, "reward ensemble"))]
OTHERS = [(kind, kind in ENSEMBLES) for kind in (*TOKEN, *ENSEMBLES[1:])]
CASES = [*KINDS, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
NAMES = [f"{kind}{' adapter' * adapter}" for kind, adapter in (*KINDS, *OTHERS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "tiny-llama", "llama")


class Hub:
    """Keeps uploads where a download of ours would put them."""

    def __init__(self, cache: Path):
        self.cache = cache

    def create_repo(self, name: str, **kwargs) -> "Hub":
        self.repo_id = name
        return self

    def upload_folder(self, folder_path: str, ignore_patterns: list[str], **kwargs) -> None:
        repository = self.cache / f"models--{self.repo_id.replace('/', '--')}"
        self.uploaded = repository / "snapshots" / COMMIT
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        kept = list(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        assert set(filter_repo_objects(kept, allow_patterns=HUB_FILES)) >= {
            name for name in kept if name.endswith((".safetensors", ".json", ".jinja"))
        }
        for name in kept:
            (self.uploaded / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(folder_path, name), self.uploaded / name)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize("kind,adapter", CASES, ids=NAMES)
def test_what_is_uploaded_works_without_us_and_is_served(base, tmp_path, monkeypatch, kind, adapter):
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    lora_ = {"peft_config": lora()} if adapter else {}
    trainer = tiny_trainer(
        kind, base, tmp_path / "out", TABLE[kind].rows(4), max_steps=1, hub_model_id="you/model", trainer_kwargs=lora_
    )
    trainer.train()
    trainer.push_to_hub()
    shutil.rmtree(tmp_path / "out")

    ensemble = read_ensemble(hub.uploaded)
    assert (ensemble is not None) == (kind in ENSEMBLES)
    folders = [hub.uploaded] if ensemble is None else member_folders(hub.uploaded, ensemble)
    for folder in folders:
        sidecar = read_sidecar(folder)
        if adapter:
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=sidecar.num_labels)
            model = PeftModel.from_pretrained(model, folder)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(folder)
            assert model.config.num_labels == sidecar.num_labels
        found = []
        for ids in sidecar.probes["input_ids"]:
            with torch.no_grad():
                found += model.eval()(input_ids=torch.tensor([ids])).logits[0].tolist()
        assert found == pytest.approx(sidecar.probes["scores"], abs=1e-5)
        assert AutoTokenizer.from_pretrained(folder).pad_token is not None
    assert (hub.uploaded / "README.md").is_file()

    (command,) = server_commands(["you/model"], tmp_path / "served")
    assert len(command.models) == len(folders)
    by_token = kind.split()[0] in TOKEN
    assert ("--pooler-config" in command.arguments) == by_token
    assert ("--enable-lora" in command.arguments) == adapter
    served = Path(command.arguments[0])
    assert served.is_dir() and (served == base if adapter and not by_token else (served / "config.json").is_file())
