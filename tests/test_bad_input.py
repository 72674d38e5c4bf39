"""What users get wrong, through real processes: one clear error, soon; nothing hangs, nothing is tried again."""

import json
import shutil

import pytest
from worlds import SCRIPTS, run_world

SECONDS = 60.0  # every world here ends well within; most of it is the import of torch on a busy machine
SMALL = {"max_model_len": 64, "num_gpu_blocks_override": 16, "num_threads": 1}


@pytest.fixture(scope="module")
def broken(checkpoint_dirs, tmp_path_factory):
    """name -> a directory with a defect; `sharded` stands for the checkpoint of several files."""
    root = tmp_path_factory.mktemp("broken")

    def copy(name, source="llama"):
        return shutil.copytree(checkpoint_dirs[source], root / name)

    (copy("no config") / "config.json").unlink()
    (copy("corrupt config") / "config.json").write_text('{"architectures": ["Llama')
    edit_json(copy("unknown architecture") / "config.json", architectures=["LlamoForCausalLM"])
    edit_json(copy("no hidden size") / "config.json", hidden_size=None)
    (copy("no tokenizer") / "tokenizer.json").unlink()
    (copy("corrupt tokenizer") / "tokenizer.json").write_text("{}")
    (copy("no weights") / "model.safetensors").unlink()
    cut(copy("cut weights") / "model.safetensors", 0.7)
    cut(copy("cut shard", "llama31") / "model-00003-of-00006.safetensors", 0.5)
    (copy("no shard", "llama31") / "model-00002-of-00006.safetensors").unlink()
    change_tensors(copy("no tensor") / "model.safetensors", drop="model.layers.3.mlp.up_proj.weight")
    change_tensors(copy("wrong shape") / "model.safetensors", transpose="model.layers.2.mlp.down_proj.weight")
    return root


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def change_tensors(path, drop=None, transpose=None):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop(drop, None)
    if transpose:
        tensors[transpose] = tensors[transpose].T.contiguous()
    save_file(tensors, path)


# ------------------------------------------------------------------------------------------ LLM in a script

