"""Text in, what a model's matrices see and what the loss feels of them out: block by block."""
