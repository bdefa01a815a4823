"""`WeakToStrongTrainer`: supervised fine-tuning with a weak teacher."""