# name -> (arguments; a directory of `broken` for model, else the good one), what the message must hold
REFUSED = {
    "too few ranks": (
        {"tensor_parallel_size": 3},
        ["tensor_parallel_size 3", "needs 3 ranks, but 2 are running", "torchrun --nproc-per-node 3"],
    ),
    "too many ranks": (
        {"tensor_parallel_size": 1},
        ["needs 1 rank, but 2 are running", "this works: python bad_engines.py"],
    ),
    "odd stages": ({"pipeline_parallel_size": 3}, ["2 ranks cannot form 3 pipeline stages"]),
    "stages": (
        {"pipeline_parallel_size": 2, "hf_overrides": {"num_hidden_layers": 1}},
        ["pipeline_parallel_size 2 is more than", "1 layers"],
    ),
    "partition": ({"pipeline_parallel_size": 2, "pipeline_layer_partition": [1, 1]}, ["pipeline_layer_partition", "5"]),
    "heads": (
        {"hf_overrides": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 72}},
        ["tensor", "2", "heads"],
    ),
    "no such directory": ({"model": "./nowhere/at/all"}, ["./nowhere/at/all", "no such directory"]),
    "no config": ({"model": "no config"}, ["config.json"]),
    "corrupt config": ({"model": "corrupt config"}, ["config.json is not valid JSON"]),
    "unknown architecture": ({"model": "unknown architecture"}, ["LlamoForCausalLM", "LlamaForCausalLM"]),
    "no hidden size": ({"model": "no hidden size"}, ["config.json", "hidden_size"]),
    "no tokenizer": ({"model": "no tokenizer"}, ["tokenizer.json"]),
    "corrupt tokenizer": ({"model": "corrupt tokenizer"}, ["tokenizer.json is not a tokenizer"]),
    "no weights": ({"model": "no weights"}, ["no weights", "safetensors"]),
    "cut weights": ({"model": "cut weights"}, ["model.safetensors is truncated, corrupt or unreadable"]),
    "cut shard": ({"model": "cut shard"}, ["model-00003-of-00006.safetensors is truncated"]),
    "no shard": ({"model": "no shard"}, ["index.json", "model-00002-of-00006.safetensors", "not there"]),
    "no tensor": ({"model": "no tensor"}, ["model.safetensors: tensor model.layers.3.mlp.up_proj.weight is missing"]),
    "wrong shape": ({"model": "wrong shape"}, ["model.layers.2.mlp.down_proj.weight has shape [101, 72]", "[72, 101]"]),
    "unknown argument": ({"max_modle_len": 5}, ["unknown argument 'max_modle_len'", "max_model_len"]),
    "unknown override": ({"hf_overrides": {"hiden_size": 5}}, ["hiden_size", "hidden_size"]),
    "whole prompts": (
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 32},
        ["max_num_batched_tokens (32)", "max_model_len (64)", "enable_chunked_prefill"],
    ),
    "size": ({"kv_cache_memory_bytes": "4 apples"}, ["kv_cache_memory_bytes", "4 apples"]),
    "seed": ({"seed": "x"}, ["seed must be an integer"]),
    "long": ({"max_model_len": 513}, ["max_model_len 513", "512"]),
    "few blocks": ({"num_gpu_blocks_override": 2}, ["64 tokens", "--max-model-len 32 fits"]),
    "few bytes": ({"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 40_000}, ["bytes of KV cache", "fits"]),
    "no room": ({"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 100}, ["not one block fits"]),
}
FAILING = {"ValueError": "rank 1: rank 1 has run out of luck", "OSError": "OSError", "MemoryError": "MemoryError"}


@pytest.fixture(scope="module")
def attempts(checkpoint_dirs, broken, tmp_path_factory):
    """What became of every attempt, in one world of two ranks; the last one is good."""
    root = tmp_path_factory.mktemp("attempts")
    good = {"llm": {**SMALL, "model": str(checkpoint_dirs["llama"])}}
    asked = {name: {**good, "fail": name} for name in FAILING}  # first: others, too, get as far as loading
    for name, (arguments, _) in REFUSED.items():
        model = arguments.get("model", "")
        if not model.startswith("."):
            model = str(broken / model if model else checkpoint_dirs["llama"])
        asked[name] = {"llm": {**SMALL, **arguments, "model": model}}
    asked["good"] = good
    (root / "attempts.json").write_text(json.dumps(asked))
    world = run_world(
        SCRIPTS / "bad_engines.py", root / "attempts.json", root / "results.json", ranks=2, timeout=SECONDS
    )
    assert world.returncode == 0, world.report()
    return json.loads((root / "results.json").read_text())


@pytest.mark.parametrize("name", REFUSED)
def test_an_engine_that_cannot_be_built_is_a_value_error(name, attempts):
    kind, message, seconds = attempts[name]
    assert kind in ("ValueError", "StartupError"), message
    for words in REFUSED[name][1]:
        assert words in message
    assert "\n" not in message and seconds < 15.0


@pytest.mark.parametrize("name", FAILING)
def test_a_rank_that_fails_to_load_is_named(name, attempts):
    kind, message, seconds = attempts[name]
    assert kind == "StartupError" and FAILING[name] in message and "rank 1" in message
    assert seconds < 15.0


def test_after_all_that_an_engine_works(attempts):
    assert len(attempts["good"]["token_ids"]) == 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("second LLM", "an LLM is open in this process; call its close()"),
        ("long", "prompt 1: the prompt has 64 tokens; this model takes at most 63"),
        ("empty", "empty"),
        ("token", "prompt 0: the prompt holds token id 1009; the vocabulary has ids 0 to 1008"),
        ("type", "prompt 0 must be a string or a list of token ids"),
        ("keys", "prompt 0 has the keys ['prompt']; it takes prompt_token_ids alone"),
        ("params", "2 prompts but 1 sampling_params"),
        ("bias", "logit_bias holds 1009"),
        ("closed", "this LLM is closed; build another"),
    ],
)
def test_a_request_that_cannot_run_is_a_value_error(name, words, attempts):
    kind, message, _ = attempts["good"]["refused"][name]
    assert kind == "ValueError" and words in message


# ------------------------------------------------------------------------------------------ the server


def check_told_once(world, *words):
    """Not zero, one line over all ranks and attempts, which says all of this, and no traceback."""
    assert world.returncode != 0, world.report()
    lines = [line for line in (world.rank_stderr + world.rank_stdout).splitlines() if "infer: error:" in line]
    assert len(lines) == 1, world.report()
    assert "Traceback" not in world.rank_stderr, world.report()
    for word in words:
        assert word in lines[0], world.report()


@pytest.mark.parametrize(
    ("ranks", "flags", "words"),
    [
        (
            2,
            ["-tp", "2", "-pp", "2"],
            ["tensor_parallel_size 2 x pipeline_parallel_size 2", "torchrun --nproc-per-node 4"],
        ),
        (2, ["--max-modle-len", "64"], ["--max-modle-len", "--help"]),
        (2, ["-pp", "2", "--num-gpu-blocks-override", "1"], ["bytes of KV cache", "--max-model-len 16 fits"]),
    ],
    ids=["world", "flag", "cache"],
)
def test_the_server_says_it_once_though_torchrun_would_retry(ranks, flags, words, checkpoint_dirs):
    world = run_world("infer.serve", "--model", checkpoint_dirs["llama"], "--port", "0", *flags,
                      ranks=ranks, restarts=3, timeout=SECONDS)  # fmt: skip
    check_told_once(world, *words)


def test_the_server_without_torchrun(broken):
    world = run_world("infer.serve", "--model", broken / "cut weights", ranks=1, torchrun=False, timeout=SECONDS)
    check_told_once(world, "model.safetensors is truncated")
    assert world.returncode == 2


def test_a_rank_that_fails_to_load_ends_the_server(checkpoint_dirs):
    """Found on rank 1 alone, while rank 0 waits for it."""
    world = run_world(SCRIPTS / "failing_rank.py", "error", "--model", checkpoint_dirs["llama"], "--port", "0",
                      ranks=2, restarts=3, timeout=SECONDS)  # fmt: skip
    check_told_once(world, "rank 1: model.safetensors: tensor model.norm.weight went up in smoke")


def test_a_rank_that_dies_while_loading_ends_the_server(checkpoint_dirs):
    """No line to print here, but the others must not wait for ever."""
    world = run_world(SCRIPTS / "failing_rank.py", "crash", "--model", checkpoint_dirs["llama"], "--port", "0",
                      ranks=2, timeout=SECONDS)  # fmt: skip
    assert world.returncode != 0 and "exitcode  : 9" in world.stderr, world.report()
