"""Our speed and memory next to a peer's, measured side by side: `python -m benchmarks.lm`."""
