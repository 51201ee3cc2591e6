"""Fine-tuning image classifiers with cross entropy and MonoLoss [MonoLoss §4.2]."""
