"""A teacher's checkpoints as one object: names, manifest, and the stream that reads the next one ahead."""
