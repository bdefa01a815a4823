"""Keeps results on disk, decides whether they are still valid, and runs stages. No other package does either.

A stored result has a *manifest*: a dictionary of JSON values with everything that the result depends on. The hash of
the manifest is the *cache key*. If the manifest changes, a pipeline either computes a new result beside the old one or
raises [`~trl_ext.pipelines.stages.cache_key.StaleError`], which names each change with its old and new value.

**Build the manifest** from

| part | function |
|---|---|
| arguments of a trainer | `training_arguments.arguments_key(args, overrides, irrelevant={name: reason})` |
| a function of the user | `values.callable_key(function)` |
| a reward function | `reward_functions.reward_identity(spec)` |
| configs, dtypes, sets, paths | `values.plain(value)` |
| a model | `trl_ext.models.fingerprint.model_identity(path)` |

An argument counts unless `training_arguments.IRRELEVANT`, or the pipeline's table, lists it with a reason.

**Keep the result** in

| result | where |
|---|---|
| shards of records, filled by several processes | `store.ShardStore(root, manifest, sizes)` |
| records that come one by one in any order, each with a key | `record_log.RecordLog(root, manifest)` |
| one JSONL file, a row for each row of the input | `row_file.RowFile(path, manifest, added=columns)` |
| a folder for each stage of a graph | `cached_stages.run_stages(stages, output_dir)` |
| anything else | `store.check_manifest(path, manifest, where, fix)` beside it |

**Run a stage** with `runner.run_job(name, job, isolate="auto" | "always" | "never")`: in this process, or in a
separate one that frees all its memory when it ends. `run_stages(..., runner=OwnProcesses(count))` runs several side by
side. A job raises the same errors in both places; `StageError` means that the stage itself could not run.
`one_process.check_one_process(name)` refuses a launcher of several processes where one process writes the results.
"""
