"""EngineConfig, the flags made of it, and its errors."""

import dataclasses

import pytest

from infer.config import EngineConfig, Parser, ServerConfig, add_flags, from_args


def parse(*args, config_class=EngineConfig):
    parser = Parser(prog="test")
    add_flags(parser, config_class)
    return from_args(parser.parse_args(args), config_class)


def test_every_field_has_a_flag_and_an_argument():
    parser = Parser(prog="test")
    add_flags(parser, EngineConfig)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for field in dataclasses.fields(EngineConfig):
        assert "--" + field.name.replace("_", "-") in flags
        assert field.metadata["help"]
    assert {"-tp", "-pp"} <= flags


def test_flags_and_arguments_give_the_same_config():
    config = parse(
        "--model", "m", "-tp", "2", "-pp", "3", "--max-model-len", "128", "--kv-cache-memory-bytes", "1.5G",
        "--pipeline-layer-partition", "9,11,10", "--no-enable-prefix-caching", "--hf-overrides", '{"a": 1}',
        "--dtype", "float32", "--gpu-memory-utilization", "0.5", "--block-size", "32",
    )  # fmt: skip
    assert config == EngineConfig.from_kwargs(
        model="m", tensor_parallel_size=2, pipeline_parallel_size=3, max_model_len=128, kv_cache_memory_bytes="1.5G",
        pipeline_layer_partition=[9, 11, 10], enable_prefix_caching=False, hf_overrides={"a": 1}, dtype="float32",
        gpu_memory_utilization=0.5, block_size=32,
    )  # fmt: skip
    assert config.kv_cache_memory_bytes == 3 << 29 and config.pipeline_layer_partition == (9, 11, 10)


def test_the_defaults_are_the_same_both_ways():
    assert parse("--model", "m") == EngineConfig(model="m")
    assert parse(config_class=ServerConfig) == ServerConfig()


@pytest.mark.parametrize(("text", "size"), [("4096", 4096), ("512M", 512 << 20), ("1.5g", 3 << 29), ("2T", 2 << 40)])
def test_sizes(text, size):
    assert parse("--model", "m", "--kv-cache-memory-bytes", text).kv_cache_memory_bytes == size


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--model"),
        (["--model", "m", "--max-modle-len", "5"], "--max-modle-len"),
        (["--model", "m", "-tp", "two"], "-tp.*two"),
        (["--model", "m", "-tp", "0"], "tensor_parallel_size must be a positive integer, not 0"),
        (["--model", "m", "--trust-remote-code"], "trust_remote_code must be false: code from a checkpoint"),
        (["--model", "m", "--dtype", "int8"], "--dtype.*int8.*bfloat16"),
        (["--model", "m", "--load-format", "pt"], "--load-format.*pt.*safetensors"),
        (["--model", "m", "--kv-cache-memory-bytes", "4X"], "4X.*is not a size; write 4096, 512M or 1.5G"),
        (["--model", "m", "--pipeline-layer-partition", "9;11"], "9;11.*is not a list of layer counts"),
        (["--model", "m", "--hf-overrides", "{"], "is not JSON"),
        (["--model", "m", "--hf-overrides", "[1]"], "is not a JSON object"),
        (["--model", "m", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization must be over 0 and at most 1"),
        (["--model", ""], "model must be a directory or a Hub id"),
    ],
)
def test_a_wrong_flag_is_one_error_that_names_it(args, words):
    with pytest.raises(ValueError, match=words):
        parse(*args)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"max_modle_len": 5}, "unknown argument 'max_modle_len'; did you mean max_model_len"),
        ({"zzz": 5}, "unknown argument 'zzz'; known are model, tokenizer"),
        ({"block_size": 0}, "block_size must be a positive integer, not 0"),
        ({"block_size": True}, "block_size must be a positive integer, not True"),
        ({"max_num_seqs": 1.5}, "max_num_seqs must be a positive integer, not 1.5"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be .*'no'"),
        ({"gpu_memory_utilization": "all"}, "gpu_memory_utilization must be .*'all'"),
        ({"dtype": "int8"}, "dtype must be one of auto, bfloat16, float16, float32, not 'int8'"),
        ({"pipeline_layer_partition": [1, 0], "pipeline_parallel_size": 2}, "pipeline_layer_partition"),
        ({"pipeline_layer_partition": [1, 2, 3], "pipeline_parallel_size": 2}, "pipeline_layer_partition"),
    ],
)
def test_a_wrong_argument_is_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig.from_kwargs(model="m", **kwargs)


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig(model="m").block_size = 8
