"""One loop for every stage: state, step, loop, checkpoints and metrics."""
