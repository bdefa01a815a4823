"""Ensembles whose members share one base: stacked training, branching at a layer, files, and loading."""
