"""A process that did not train: loads reward models with trl_ext, with another seed for each, and prints their scores.

Reads a JSON list of `{"path", "ids"}` from stdin; the last line on stdout is a JSON list of `{"scores"}` or
`{"error"}`.
"""

import json
import sys

import torch

from trl_ext.models import load_reward_model
from trl_ext.models.sidecar import probe_scores


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = []
    for number, job in enumerate(json.load(sys.stdin)):
        torch.manual_seed(1000 + number)
        try:
            results.append({"scores": probe_scores(load_reward_model(job["path"]), job["ids"])})
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(results))
