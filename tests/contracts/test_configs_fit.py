"""Every file in configs/ gets an answer from `trl-ext bench fit --estimate`, or a sentence that says why not."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from trl_ext.cli.main import main
from trl_ext.fit.config import TRAINERS


ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
IDS = [f"{path.parent.name}/{path.stem}" for path in FILES]
SHAPE = dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    AutoConfig.for_model("llama", **SHAPE, num_key_value_heads=2, max_position_embeddings=4096).save_pretrained(folder)
    return folder


def estimate(path, tmp_path, *override):
    arguments = ["--override", *override] if override else []
    where = ["--config", str(path), "--output_dir", str(tmp_path)]
    assert main(["bench", "fit", "--estimate", "--no_changes", *where, *arguments]) == 0
    return json.loads((tmp_path / "bench.json").read_text())


def check(report):
    assert report["estimate"]["total_gib"] == pytest.approx(sum(report["estimate"]["gib"].values()))
    assert all(gib >= 0 for gib in report["estimate"]["gib"].values())
    assert report["fits"] is True


def test_every_folder_is_known():
    assert len(FILES) >= 20
    assert {path.parent.name for path in FILES} >= {*TRAINERS, "accelerate"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_each_config_is_estimated_at_tiny_size_or_refused(path, shape, tmp_path, capsys):
    if path.parent.name not in TRAINERS:
        with pytest.raises(SystemExit):
            main(["bench", "fit", "--estimate", "--config", str(path)])
        launched = path.parent.name == "accelerate"
        said = capsys.readouterr().err
        assert ("says how processes are launched" if launched else "only their memory is estimated") in said
        return
    check(estimate(path, tmp_path, f"model_name_or_path={shape}"))
    assert path.name in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in TRAINERS], ids=lambda p: p.stem)
def test_each_config_fits_on_24_gb_by_the_estimate(path, tmp_path):
    check(estimate(path, tmp_path))
