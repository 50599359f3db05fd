"""One training run: options, DeepSpeed configuration, model, training loop, run folder and metrics."""
