"""Every family against transformers in float32: whole and chunked prefill, 64 decoded tokens, several layouts.

`make test-models` runs all layouts, `make test` those of family_jobs.layouts().
"""

from types import SimpleNamespace

import family_jobs
import numpy as np
import pytest
import torch
from checkpoints import RECIPES, Reference
from family_jobs import GREEDY, NUM_TOKENS, PROMPTS
from parity import NEAR_TIE, check_completion
from worlds import run_jobs

from infer.config import EngineConfig
from infer.layers.declare import declared
from infer.models.config import load_model_config
from infer.models.decoder import Stage
from infer.weights import Checkpoint, check_weights, names_of

MAX_NEAR_TIES = 3  # over the 256 tokens of a family
CASES = [(tp, pp, family) for tp, pp in family_jobs.layouts() for family in family_jobs.families(tp)]


@pytest.fixture(scope="module")
def paths(checkpoint_dirs):
    """name -> checkpoint, of every family."""
    return {name: checkpoint_dirs[name] for name in RECIPES}


@pytest.fixture(scope="module")
def results(paths, tmp_path_factory):
    """(tp, pp) -> the results of all families in one world, which runs once."""
    found = {}

    def run(tp, pp):
        if (tp, pp) not in found:
            jobs = [family_jobs.family_job(name, paths[name], tp, pp) for name in family_jobs.families(tp)]
            root = tmp_path_factory.mktemp(f"families-tp{tp}-pp{pp}")
            try:
                found[tp, pp] = run_jobs(jobs, root, ranks=tp * pp, timeout=420, torchrun=tp * pp > 1)
            except Exception as error:
                found[tp, pp] = error  # the world is not run again for each test
        if isinstance(found[tp, pp], Exception):
            raise found[tp, pp]
        return found[tp, pp]

    return run


@pytest.fixture(scope="module")
def score(paths):
    """(family, prompt, its continuation) -> the reference's view; equal ones of several layouts are computed once."""
    references, scored = {}, {}

    def of(name, prompt, token_ids):
        key = name, tuple(prompt), tuple(token_ids)
        if key not in scored:
            reference = references.setdefault(name, Reference(paths[name]))
            scored[key] = reference.score(prompt, token_ids)
        return scored[key]

    return of


@pytest.mark.parametrize(("tp", "pp", "family"), CASES, ids=[f"{tp}x{pp}-{family}" for tp, pp, family in CASES])
def test_greedy_equals_transformers(tp, pp, family, results, score, record_property):
    """Each token is the reference's first choice after those before it, so all of them are its greedy continuation."""
    near_ties = 0
    margins = []
    for prompt, completion in zip(PROMPTS, results(tp, pp)[family].runs["greedy"], strict=True):
        (choice,) = completion.choices
        assert len(choice.token_ids) == NUM_TOKENS and choice.finish_reason == "length"
        sequence = score(family, prompt, choice.token_ids)
        near_ties += check_completion(completion, sequence, GREEDY.logprobs, GREEDY.prompt_logprobs)
        margins.append(np.diff(np.partition(sequence.rows(), -2, axis=-1)[:, -2:], axis=-1))
    record_property("near_ties", near_ties)
    assert near_ties <= MAX_NEAR_TIES
    # Were most margins near ties, the comparison would prove little.
    assert np.mean(np.concatenate(margins) < 100 * NEAR_TIE) < 0.1


@pytest.mark.parametrize("family", RECIPES)
def test_every_tensor_of_a_checkpoint_is_read(family, paths):
    """What a model has and nobody declares would be left out of the computation in silence."""
    c = load_model_config(paths[family], EngineConfig(model=str(paths[family])))
    stage = Stage(
        c, range(c.num_layers), SimpleNamespace(index=0, size=1), is_first=True, is_last=True, dtype=torch.float32,
        device=torch.device("meta"),
    )  # fmt: skip
    checkpoint = Checkpoint(paths[family])
    check_weights(stage, checkpoint)
    names = {name for _, spec in declared(stage) for source in spec.sources for name in names_of(source.name)}
    assert checkpoint.names <= names
