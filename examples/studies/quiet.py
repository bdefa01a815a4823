"""Arguments of the trainers in the studies: on the CPU, with nothing saved or reported."""

QUIET = dict(
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    dataloader_pin_memory=False,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
