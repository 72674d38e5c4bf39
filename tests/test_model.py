"""Logits against transformers in float32, for every reader, at many layouts, with chunked prefill and decode.

Pipeline stages are chained in one process; tensor-parallel ranks are threads that meet in a barrier.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from infer.cache import pages
from infer.config import EngineConfig
from infer.layers.attention import ForwardContext
from infer.models.config import ModelConfig, load_model_config
from infer.models.decoder import Stage, balanced_layers
from infer.weights import Checkpoint, init_dummy_weights, load_weights

LENGTHS = (41, 23)  # of the two sequences every model is run on
BLOCK_SIZE = 4
LAYOUTS = [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1), (2, 2)]
CPU = torch.device("cpu")

SMALL = {
    "vocab_size": 1009,
    "num_hidden_layers": 4,
    "intermediate_size": 100,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
NINE_HEADS = SMALL | {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
FIVE_HEADS = SMALL | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
Llama, Mistral = transformers.LlamaConfig, transformers.MistralConfig
Qwen2, Qwen3 = transformers.Qwen2Config, transformers.Qwen3Config

CASES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: Llama(**NINE_HEADS),
    "llama-tied": lambda: Llama(**NINE_HEADS, tie_word_embeddings=True),
    "llama-biases-llama3": lambda: Llama(**FIVE_HEADS, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama-linear": lambda: Llama(
        **FIVE_HEADS, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    ),
    "llama-yarn-gelu": lambda: Llama(**NINE_HEADS, rope_parameters=YARN, hidden_act="gelu_pytorch_tanh"),
    "mistral-window": lambda: Mistral(**FIVE_HEADS, sliding_window=7, head_dim=16),
    "mistral": lambda: Mistral(**NINE_HEADS, sliding_window=None),
    "qwen2": lambda: Qwen2(**NINE_HEADS, tie_word_embeddings=True),
    "qwen2-window": lambda: Qwen2(**NINE_HEADS, use_sliding_window=True, sliding_window=9, max_window_layers=2),
    "qwen3": lambda: Qwen3(**NINE_HEADS, head_dim=12, tie_word_embeddings=True),
    "qwen3-bias": lambda: Qwen3(**FIVE_HEADS, head_dim=10, attention_bias=True),
}


class Meeting:
    """What the threads that play the ranks of one group share."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[Tensor | None] = [None] * size


class ThreadGroup:
    """The part of infer.parallel.groups.Group a stage uses, among threads."""

    def __init__(self, meeting: Meeting, index: int):
        self.meeting, self.index, self.size = meeting, index, len(meeting.parts)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor
        self.meeting.parts[self.index] = tensor
        self.meeting.barrier.wait()
        total = torch.stack(self.meeting.parts).sum(0)
        self.meeting.barrier.wait()
        return total


@dataclass
class Saved:
    """A checkpoint, the sequences to run on it, and the logits transformers gives for them."""

    path: Path
    sequences: list[Tensor]
    logits: list[Tensor]


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_random(CASES[request.param](), tmp_path_factory.mktemp("model"))


def save_random(config: transformers.PretrainedConfig, path: Path) -> Saved:
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(path)
    sequences = [torch.randint(0, SMALL["vocab_size"], (length,)) for length in LENGTHS]
    with torch.no_grad():
        logits = [model(sequence.unsqueeze(0)).logits[0] for sequence in sequences]
    return Saved(path, sequences, logits)


def read_config(path: Path) -> ModelConfig:
    return load_model_config(path, EngineConfig(model=str(path), dtype="float32"))


def run_layout(
    c: ModelConfig, tp: int, pp: int, fill: Callable[[Stage], None], sequences: list[Tensor], **layout: bool
) -> list[Tensor]:
    """The logits [length, vocabulary] of each sequence from a model split tp x pp ways. layout: as Stage has it."""
    meeting, shards, errors = Meeting(tp), [[] for _ in range(tp)], []

    def play(index: int) -> None:
        try:
            with torch.inference_mode():
                shards[index] = run_rank(c, ThreadGroup(meeting, index), pp, fill, sequences, **layout)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=play, args=(index,)) for index in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [torch.cat(parts, dim=-1) for parts in zip(*shards, strict=True)]


def build_stages(
    c: ModelConfig, group: ThreadGroup, pp: int, device: torch.device = CPU, **layout: bool
) -> list[Stage]:
    stages = enumerate(balanced_layers(c, pp))
    return [
        Stage(c, layers, group, is_first=i == 0, is_last=i == pp - 1, dtype=torch.float32, device=device, **layout)
        for i, layers in stages
    ]


def run_rank(
    c: ModelConfig, group: ThreadGroup, pp: int, fill: Callable[[Stage], None], sequences: list[Tensor], **layout: bool
) -> list[Tensor]:
    """One tensor-parallel rank of all stages: batches of uneven chunks of both sequences, then single tokens."""
    stages = build_stages(c, group, pp, **layout)
    caches = []
    # Blocks out of order and of both sequences interleaved; what was there before must not matter.
    tables = [torch.randperm(24, generator=torch.Generator().manual_seed(3)).view(2, 12).int()[s] for s in range(2)]
    for stage in stages:
        fill(stage)
        memory = pages.allocate(24, BLOCK_SIZE, stage.kv_layout, stage.num_layers, torch.float32, CPU)
        for page in (*memory.k, *memory.v):
            page.fill_(9.0)
        caches.append((memory.k, memory.v))
    done, logits = [0, 0], [[], []]
    for chunk in [(5, 0), (9, 6), (1, 11), (20, 1), *[(1, 1)] * 5, (1, 0)]:
        spans = [range(a, a + n) for a, n in zip(done, chunk, strict=True)]
        active = [s for s in range(2) if chunk[s]]
        tokens = torch.cat([sequences[s][spans[s].start : spans[s].stop] for s in active])
        hidden = tokens
        for stage, (k_pages, v_pages) in zip(stages, caches, strict=True):
            hidden = stage(hidden, make_context(tables, spans, active, k_pages, v_pages))
        for s, part in zip(active, stages[-1].logits(hidden).split([chunk[s] for s in active]), strict=True):
            logits[s].append(part)
        done = [span.stop for span in spans]
    assert done == list(LENGTHS)
    return [torch.cat(parts) for parts in logits]


