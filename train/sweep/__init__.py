"""Many runs: the plan of a comparison, its launch and its execution."""
