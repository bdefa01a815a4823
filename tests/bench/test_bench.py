"""`trl-ext bench`: runs, writes its report, and compares like with like."""

import importlib.util
import json
import random

import pytest

from tests.tiny import pair_rows, ranked_rows
from trl_ext.bench import ensemble as bench_ensemble
from trl_ext.bench import runner, synthetic
from trl_ext.bench import score as bench_score
from trl_ext.bench.padded import interval_of_turns
from trl_ext.cli import bench
from trl_ext.cli.main import main


TINY = ["--hidden_size", "32", "--num_layers", "1", "--num_heads", "2", "--repeats", "2"]
STEPS = ["--batch_size", "2", "--steps", "2"]
SLOW = sorted(bench_ensemble.KINDS.keys() - {"prm"})
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def run(tmp_path, command, *arguments):
    assert main(["bench", command, *TINY, *arguments, "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "bench.png").is_file() == HAS_MATPLOTLIB
    return json.loads((tmp_path / "bench.json").read_text())


def test_reward_measures_both_sides_of_each_shape(tmp_path, capsys):
    report = run(tmp_path, "reward", *STEPS, "--repeats", "1", "--shapes", "24,8,2", "12,5,4", "0,9,2")
    printed = capsys.readouterr().out
    pairs, rankings, apart = report["cases"]
    assert pairs["baseline"] == apart["baseline"] == "trl.RewardTrainer"
    assert rankings["baseline"].startswith("padded rows") and "shared_prefix=False" in rankings["baseline"]
    # the tokens that went through the models are those of the formula
    assert pairs["token_bound"] == pytest.approx(pairs["formula"]) == 2 * 32 / 40
    assert rankings["token_bound"] == pytest.approx(rankings["formula"]) == 4 * 17 / 32
    assert apart["token_bound"] == apart["formula"] == 1.0
    assert pairs["sides"]["padded"]["model_tokens"] == 2 * 64 and pairs["sides"]["trl_ext"]["model_tokens"] == 2 * 40
    assert [case["sides"]["trl_ext"]["flat_batches"] for case in report["cases"]] == [1.0, 1.0, 0.0]
    for case in report["cases"]:
        ours, padded = case["sides"]["trl_ext"], case["sides"]["padded"]
        assert case["losses_compared"] == 3 and case["loss_max_difference"] < 1e-5
        turns = case["speedup_of_turns"]
        assert len(turns["wall"]) == len(turns["cpu"]) == 1 and min(turns["wall"] + turns["cpu"]) > 0
        assert (case["speedup"], case["cpu_speedup"]) == (turns["wall"][0], turns["cpu"][0])
        assert case["fraction_of_bound"] == pytest.approx(case["cpu_speedup"] / case["token_bound"])
        assert all(side["seconds_per_step"] > 0 and side["tokens_per_second"] > 0 for side in (ours, padded))
        assert case["name"] in printed
    assert report["dtype"] in printed and report["attention"] in printed


@pytest.mark.parametrize(
    "rows,baseline",
    [(pair_rows(12), "trl"), pytest.param(ranked_rows(12, k=3, ragged=True), "padded", marks=pytest.mark.slow)],
)
def test_reward_takes_the_lengths_of_a_data_set(rows, baseline, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--shapes", "--dataset_name", str(file), "--lora_r", "0", "--profile"]
    (case,) = run(tmp_path, "reward", *STEPS, *flags)["cases"]
    turns = case["speedup_of_turns"]
    assert len(turns["wall"]) == 2 and case["speedup"] == pytest.approx(sum(turns["wall"]) / 2)  # the median of two
    assert case["cpu_speedup"] == pytest.approx(sum(turns["cpu"]) / 2)
    for operators in case["profile"].values():
        assert sum(operator["share"] for operator in operators) == pytest.approx(1.0)
        assert any(operator["name"] == "aten::mm" and operator["calls"] > 5 for operator in operators)
    assert case["name"] == "rows.jsonl" and case["baseline"].startswith(baseline) and case["formula"] is None
    assert case["token_bound"] > 1.05 and case["loss_max_difference"] < 1e-5
    with pytest.raises(SystemExit):  # 12 rows are not enough
        main(["bench", "reward", *TINY, "--shapes", "--batch_size", "9", "--dataset_name", str(file)])


def test_dpo_measures_both_sides_of_each_shape(tmp_path, capsys):
    report = run(
        tmp_path, "dpo", "--batch_size", "2", "--steps", "1", "--repeats", "1", "--shapes", "24,8,2", "12,5,4"
    )
    pairs, rankings = report["cases"]
    assert pairs["baseline"] == "trl.DPOTrainer" and rankings["baseline"].startswith("padded rows")
    # with an EOS for each completion, and the prompt's last token before each further one
    assert pairs["token_bound"] == pytest.approx(2 * 33 / (24 + 2 * 9 + 1))
    assert rankings["token_bound"] == pytest.approx(4 * 18 / (12 + 4 * 6 + 3))
    printed = capsys.readouterr().out
    for case in report["cases"]:
        assert case["sides"]["trl_ext"]["flat_batches"] == 1.0 and case["loss_max_difference"] < 1e-5
        assert case["losses_compared"] == 2 and case["name"] in printed


def test_token_measures_flat_beside_padded_rows(tmp_path, capsys):
    report = run(tmp_path, "token", "--steps", "2", "--repeats", "1", "--shapes", "24,8,4", "9,5,2")
    printed = capsys.readouterr().out
    assert all(case["name"] in printed for case in report["cases"])
    assert [case["rows_per_batch"] for case in report["cases"]] == [8, 4]
    for case, (p, c, k) in zip(report["cases"], ((24, 8, 4), (9, 5, 2)), strict=True):
        padded, flat = case["sides"]["padded"], case["sides"]["flat"]
        assert padded["model_tokens"] == 2 * k * (p + c) and flat["model_tokens"] == 2 * (p + k * c)
        assert case["token_bound"] == pytest.approx(k * (p + c) / (p + k * c))
        assert case["losses_compared"] == 3 and case["loss_max_difference"] < 1e-5
        assert case["cpu_speedup"] == pytest.approx(padded["cpu_seconds_per_step"] / flat["cpu_seconds_per_step"])
    with pytest.raises(SystemExit):
        main(["bench", "token", *TINY, "--shapes", "24,1,4"])


def test_score_measures_four_sides(tmp_path, capsys):
    size = ["--num_prompts", "2", "--num_completions", "4", "--prompt_length", "20", "--completion_length", "6"]
    report = run(tmp_path, "score", *size)
    assert list(report["sides"]) == ["given_order", "sorted", "shared", "tokens"]
    assert report["rows"] == 8
    for name, side in report["sides"].items():
        assert side["score_max_difference"] < 1e-5
        assert report["speedup"][name] == pytest.approx(side["seconds"] / report["sides"]["shared"]["seconds"])
    # (8 * 20 + C) / (2 * 20 + C), with C from 8 * 3 to 8 * 6 completion tokens
    assert (160 + 48) / (40 + 48) <= report["token_bound"] <= (160 + 24) / (40 + 24)
    assert report["token_cost"] == pytest.approx(
        report["sides"]["tokens"]["cpu_seconds"] / report["sides"]["sorted"]["cpu_seconds"]
    )
    printed = capsys.readouterr().out
    assert "shared prompts" in printed and f"{report['token_cost']:.2f} times the CPU time" in printed


def test_evaluate_measures_the_scorer_beside_the_evaluation(tmp_path, capsys):
    size = ["--num_rows", "24", "--prompt_length", "20", "--completion_length", "6", "--resamples", "20"]
    report = run(tmp_path, "evaluate", *size, "--memory_rows", "20", "40")
    assert list(report["sides"]) == ["forward", "evaluate"] and report["rows"] == 24
    assert list(report["without_model"]) == ["20", "40"]
    assert all(side["seconds"] > 0 for side in [*report["sides"].values(), *report["without_model"].values()])
    # the model sees each prompt once, and pads less than a second copy of the prompts would take
    assert report["tokens_twice"] - report["tokens_once"] == 24 * 20
    assert report["tokens_once"] <= report["model_tokens"] < report["tokens_twice"]
    printed = capsys.readouterr().out
    assert f"{report['cpu_overhead']:+.1%}" in printed and "40 pairs, no model" in printed
    with pytest.raises(SystemExit):
        main(["bench", "evaluate", *TINY, "--memory_rows", "2", "40"])


def test_data_measures_both_preparations_on_equal_ids(tmp_path, capsys):
    size = ["--num_pairs", "30", "--prompt_words", "8", "--completion_words", "6", "--repeats", "1", "--large", "40"]
    assert main(["bench", "data", *size, "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [case["name"] for case in report["cases"]] == ["text", "chat"]
    for case in report["cases"]:
        theirs, ours = case["sides"]["trl"], case["sides"]["trl_ext"]
        assert case["same_ids"] and case["pairs"] == 30 and case["tokens"] > 2 * 30 * 7
        assert case["cpu_ratio"] == pytest.approx(ours["cpu_seconds"] / theirs["cpu_seconds"])
    large = report["large"]
    assert large["pairs"] == 40 and large["cpu_seconds"] > 0 and large["own_memory_mib"] >= 0
    printed = capsys.readouterr().out
    assert "token ids of both sides: equal" in printed and "40 short pairs" in printed
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}", "source": "me"} for n in range(9)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--dataset_file", str(file), "--num_pairs", "8", "--repeats", "1"]
    assert main(["bench", "data", *arguments, "--output_dir", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert case["name"] == "sums" and case["pairs"] == 8 and case["same_ids"]


def test_serving_measures_our_part_of_a_request(tmp_path, capsys):
    size = ["--rows", "4", "--requests", "3", "--prompt_words", "6", "--completion_words", "4", "--repeats", "1"]
    assert main(["bench", "serving", *size, "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    ids, requests, both = (report["sides"][name]["cpu_seconds"] for name in ("ids", "requests", "all"))
    assert min(ids, requests) > 0 and report["cpu_milliseconds"] == pytest.approx(both / 3 * 1000)
    assert report["five_percent_from"] == pytest.approx(both / 3 * 20) and "share" not in report
    assert 4 * (3 + 2) <= report["tokens"] <= 4 * 8 * 11
    assert "A request has 4 texts" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "serving", "--url", "http://localhost:1", "--output_dir", str(tmp_path)])
    assert "give --model too" in capsys.readouterr().err


def test_generate_measures_a_plain_loop_beside_ours(tmp_path, capsys):
    size = ["--num_prompts", "3", "--num_generations", "2", "--prompt_length", "9", "--completion_length", "4"]
    report = run(tmp_path, "generate", *size, "--batch_size", "4")
    assert list(report["sides"]) == ["plain", "backend", "stored"] and report["completions"] == 6
    for name, side in report["sides"].items():
        assert report["ratio"][name] == pytest.approx(side["seconds"] / report["sides"]["plain"]["seconds"])
        assert side["tokens_per_second"] == pytest.approx(6 * 4 / side["seconds"])
    assert "plain generate loop" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "generate", *TINY, "--batch_size", "3", "--num_generations", "2"])


@pytest.mark.parametrize("kind", ["prm", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_ensemble_measures_members_beside_single_runs(kind, tmp_path, capsys):
    sizes = ["--members", "3", "--num_layers", "2", "--branch_at", "0.5", "--shapes", "4,5,2,2", "--lora_r", "2"]
    report = run(tmp_path, "ensemble", "--kind", kind, *sizes, "--steps", "1", "--repeats", "1")
    printed = capsys.readouterr().out
    (case,) = report["cases"]
    assert case["tokens"] == 2 * 2 * 9
    training, scoring = case["training"], case["scoring"]
    assert list(training["sides"]) == list(bench_ensemble.SIDES) and "stacked_own" not in scoring["sides"]
    for part in (training, scoring):
        one, many = (part["sides"][name]["cpu_seconds"] for name in ("one_full", "stacked_branched"))
        assert part["ratios"]["branched / one full"] == pytest.approx(many / one)
        assert part["ratios"]["branched / M separate full"] == pytest.approx(many / one / 3)
        assert all(side["seconds"] > 0 for side in part["sides"].values())
    assert "3 members, branched" in printed and "own batches / M separate branched" in printed
    assert f"Members of kind {kind}" in printed
    assert training["losses_compared"] == 3 * 2 and training["loss_max_difference"] < 1e-5


@pytest.mark.parametrize(("kind", "labelled"), [("orm", 7), ("prm", 1), ("segment", 1)])
def test_labelled_rows_have_the_lengths_that_were_asked_for(kind, labelled, tmp_path):
    from trl_ext.data.spans import prepare_spans
    from trl_ext.data.tokenization import TokenizationSettings

    tokenizer = synthetic.words_tokenizer()
    rows = synthetic.labelled_rows(kind, 2, p=5, c=7, k=3)
    kinds = {"orm": "outcome", "prm": "stepwise", "segment": "segment"}
    tokenization = (
        TokenizationSettings.for_training(tokenizer) if kind == "orm" else TokenizationSettings(append_eos=False)
    )
    ready, _ = prepare_spans(rows, tokenizer, kind=kinds[kind], tokenization=tokenization, max_length=None)
    assert len(ready) == 6
    for row in ready:
        assert len(row["span_input_ids"]) == 12 and row["completion_start"] == 5
        assert tokenizer.unk_token_id not in row["span_input_ids"] and len(row["label_positions"]) == labelled
    longer = synthetic.labelled_rows(kind, 1, p=0, c=2 * synthetic.SPAN + 1, k=1)
    (row,) = prepare_spans(longer, tokenizer, kind=kinds[kind], tokenization=tokenization, max_length=None)[0]
    assert len(row["span_input_ids"]) == 33 and len(row["label_positions"]) == (33 if kind == "orm" else 3)


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    assert runner.plot_bars(tmp_path / "a.png", ["a"], {"b": [1.0]}, "y", "t") is False
    assert not list(tmp_path.iterdir())


def test_groups_share_their_prompt_and_nothing_else():
    rows = synthetic.synthetic_groups(6, prompt=5, completion=4, candidates=3)
    assert len(rows) == 6
    for row in rows:
        assert {tuple(ids[:5]) for ids in row["candidate_ids"]} == {tuple(row["candidate_ids"][0][:5])}
        assert len({ids[5] for ids in row["candidate_ids"]}) == 3
        assert {len(ids) for ids in row["candidate_ids"]} == {9}
        assert row["ratings"] == [3.0, 2.0, 1.0]
    assert list(rows) == list(synthetic.synthetic_groups(6, prompt=5, completion=4, candidates=3))


def test_the_tokenizer_of_a_data_set_is_lossless_and_shorter_than_bytes():
    from datasets import Dataset

    rows = Dataset.from_list(pair_rows(20, chat=True))
    tokenizer = synthetic.tokenizer_of(rows)
    text = random.Random(0).choice(rows["chosen"])[0]["content"] + " é"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) < len(text.encode()) / 2
    assert tokenizer.apply_chat_template(rows[0]["chosen"], tokenize=False).startswith("<bos>assistant")


def test_medians_are_taken_step_by_step():
    runs = [
        runner.Run(wall=[1.0, 5.0], cpu=[1.0, 2.0], peak=3.0),
        runner.Run(wall=[2.0, 4.0], cpu=[1.0, 2.0], peak=None),
        runner.Run(wall=[9.0, 3.0], cpu=[1.0, 2.0], peak=5.0),
    ]
    assert runner.medians(runs, 30.0, "_per_step") == {
        "seconds_per_step": 3.0,  # the medians are 2 and 4
        "cpu_seconds_per_step": 1.5,
        "tokens_per_second": 10.0,
        "peak_memory_mib": 4.0,
    }
    assert "tokens_per_second" not in runner.medians(runs)


def test_no_side_is_always_first():
    order = []
    sides = {name: lambda name=name: order.append(name) or runner.Run([1.0], [1.0]) for name in "ab"}
    assert {name: len(runs) for name, runs in runner.in_turns(sides, 3).items()} == {"a": 3, "b": 3}
    assert order == ["a", "b", "b", "a", "a", "b"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reward", "--shapes", "64,2"],
        ["reward", "--shapes", "4,0,2"],
        ["reward", "--warmup", "0"],
        ["ensemble", "--shapes", "4"],
        ["ensemble", "--kind", "orm", "--shapes", "0,1,2,2"],
        ["ensemble", "--kind", "step"],
        ["generate", "--num_generations", "0"],
        ["train"],
    ],
)
def test_wrong_arguments_end_in_a_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_an_option_that_leaves_nothing_to_do_is_named(tmp_path, monkeypatch, capsys):
    arguments = ["score", *TINY[:-2], "--repeats", "0", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "--repeats is 0; needed: 1 or more." in capsys.readouterr().err
    monkeypatch.setenv("TRL_EXT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--repeats is 0"):
        bench.main(arguments)


def test_the_report_is_kept_where_the_reader_is_gone(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(bench_score, "measure", lambda args: {"rows": args.num_prompts})
    monkeypatch.setattr(bench_score, "table", closed)
    with pytest.raises(BrokenPipeError):
        bench.main(["score", "--num_prompts", "3", "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "bench.json").read_text()) == {"bench": "score", "rows": 3}


def test_the_interval_of_turns():
    assert interval_of_turns([1.3]) is None
    low, high = interval_of_turns([1.0, 1.21])  # a factor of 1.1 to either side; Student's t of two turns is 12.706
    assert (low * high) ** 0.5 == pytest.approx(1.1) and high / 1.1 == pytest.approx(1.1**12.7062, rel=1e-3)
    low, high = interval_of_turns([1.5, 1.5, 1.5])
    assert low == pytest.approx(1.5) == high


def test_trunk_measures_training_with_kept_states(tmp_path, capsys):
    report = run(tmp_path, "trunk", *STEPS, "--num_layers", "4", "--shape", "12,4", "--repeats", "1")
    assert report["trained_layers"] == 1 and report["loss_max_difference"] < 1e-5
    assert all(side["cpu_seconds_per_step"] > 0 for side in report["sides"].values())
    assert report["saved"]["filled"]["of_plain_interval"] is None  # one turn says nothing of the spread
    assert "ours, later epochs" in capsys.readouterr().out
