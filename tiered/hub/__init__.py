"""Models of the Hugging Face hub: downloaded once, found, listed, removed."""
