"""What each task adds to the training loop: samples, losses and an evaluator."""
