"""Where samples come from: random streams, rollouts, worker processes."""
