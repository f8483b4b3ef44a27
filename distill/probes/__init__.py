"""What every checkpoint of a trajectory knows: its use of n-grams, its quality as an estimate of probabilities, its grammar."""
