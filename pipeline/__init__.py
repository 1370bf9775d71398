"""Pretraining, evaluation and reports: recipes, sample order, loader, engine, trainer, checkpoints."""
