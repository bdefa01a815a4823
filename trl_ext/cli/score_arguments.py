"""The arguments of `trl-ext score` and their checks."""

import json
from dataclasses import dataclass, field

from trl_ext.cli._generation import json_object


@dataclass
class ScoreArguments:
    """Arguments of `trl-ext score`."""

    model: str = field(
        metadata={
            "help": "folder or Hub id of the reward model (full or adapter) or ensemble; URL#FOLDER for one on a "
            "vLLM server"
        }
    )
    input: str = field(metadata={"help": "JSONL file of rows; - for standard input"})
    output: str = field(
        metadata={
            "help": "JSONL file to write: the same rows in the same order, with their scores. If it is there already, "
            "scoring goes on after its last row. - for standard output"
        }
    )
    batch_size: str = field(default="auto", metadata={"help": "rows of a batch, or auto: by tokens"})
    max_length: int | None = field(default=None, metadata={"help": "cut rows to so many tokens (default: no limit)"})
    aggregation: str | None = field(
        default=None,
        metadata={
            "help": "how a token-level model gives one number a completion: min, prod, last, mean, sum ...; or, of a "
            """segment model, weights of the categories as JSON: '{"factuality": 0.5, "relevance": 0.3}'"""
        },
    )
    reduce: str | None = field(
        default=None,
        metadata={
            "help": "how the members of an ensemble become one score: mean, min, median, mean_minus_std, or a plugin; "
            "by default as the ensemble was saved"
        },
    )
    reduce_kwargs: dict | str | None = field(
        default=None, metadata={"help": """options of the reducer, as JSON: '{"coefficient": 0.5}'"""}
    )
    member_scores: bool = field(
        default=False,
        metadata={"help": "of an ensemble, also write the score by each member and their standard deviation"},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "text or messages; may be missing from a row"})
    completion_column: str = field(
        default="completion", metadata={"help": "text or messages, or a list of several texts or of several dialogues"}
    )
    steps_column: str | None = field(
        default=None,
        metadata={
            "help": "for a process model: list of the steps of one completion. `completions` beside `labels` are "
            "steps unless --completion_column names them"
        },
    )
    base_model: str | None = field(
        default=None, metadata={"help": "of an adapter: where its base is now, if it moved (folder or Hub id)"}
    )
    device: str | None = field(
        default=None, metadata={"help": "e.g. cpu or cuda:1 (default: the GPU if there is one)"}
    )

    def __post_init__(self):
        if self.batch_size != "auto":
            if not str(self.batch_size).isdecimal() or int(self.batch_size) < 1:
                raise ValueError(f"--batch_size is {self.batch_size!r}; needed: auto, or a number of rows >= 1.")
            self.batch_size = int(self.batch_size)
        self.reduce_kwargs = json_object("reduce_kwargs", self.reduce_kwargs)
        if self.reduce_kwargs and self.reduce is None:
            raise ValueError("--reduce_kwargs are the options of a reducer: name it with --reduce.")
        if isinstance(self.aggregation, str) and self.aggregation.lstrip().startswith("{"):
            try:
                self.aggregation = json.loads(self.aggregation)
            except ValueError as error:
                raise ValueError(
                    f"--aggregation is {self.aggregation!r}, which is not JSON ({error}). Needed: the name of an "
                    "aggregator, or a weight for each category."
                ) from error