def make_context(
    tables: list[Tensor], spans: list[range], active: list[int], k_pages: list[Tensor], v_pages: list[Tensor]
) -> ForwardContext:
    positions = [torch.arange(spans[s].start, spans[s].stop) for s in active]
    slots = [
        tables[s].long()[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
        for s, at in zip(active, positions, strict=True)
    ]
    lengths = torch.tensor([0] + [len(spans[s]) for s in active])
    return ForwardContext(
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        block_table=torch.stack([tables[s] for s in active]),
        query_start=lengths.cumsum(0).int(),
        seq_lens=torch.tensor([spans[s].stop for s in active], dtype=torch.int32),
        k_pages=k_pages,
        v_pages=v_pages,
    )


@pytest.mark.parametrize("saved", CASES, indirect=True)
def test_logits_equal_transformers_at_every_layout(saved: Saved) -> None:
    c = read_config(saved.path)
    for tp, pp in LAYOUTS:
        got = run_layout(c, tp, pp, lambda stage: load_weights(stage, Checkpoint(saved.path)), saved.sequences)
        for mine, reference in zip(got, saved.logits, strict=True):
            worst = (mine - reference).abs().max().item()
            assert worst < 1e-4, f"tp={tp} pp={pp}: logits differ by {worst}"


@pytest.mark.parametrize("saved", ["qwen3-bias"], indirect=True)
def test_as_many_ranks_as_heads(saved: Saved) -> None:
    c = read_config(saved.path)
    got = run_layout(c, 5, 4, lambda stage: load_weights(stage, Checkpoint(saved.path)), saved.sequences)
    for mine, reference in zip(got, saved.logits, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("saved", ["mistral-window"], indirect=True)
def test_a_window_hides_what_lies_before_it(saved: Saved) -> None:
    """The parity above is worth something only if the window changes the result."""
    full = read_config(saved.path)
    full = type(full)(**{**vars(full), "window": (0,) * full.num_layers})
    got = run_layout(full, 1, 1, lambda stage: load_weights(stage, Checkpoint(saved.path)), saved.sequences)
    assert (got[0] - saved.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("saved", ["llama-biases-llama3"], indirect=True)
def test_dummy_weights_are_the_same_model_at_every_layout(saved: Saved) -> None:
    c = read_config(saved.path)
    one = run_layout(c, 1, 1, lambda stage: init_dummy_weights(stage, 5), saved.sequences)
    assert one[0].std() > 0
    for tp, pp in LAYOUTS[1:]:
        got = run_layout(c, tp, pp, lambda stage: init_dummy_weights(stage, 5), saved.sequences)
        for mine, reference in zip(got, one, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=0)
    other = run_layout(c, 1, 1, lambda stage: init_dummy_weights(stage, 6), saved.sequences)
    assert not torch.allclose(one[0], other[0], atol=1e-3)


@pytest.mark.parametrize("saved", ["llama-tied"], indirect=True)
def test_the_planner_reads_the_declaration(saved: Saved) -> None:
    """Built on the meta device, a stage tells what it takes without taking it."""
    c = read_config(saved.path)
    groups = [ThreadGroup(Meeting(2), index) for index in range(2)]
    planned = [[stage.parameter_bytes for stage in build_stages(c, g, 2, torch.device("meta"))] for g in groups]
    real = [build_stages(c, g, 2) for g in groups]
    for index, stages in enumerate(real):
        held = [sum(p.numel() * p.element_size() for p in stage.parameters()) for stage in stages]
        assert held == planned[index]
    # 9 heads, 3 KV heads over 2 ranks: KV heads 0, 1 and 1, 2.
    assert [stage.kv_layout.heads for stage in (real[0][0], real[1][0])] == [2, 2]
    first = real[0][0]
    assert first.kv_bytes_per_token == 2 * first.num_layers * 2 * c.head_dim * 4
    assert first.vocab_starts == [0, 505, 1009]
    assert [stages[0].vocab_range for stages in real] == [(0, 505), (505, 1009)]


@pytest.mark.parametrize("saved", ["llama-tied"], indirect=True)
def test_tied_weights_are_shared_on_one_stage_and_copied_on_two(saved: Saved) -> None:
    c = read_config(saved.path)
    group = ThreadGroup(Meeting(1), 0)
    (whole,) = build_stages(c, group, 1)
    assert whole.head.owner[0] is whole.embed
    pair = build_stages(c, group, 2)
    extra = sum(stage.parameter_bytes for stage in pair) - whole.parameter_bytes
    assert extra == c.vocab_size * c.hidden_size * 4


@pytest.mark.parametrize("saved", ["llama"], indirect=True)
def test_more_ranks_than_heads_is_refused(saved: Saved) -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size 10 .* 9 attention heads"):
        build_stages(read_config(saved.path), ThreadGroup(Meeting(10), 0), 1)
