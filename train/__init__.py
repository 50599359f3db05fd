"""The pretraining harness: one run (pretrain), many runs (compare), and what came out (report)."""
