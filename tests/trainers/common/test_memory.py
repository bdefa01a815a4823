"""What an evaluation holds in memory does not grow with the rows: 2,000 rows within 5 % of 200."""

import gc
import tracemalloc

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny import save_tiny_model
from tests.trainers.table import TOKEN, rows_of, tiny_trainer


class Held(TrainerCallback):
    """The most bytes of live tensors at any of some batches of an evaluation."""

    def __init__(self, every):
        self.every = every
        self.steps = self.bytes = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.steps += 1
        if self.steps % self.every == 0:
            gc.collect()
            self.bytes = max(self.bytes, live_tensor_bytes())


def live_tensor_bytes():
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """1 MB of weights: less than what the outputs of 2,000 rows would take, if they were kept."""
    return save_tiny_model(tmp_path_factory.mktemp("larger"), "llama", hidden_size=128, intermediate_size=256)


def peaks(kind, base, folder, rows, trace, **kwargs):
    """Bytes of live tensors, and what Python allocated (NumPy included), at the peak of an evaluation."""
    few, many = rows_of(kind, 20), rows_of(kind, rows)
    trainer = tiny_trainer(kind, base, folder, few, many, per_device_eval_batch_size=20, **kwargs)
    data = trainer.eval_dataset  # prepared
    trainer.evaluate(data.select(range(20)))
    held = Held(every=rows // 20 // 5)
    trainer.add_callback(held)
    if trace:
        tracemalloc.start()
    trainer.evaluate(data)
    python = tracemalloc.get_traced_memory()[1] if trace else 0
    tracemalloc.stop()
    return held.bytes, python


SLOW = [pytest.param(kind, True, marks=pytest.mark.slow, id=f"{kind} traced") for kind in TOKEN]


@pytest.mark.parametrize(("kind", "trace"), [("prm", False), *SLOW])
def test_evaluation_memory_is_flat_in_the_rows(kind, trace, larger, tmp_path):
    few, many = (peaks(kind, larger, tmp_path, rows, trace) for rows in (200, 2000))
    print(f"{kind}: tensors {few[0]:,} -> {many[0]:,} bytes, Python {few[1]:,} -> {many[1]:,} bytes")
    assert many[0] <= 1.05 * few[0]
    assert many[1] <= 1.05 * few[1]

    if not trace:
        return
    # the measure sees what is kept: a `compute_metrics` keeps the outputs of all tokens
    keeping = {"trainer_kwargs": {"compute_metrics": lambda prediction: {}}}
    assert peaks(kind, larger, tmp_path, 1000, False, **keeping)[0] > 1.05 * many[0]
