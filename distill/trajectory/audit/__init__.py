"""Whether each checkpoint of a trajectory is what its name says, told from a few bytes of it."""
