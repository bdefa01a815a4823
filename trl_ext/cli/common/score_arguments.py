"""The arguments of `trl-ext score` and their checks."""

import json
from dataclasses import dataclass, field

from trl_ext.cli.common.generation import json_object
from trl_ext.pipelines.stages.parts import Part


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
            "help": "JSONL file to write: the same rows in the same order, with their scores. If the file exists, "
            "scoring continues after its last row. - for standard output"
        }
    )
    shard: str | None = field(
        default=None,
        metadata={
            "help": "i/n: score the i-th of n parts of the rows, for n machines with outputs of their own; "
            "--shards_from merges them"
        },
    )
    shards_from: list[str] | None = field(
        default=None,
        metadata={
            "help": "the output of every part: check that none is missing and that all were made with these "
            "arguments, and write their rows in the order of the input. Nothing is scored"
        },
    )
    batch_size: str = field(
        default="auto", metadata={"help": "rows in a batch, or auto: as many as a token budget allows"}
    )
    max_length: int | None = field(default=None, metadata={"help": "cut rows to this many tokens (default: no limit)"})
    aggregation: str | None = field(
        default=None,
        metadata={
            "help": "how a token-level model turns its outputs into one score: min, prod, last, mean, sum ...; for a "
            """segment model also weights of its categories as JSON: '{"factuality": 0.5, "relevance": 0.3}'"""
        },
    )
    reduce: str | None = field(
        default=None,
        metadata={
            "help": "how to combine the members' scores: mean, min, median, mean_minus_std, or a plugin (default: the "
            "ensemble's saved setting)"
        },
    )
    reduce_kwargs: dict | str | None = field(
        default=None, metadata={"help": """options of the reducer, as JSON: '{"coefficient": 0.5}'"""}
    )
    member_scores: bool = field(
        default=False,
        metadata={"help": "for an ensemble, also write each member's score and their standard deviation"},
    )
    uncertainty: bool = field(
        default=False,
        metadata={"help": "also write the standard deviation of each score, from the model's stored uncertainty"},
    )
    fit_uncertainty: str | None = field(
        default=None,
        metadata={
            "help": "first fit that uncertainty on the rows of training (file, folder or Hub id; split train), and "
            "store it with the model"
        },
    )
    dataset_format: str | None = field(
        default=None,
        metadata={
            "help": "the rows are a public data set as released, e.g. rewardbench or hh_rlhf: convert them. The "
            "output then has the converted rows"
        },
    )
    prompt_column: str = field(default="prompt", metadata={"help": "text or messages; may be missing from a row"})
    completion_column: str = field(
        default="completion", metadata={"help": "text or messages, or a list of several texts or of several dialogues"}
    )
    steps_column: str | None = field(
        default=None,
        metadata={
            "help": "for a process model: the column with the list of a completion's steps. `completions` with "
            "`labels` are steps too, unless --completion_column names them"
        },
    )
    base_model: str | None = field(
        default=None, metadata={"help": "folder or Hub id of an adapter's base, if it has moved"}
    )
    device: str | None = field(
        default=None, metadata={"help": "e.g. cpu or cuda:1 (default: the GPU if there is one)"}
    )

    def __post_init__(self):
        if self.dataset_format is not None:
            from trl_ext.data.recipes import find_recipe

            find_recipe(self.dataset_format)
        if self.batch_size != "auto":
            if not str(self.batch_size).isdecimal() or int(self.batch_size) < 1:
                raise ValueError(f"--batch_size is {self.batch_size!r}; needed: auto, or a number of rows >= 1.")
            self.batch_size = int(self.batch_size)
        self.uncertainty = self.uncertainty or self.fit_uncertainty is not None
        Part.parse(self.shard)
        if self.shard is not None and self.shards_from:
            raise ValueError(f"--shard {self.shard} makes one part, and --shards_from needs all. Leave out --shard.")
        if "-" in (self.input, self.output) and (self.shards_from or (self.shard is not None and self.input == "-")):
            raise ValueError("--shard needs a file as --input, and --shards_from files as --input and --output.")
        self.reduce_kwargs = json_object("reduce_kwargs", self.reduce_kwargs)
        if self.reduce_kwargs and self.reduce is None:
            raise ValueError("--reduce_kwargs needs a reducer. Name one with --reduce.")
        if isinstance(self.aggregation, str) and self.aggregation.lstrip().startswith("{"):
            try:
                self.aggregation = json.loads(self.aggregation)
            except ValueError as error:
                raise ValueError(
                    f"--aggregation is {self.aggregation!r}, which is not valid JSON ({error}). Needed: the name of "
                    "an aggregator, or a JSON object with a weight for each category."
                ) from error
