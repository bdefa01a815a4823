"""Trainers of ensembles: many reward models on one base in one run."""
