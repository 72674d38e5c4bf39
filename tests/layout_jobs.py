"""What every world of the layout tests does, one after the other, since starting a world costs more than the work."""

from pathlib import Path

from checkpoints import BOS, CORE, EOS, VOCAB_SIZE, make_prompts
from world_scripts.jobs import Job, Run, Workload

from infer.request import SamplingParams, StructuredOutputs

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3)]  # (tp, pp)
WORKLOAD_LAYOUTS = [(1, 1), (2, 2)]
MODELS = [*CORE, "smollm2"]
NUM_TOKENS = 24
NUM_REQUESTS, NUM_ABORTS = 300, 80
VARIANTS = {  # job -> engine arguments that must not change a token
    "no prefix cache": {"enable_prefix_caching": False},
    "chunked prefill": {"max_num_batched_tokens": 16},
    "few blocks": {"num_gpu_blocks_override": 24},
    "few blocks, no prefix cache": {"num_gpu_blocks_override": 24, "enable_prefix_caching": False},
}

GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3, prompt_logprobs=2)
TINY_PROMPTS = make_prompts(VOCAB_SIZE, (1, 5, 33, 70))
SMOLLM2_PROMPTS = [
    [504, 3575, 282, 4649, 314],  # The capital of France is
    # Once upon a time, in a village by the sea, there was a
    [6403, 1980, 253, 655, 28, 281, 253, 6560, 411, 260, 3426, 28, 665, 436, 253],
    # <|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n
    [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],
]

LETTERS = list("aeiou")
STOP_IDS = list(range(3, VOCAB_SIZE, 7))


SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 20, 300]}, "s": {"type": "string", "maxLength": 3}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
REGEX = r"[a-f]{3,9}-(x|yy|zzz)[0-9]"
BAD_WORDS = ["2", "33"]  # of the tokens 20, "2", and 21, "3"
MAX_TOKENS = 7  # of a case that says nothing else


def _case(**params: object) -> SamplingParams:
    defaults = {"max_tokens": MAX_TOKENS, "seed": 1, "ignore_eos": True}
    return SamplingParams(**{**defaults, **params})


# Every sampling parameter, by the name of what it tries. Prompts are assigned by place (`case_prompts`).
CASES: dict[str, SamplingParams] = {
    "greedy": _case(temperature=0.0),
    "temperature": _case(temperature=1.3),
    "low temperature": _case(temperature=0.2),
    "top_k": _case(top_k=5),
    "top_k over the prefix": _case(top_k=700),
    "top_p": _case(top_p=0.7),
    "min_p": _case(min_p=0.2),
    "top_k, top_p and min_p": _case(top_k=40, top_p=0.9, min_p=0.01, temperature=0.9),
    "seed": _case(seed=1),
    "seed again": _case(seed=1),
    "another seed": _case(seed=2),
    "smallest seed": _case(seed=-(2**63)),
    "largest seed": _case(seed=2**63 - 1),
    "presence_penalty": _case(temperature=0.0, presence_penalty=2.0, logit_bias={20: 14.0}),
    "frequency_penalty": _case(temperature=0.0, frequency_penalty=2.0, logit_bias={20: 14.0}),
    "negative frequency_penalty": _case(temperature=0.0, frequency_penalty=-2.0, max_tokens=16),
    "repetition_penalty": _case(temperature=0.0, repetition_penalty=1.9),
    "penalties at random": _case(presence_penalty=0.5, frequency_penalty=0.7, repetition_penalty=1.2),
    "logit_bias forces": _case(logit_bias={17: 100.0}),
    "logit_bias bans": _case(temperature=0.0, logit_bias=dict.fromkeys(range(900), -100.0)),
    "allowed_token_ids": _case(allowed_token_ids=[3, 200, 401, 602, 803, 1004, VOCAB_SIZE - 1]),
    "allowed_token_ids, greedy": _case(temperature=0.0, allowed_token_ids=[250, 500, 750]),
    "stop": _case(stop=LETTERS, max_tokens=40, allowed_token_ids=list(range(259, 900))),
    "stop included": _case(
        stop=LETTERS, max_tokens=40, allowed_token_ids=list(range(259, 900)), include_stop_str_in_output=True
    ),
    "stop after min_tokens": _case(
        stop=LETTERS, max_tokens=40, min_tokens=9, allowed_token_ids=list(range(259, 900))
    ),
    "stop_token_ids": _case(stop_token_ids=STOP_IDS, max_tokens=60),
    "stop_token_ids after min_tokens": _case(stop_token_ids=STOP_IDS, max_tokens=60, min_tokens=15),
    "end token": _case(ignore_eos=False, logit_bias={EOS: 100.0}),
    "end token after min_tokens": _case(ignore_eos=False, logit_bias={EOS: 100.0}, min_tokens=4),
    "ignore_eos": _case(ignore_eos=True, logit_bias={EOS: 100.0}),
    "special tokens shown": _case(logit_bias={EOS: 100.0}, max_tokens=3, skip_special_tokens=False),
    "no detokenize": _case(detokenize=False),
    "max_tokens": _case(max_tokens=1),
    "to the end of the model": _case(max_tokens=None, temperature=0.0),
    "n": _case(n=3),
    "n, greedy": _case(n=2, temperature=0.0),
    "logprobs": _case(logprobs=5, temperature=0.8),
    "logprobs of the drawn alone": _case(logprobs=0, top_p=0.9),
    "prompt_logprobs": _case(prompt_logprobs=4, logprobs=2, temperature=0.0),
    "json": _case(structured_outputs=StructuredOutputs(json=SCHEMA, disable_any_whitespace=True), max_tokens=36),
    "json, greedy": _case(temperature=0.0, structured_outputs=StructuredOutputs(json=SCHEMA), max_tokens=12),
    "regex": _case(structured_outputs=StructuredOutputs(regex=REGEX), max_tokens=30, n=2, top_p=0.9, ignore_eos=False),
    "choice": _case(structured_outputs=StructuredOutputs(choice=["Yes", "No", "Maybe"]), logprobs=2, top_k=50),
    "grammar": _case(
        structured_outputs=StructuredOutputs(grammar='start: "(" start ")" | "x"'), min_tokens=5, presence_penalty=0.5
    ),
    "bad_words": _case(temperature=0.0, logit_bias={20: 14.0, 21: 12.0}, bad_words=BAD_WORDS),
    "everything": _case(
        temperature=0.9, top_k=60, top_p=0.95, min_p=0.001, presence_penalty=0.3, frequency_penalty=0.2,
        repetition_penalty=1.1, logit_bias={30: 3.0, 31: -3.0}, min_tokens=3, stop=["zz"], stop_token_ids=[700],
        ignore_eos=False, n=2, logprobs=2, prompt_logprobs=1, seed=99,
    ),
}  # fmt: skip
MAX_MODEL_LEN = 96
SAME_PROMPT = (
    "seed",
    "seed again",
    "another seed",
    "temperature",
    "greedy",
    "stop",
    "stop included",
    "repetition_penalty",
)


