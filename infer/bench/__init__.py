"""python -m infer.bench: how fast this machine, or an endpoint, runs a model. `__main__` has the commands."""
