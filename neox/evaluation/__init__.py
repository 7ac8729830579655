"""Tasks of lm-evaluation-harness on our own model. The harness is imported only when tasks are run."""
