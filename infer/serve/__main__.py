r"""python -m infer.serve: the OpenAI-compatible server. Every rank runs this; rank 0 decides.

    python -m infer.serve --model DIR
    torchrun --nnodes 1 --node-rank 0 --master-addr 127.0.0.1 --master-port 29500 --nproc-per-node 4 \
      --max-restarts 10 -m infer.serve --model DIR -tp 2 -pp 2
"""

from infer import launch, stand_in


def main() -> None:
    env = None
    try:
        env = launch.RankEnv.from_environ()
        launch.exit_if_failed_before(env)
        launch.set_parent_death_signal(env)
        if stand_in.stands_in(env):
            stand_in.run_rank(env)
    except ValueError as error:
        launch.fail(str(error), env)
    from infer.serve.server import run

    run(env)


if __name__ == "__main__":
    main()
