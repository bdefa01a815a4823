"""What is kept on disk and when it is still valid; how stages run. The only place for either.

A result that is kept has a *manifest*: a dictionary of JSON values that names everything it depends on. Its hash is
the *cache key*. If the manifest changes, a pipeline either starts anew beside the old result or refuses with
[`~trl_ext.pipelines.stages.cache_key.StaleError`], which names each change with its old and new value.

**Build the manifest** from

| part | function |
|---|---|
| arguments of a trainer | `training_arguments.arguments_key(args, overrides, irrelevant={name: reason})` |
| a function of the user's | `values.callable_key(function)` |
| a reward function | `reward_functions.reward_identity(spec)` |
| configs, dtypes, sets, paths | `values.plain(value)` |
| a model | `trl_ext.models.fingerprint.model_identity(path)` |

An argument counts unless `training_arguments.IRRELEVANT`, or the pipeline's own table, names it with a reason.

**Keep the result** in

| what it is | where |
|---|---|
| shards of records, filled by several processes | `store.ShardStore(root, manifest, sizes)` |
| one JSONL file, a row for each row of the input | `row_file.RowFile(path, manifest, added=columns)` |
| a folder for each stage of a graph | `cached_stages.run_stages(stages, output_dir)` |
| anything else | `store.check_manifest(path, manifest, where, fix)` beside it |

**Run a stage** with `runner.run_job(name, job, isolate="auto" | "always" | "never")`: in this process, or in one of
its own that gives all memory back. Several side by side: `run_stages(..., runner=OwnProcesses(count))`. In both
processes a job raises the same errors; `StageError` means that the stage itself could not run.
"""
