"""Many runs: plan, launch and execute a comparison."""
