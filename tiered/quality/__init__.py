"""What a setting, a format or a cut costs in quality: perplexity, divergence, routing, tasks."""
