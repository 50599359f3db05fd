"""One training run: settings, DeepSpeed configuration, model, training loop, folder and metrics."""
