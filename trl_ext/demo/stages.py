"""The stages of the demo are those of `trl_ext.pipelines.cached_stages`."""

from trl_ext.pipelines.cached_stages import (
    RECORD,
    Outcome,
    Stage,
    StageContext,
    StageError,
    find_done,
    run_stages,
    stage_keys,
)


__all__ = ["RECORD", "Outcome", "Stage", "StageContext", "StageError", "find_done", "run_stages", "stage_keys"]
