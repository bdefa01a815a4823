"""What `trl-ext demo` does: a task with an exact verifier, a tiny model, a mediocre policy, and stages that use them.

Nothing is downloaded or sent. Only the command imports this; benches and examples borrow the tiny model of
[`trl_ext.demo.model`].
"""
