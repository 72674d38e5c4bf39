"""The scheduler's book on one choice of a request. No torch."""

from infer.request import Request, TokenLogprobs


class Sequence:
    """One choice of a request on its way.

    [0, num_computed) of `tokens` is in the cache or in a batch on its way there; [num_computed, len(tokens)) is next.
    """

    def __init__(self, seq_id: int, request: Request, choice: int, max_model_len: int, arrival: int, now: float):
        """arrival: its number among all that came. now: seconds."""
        self.seq_id, self.request, self.choice = seq_id, request, choice
        self.order = (request.priority, arrival)  # the lowest runs first, the highest is preempted
        self.arrived_at, self.queue_seconds = now, 0.0
        self.params = request.params
        self.num_prompt = len(request.prompt_token_ids)
        self.tokens = [*request.prompt_token_ids, *(request.output_token_ids or {}).get(choice, ())]
        limit = self.params.max_tokens if self.params.max_tokens is not None else max_model_len
        self.max_len = min(self.num_prompt + limit, max_model_len)
        # A grammar lets an end token come despite ignore_eos only once nothing else can.
        ignores_ends = self.params.ignore_eos and self.params.structured_outputs is None
        self.ends = frozenset(() if ignores_ends else request.eos_token_ids)
        self.stops = frozenset(self.params.stop_token_ids or ())
        self.wants_prompt_logprobs = choice == 0 and self.params.prompt_logprobs is not None
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}  # position -> entry

        self.num_computed = 0
        self.block_table: list[int] = []
        self.hashes: list[bytes] = []  # of the full blocks among the known tokens, as far as asked for
        self.num_registered = 0  # how many of block_table's blocks the prefix cache was told of
        self.awaiting = False  # a batch on its way draws its next token
        self.announced = False  # the ranks know it
        self.num_announced_tokens = 0  # how many of `tokens` the ranks know
        self.num_announced_blocks = 0
        self.reset = False  # the ranks must drop its block table
        self.num_cached = 0  # prompt tokens found in the prefix cache at first admission
        self.has_hits = False  # some of its blocks were found in the prefix cache, at its latest admission
        self.avoids_cache = False  # it computes all of its blocks itself
        self.started = False
        self.running = False

    @property
    def num_todo(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """Whether its next step is (or the one on its way was) a single generated token."""
        return self.num_generated > 0 and self.num_computed >= len(self.tokens) - 1
