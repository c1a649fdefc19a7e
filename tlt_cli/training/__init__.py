"""Training: what moves weights by gradient, and the models it starts from."""
