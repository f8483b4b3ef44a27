"""A teacher's checkpoints as one object:

names, manifest, and the stream that has the next teacher ready before its stage.
"""