def case_prompts() -> list[list[int]]:
    """A prompt for each case, of 1 to 60 tokens; those of SAME_PROMPT share one of two full blocks and more."""
    lengths = tuple(1 + (7 * i) % 60 for i in range(len(CASES)))
    prompts = make_prompts(VOCAB_SIZE, lengths)
    shared = [BOS, *make_prompts(VOCAB_SIZE, (37,))[0]]
    return [shared if name in SAME_PROMPT else prompt for name, prompt in zip(CASES, prompts, strict=True)]


# A model of which one token makes NaN: prompts that hold it in several places, and every way to draw.
POISON = 500
WAYS_TO_DRAW = [
    _case(temperature=0.0), _case(), _case(top_k=5), _case(top_p=0.7), _case(logprobs=2), _case(n=2, min_p=0.1),
    _case(temperature=0.0, logit_bias={17: 5.0}), _case(structured_outputs=StructuredOutputs(regex="[a-z]{40}")),
]  # fmt: skip
SOUND_PROMPTS = make_prompts(POISON, (40, 3, 17, 33, 20, 48, 9, 30))
POISONED_PROMPTS = [
    [*prompt[: 5 * i], POISON, *prompt[5 * i :]] for i, prompt in enumerate(SOUND_PROMPTS)
]  # some begin as a sound one does


def poison_runs() -> list[Run]:
    """Sound prompts; then poisoned ones among them, of which the last is there twice; then sound ones again."""
    before = Run(name="before", prompts=SOUND_PROMPTS, params=WAYS_TO_DRAW)
    pairs = [*zip(POISONED_PROMPTS, SOUND_PROMPTS, strict=True), (POISONED_PROMPTS[-1], POISONED_PROMPTS[0])]
    params = [*WAYS_TO_DRAW, WAYS_TO_DRAW[0]]
    both = [prompt for pair in pairs for prompt in pair]
    mixed = Run(name="mixed", prompts=both, params=[p for p in params for _ in pairs[0]])
    return [before, mixed, Run(name="after", prompts=SOUND_PROMPTS, params=WAYS_TO_DRAW)]


def jobs(tp: int, pp: int, model_dirs: dict[str, Path]) -> list[Job]:
    """All jobs of the world of tp x pp ranks."""
    common = {
        "dtype": "float32", "tensor_parallel_size": tp, "pipeline_parallel_size": pp, "max_model_len": MAX_MODEL_LEN,
        "num_gpu_blocks_override": 256, "disable_log_stats": True, "num_threads": 1,
    }  # fmt: skip
    found = []
    for name in MODELS:
        prompts = SMOLLM2_PROMPTS if name == "smollm2" else TINY_PROMPTS
        llm = {**common, "model": str(model_dirs[name])}
        found.append(
            Job(name=name, llm=llm, runs=[Run(name="greedy", prompts=prompts, params=[GREEDY] * len(prompts))])
        )
    prompts, params = case_prompts(), list(CASES.values())
    llama = {**common, "model": str(model_dirs["llama"])}
    alone = Run(name="alone", prompts=prompts, params=params, alone=True)
    mixed = Run(name="mixed", prompts=prompts, params=params)
    found.append(Job(name="sampling", llm=llama, runs=[alone, mixed]))
    found += [Job(name=name, llm={**llama, **change}, runs=[mixed]) for name, change in VARIANTS.items()]
    poisoned = {**common, "model": str(model_dirs["poisoned"]), "num_gpu_blocks_override": 24}  # soon used again
    found.append(Job(name="poison", llm=poisoned, runs=poison_runs()))
    if (tp, pp) in WORKLOAD_LAYOUTS:
        whole = Workload(name="whole", seed=5, num_requests=NUM_REQUESTS, num_aborts=0)
        aborts = Workload(name="aborts", seed=5, num_requests=NUM_REQUESTS, num_aborts=NUM_ABORTS)
        few = {**llama, "num_gpu_blocks_override": 40, "max_num_seqs": 32}
        found.append(Job(name="workload", llm=few, workloads=[whole, aborts]))
    return found
