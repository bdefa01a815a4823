"""A process without trl_ext: loads reward models with plain transformers and PEFT, and prints their scores.

Reads a JSON list of `{"path", "ids", "base", "dtype", "nf4"}` from stdin (`base` for adapters only); the last line on
stdout is a JSON list of `{"scores"}` or `{"error"}`. Sequences are scored together, right-padded with the saved
tokenizer's pad token, through the model's own pooling.
"""

import json
import sys


sys.modules["trl_ext"] = None  # any import of it raises ImportError

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig  # noqa: E402


def scores(
    path: str, ids: list[list[int]], base: str | None = None, dtype: str = "float32", nf4: bool = False
) -> list[float]:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if nf4 else None
    model = AutoModelForSequenceClassification.from_pretrained(
        base or path, num_labels=1, dtype=dtype, quantization_config=quantization
    )
    pad = AutoTokenizer.from_pretrained(path).pad_token_id
    model.config.pad_token_id = pad
    if base is not None:
        model = PeftModel.from_pretrained(model, path)
    width = max(map(len, ids))
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, attention_mask=mask).logits[:, 0].tolist()


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = []
    for number, job in enumerate(json.load(sys.stdin)):
        torch.manual_seed(2000 + number)
        try:
            results.append({"scores": scores(**job)})
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    assert sys.modules["trl_ext"] is None
    print(json.dumps(results))
