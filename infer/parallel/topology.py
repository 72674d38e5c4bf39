"""Which rank does what: rank <-> (dp, pp, tp). Pure arithmetic, no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Ranks in the order rank = (dp * pp_size + pp) * tp_size + tp, so that tensor-parallel neighbours share a node."""

    tp_size: int = 1
    pp_size: int = 1

    @classmethod
    def resolve(
        cls, world_size: int, tp_size: int | None, pp_size: int, program: str = "-m infer.serve ..."
    ) -> "Topology":
        """Checks the sizes against torchrun's world. tp_size None is world / pp.

        program: what follows `python` or torchrun's options on the command line. Raises ValueError with a line that
        would work.
        """
        if tp_size is None:
            if world_size % pp_size:
                raise ValueError(
                    f"{world_size} ranks cannot form {pp_size} pipeline stages of equal size; start a multiple of "
                    f"{pp_size} ranks: {_launch(pp_size)} {program}"
                )
            tp_size = world_size // pp_size
        needed = tp_size * pp_size
        if needed != world_size:
            raise ValueError(
                f"tensor_parallel_size {tp_size} x pipeline_parallel_size {pp_size} needs {needed} "
                f"rank{'s' if needed > 1 else ''}, but {world_size} {'is' if world_size == 1 else 'are'} running; "
                f"this works: {_launch(needed)} {program}"
            )
        return cls(tp_size, pp_size)

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def coordinates(self, rank: int) -> tuple[int, int]:
        """(pp, tp) of a rank."""
        return rank // self.tp_size, rank % self.tp_size

    def rank(self, pp: int, tp: int) -> int:
        return pp * self.tp_size + tp

    def tp_ranks(self, pp: int) -> list[int]:
        """The ranks that share stage pp."""
        return [self.rank(pp, tp) for tp in range(self.tp_size)]

    @property
    def sampler_rank(self) -> int:
        """The rank that draws tokens: tensor-parallel rank 0 of the last stage."""
        return self.rank(self.pp_size - 1, 0)


def _launch(num_ranks: int) -> str:
    torchrun = f"torchrun --nproc-per-node {num_ranks} --master-port 29500 --max-restarts 10"
    return "python" if num_ranks == 1 else torchrun
