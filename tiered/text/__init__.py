"""Text in and out: vocabularies, chat templates, sampling, stop strings."""
