"""A stand-in whose fork server is forked_rank.py: standing_in.py CODE."""

from pathlib import Path

from infer import launch, stand_in

stand_in.PROGRAM = (str(Path(__file__).with_name("forked_rank.py")),)  # type: ignore[assignment]
env = launch.RankEnv.from_environ()
launch.set_parent_death_signal(env)
try:
    stand_in.run_rank(env)
except ValueError as error:
    launch.fail(str(error), env)
