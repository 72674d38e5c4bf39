"""An exception inside a step of rank 0, as a lack of memory would be. Arguments: model directory, "caught" or not."""

import sys

from infer import LLM, SamplingParams


def main() -> None:
    model, caught = sys.argv[1], sys.argv[2] == "caught"
    prompt, params = [5, 6, 7], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm = LLM(model=model, dtype="float32", num_gpu_blocks_override=64, max_model_len=128, num_threads=1)
    before = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    llm.engine.built.runner._forward = fail
    if not caught:
        with llm:
            llm.generate(prompt, params, use_tqdm=False)
    for expected in ("no memory", "the engine stopped earlier"):
        try:
            llm.generate(prompt, params, use_tqdm=False)
        except RuntimeError as error:
            assert expected in str(error), error
        else:
            raise AssertionError("a broken engine went on")
    llm.close()
    with LLM(model=model, dtype="float32", num_gpu_blocks_override=64, max_model_len=128, num_threads=1) as another:
        assert another.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids == before
    print("went on with another engine")


def fail(*_: object) -> None:
    raise RuntimeError("no memory")


if __name__ == "__main__":
    main()
