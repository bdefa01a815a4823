"""A second start reads what the first one prepared, whatever the tokenizer was used for in between."""

import pytest
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer

from tests.trainers.table import TABLE, rows_of, tiny_trainer


@pytest.mark.parametrize("kind", TABLE)
def test_a_second_start_maps_nothing(kind, base, tmp_path):
    Dataset.from_list(rows_of(kind, 22)).save_to_disk(tmp_path / "rows")
    cached, columns = [], []
    for start in range(2):
        tokenizer = AutoTokenizer.from_pretrained(base)
        if start == 1:
            tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
        data = load_from_disk(tmp_path / "rows")
        trainer = tiny_trainer(kind, base, tmp_path, data, trainer_kwargs={"processing_class": tokenizer})
        cached.append({file.name for file in (tmp_path / "rows").glob("cache-*.arrow")})
        columns.append(trainer.train_dataset[:])
    assert cached[0] and cached[1] == cached[0]
    assert columns[0] == columns[1]
