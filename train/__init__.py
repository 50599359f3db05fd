"""The pretraining harness: one run (pretrain), many runs (compare) and their results (report)."""
