"""What happens after an exception inside a step: no hang, no wrong token, the error is seen."""

from pathlib import Path

import pytest
from worlds import SCRIPTS, run_world


def test_one_rank_can_close_and_build_another(checkpoint_dirs: dict[str, Path]) -> None:
    script = SCRIPTS / "broken_step.py"
    result = run_world(script, checkpoint_dirs["llama"], "caught", ranks=1, torchrun=False, timeout=60)
    assert result.returncode == 0, result.report()
    assert "went on with another engine" in result.stdout


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_error_ends_the_script_and_every_rank(checkpoint_dirs: dict[str, Path], ranks: int) -> None:
    """The other rank waits in a collective of the step that broke; the script must end all the same."""
    script = SCRIPTS / "broken_step.py"
    result = run_world(script, checkpoint_dirs["llama"], "raised", ranks=ranks, timeout=60)
    assert result.returncode != 0, result.report()
    assert "RuntimeError: no memory" in result.rank_stderr, result.report()
    assert result.seconds < 40
