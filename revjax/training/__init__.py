"""What train.py calls: the pieces of a training run, one idea a file."""
