"""Running a checkpoint: its description, the decoder, text, perplexity and generation."""
