"""The stages of `trl-ext demo`: a task with an exact verifier, a tiny model, a mediocre policy, and reward models.

The demo downloads nothing and sends nothing. The command imports this package; benches and examples use the tiny
model of [`trl_ext.demo.model`].
"""
