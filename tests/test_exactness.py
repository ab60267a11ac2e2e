"""The engine against a plain forward of a real (tiny) model: same tokens, same logprobs, whatever the schedule."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from transformers import GenerationConfig

from lite_mentor.decode import Decoder
from lite_mentor.engine import Engine, Sampling
from lite_mentor.errors import UserError
from lite_mentor.load import load_student
from lite_mentor.rollout import noise
from lite_mentor.tiny import tiny_student
from tests.test_attention import MODELS

RESULT = [300, 301, 302]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Two layers, and two query heads that share a KV head: the interpreter runs every program of every layer."""
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    student = load(tiny_student(tmp_path_factory.mktemp("student"), **sizes))
    for parameter in student.trainable():  # fresh adapters add nothing; these do
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    student.refresh_rollout_weights()
    return student


def plain_logits(student, ids: list[int]) -> torch.Tensor:
    """Logits after the last token, by the model's own attention on the whole sequence: no cache, no plan."""
    student.base.set_attn_implementation("eager")
    with torch.no_grad():
        logits = student.base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    student.base.set_attn_implementation("lite_mentor")
    return logits


def load(folder, device: str = "cpu"):
    return load_student(str(folder), quant="none", dtype="fp32", lora_rank=4, lora_alpha=8, device=device)


def twin_on(device: str, student):
    """The same student on another device."""
    twin = load(student.name, device)
    twin.load_adapter_state({name: t.to(device) for name, t in student.adapter_state().items()})
    return twin


def prompts(student) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    vocabulary = student.head_weight_VH.shape[0]
    shared = torch.randint(vocabulary, (9,), generator=generator).tolist()
    tails = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (1, 4, 7, 12)]
    other = torch.randint(vocabulary, (6,), generator=generator).tolist()
    return [*[shared + tail for tail in tails], shared + tails[1], other]


def generate(student, prompts, *, sampling, slots=8, chunk=2048, turns=2, order=None, page=16) -> list:
    engine = Engine.of(student, slots=slots, context=64, page=page)
    engine.chunk, engine.sampling = chunk, sampling
    return play(engine, prompts, turns, order)


def play(engine, prompts, turns=2, order=None) -> list:
    engine.eos_ids = frozenset()  # a random model does not know when to stop; turns end by our count instead
    order = order or range(len(prompts))
    sequences = {}
    for i in order:
        sequences[i] = engine.submit(prompts[i], noise(0, 0, str(i), 0, 8))
    turn_of = dict.fromkeys(sequences, 1)
    back = {id(s): i for i, s in sequences.items()}

    def end_turn_early(s):
        return turn_of[back[id(s)]] < turns and len(s.ids) - s.turn_start == 2

    while engine.busy:
        done = engine.step()
        for s in [s for s in engine.speaking if end_turn_early(s)]:
            engine.speaking.remove(s)
            turn_of[back[id(s)]] += 1
            engine.resume(s, RESULT)
        for s in done:
            engine.release(s)
    return [sequences[i] for i in range(len(prompts))]


def test_greedy_multi_turn_equals_a_plain_forward_token_for_token(student):
    for s in generate(student, prompts(student), sampling=Sampling(temperature=0)):
        assert sum(s.sampled) == 5  # 2 tokens, 3 injected, 3 tokens
        for t, sampled in enumerate(s.sampled):
            if sampled:
                logits = plain_logits(student, s.ids[:t])
                assert s.ids[t] == logits.argmax().item()
                assert s.logp[t] == pytest.approx(logits.log_softmax(-1)[s.ids[t]].item(), abs=1e-4)


@pytest.mark.parametrize("cut", [{}, dict(top_k=20), dict(top_p=0.9), dict(top_k=20, top_p=0.9)], ids=str)
def test_sampled_logprobs_are_those_of_a_plain_forward_at_the_temperature(student, cut):
    """Over the whole vocabulary, also where only the likeliest tokens could be drawn."""
    for s in generate(student, prompts(student), sampling=Sampling(0.7, **cut)):
        for t, sampled in enumerate(s.sampled):
            if sampled:
                logp = (plain_logits(student, s.ids[:t]) / 0.7).log_softmax(-1)
                assert s.logp[t] == pytest.approx(logp[s.ids[t]].item(), abs=1e-4)


@pytest.mark.parametrize(
    "schedule",
    [
        dict(slots=2),
        dict(chunk=5),
        dict(page=1),
        dict(page=5),
        dict(order=[5, 3, 1, 0, 2, 4]),
        dict(slots=1, order=[4, 5, 0, 1, 3, 2]),
    ],
    ids=str,
)
def test_the_schedule_cannot_change_what_is_drawn(student, schedule):
    one = generate(student, prompts(student), sampling=Sampling())
    other = generate(student, prompts(student), sampling=Sampling(), **schedule)
    assert [s.ids for s in one] == [s.ids for s in other]


@pytest.mark.parametrize("page", [1, 2, 7])
def test_sequences_that_had_to_give_their_pages_back_draw_the_same(student, page):
    roomy, tight = (Engine.of(student, slots=8, context=64, page=page, tokens=tokens) for tokens in (None, 42))
    assert [s.ids for s in play(roomy, prompts(student))] == [s.ids for s in play(tight, prompts(student))]
    assert roomy.evictions == 0
    assert tight.evictions > 0
    tight.weights_changed()
    assert len(tight.pool.free) == len(tight.pool.holders)


def test_the_kernels_draw_the_same(student, kernel_device):
    one = until_end(student)
    on_device = student if kernel_device == "cpu" else twin_on(kernel_device, student)
    for s, other in zip(one, until_end(on_device, backend="triton", burst=4), strict=True):
        assert s.ids == other.ids
        assert s.logp == pytest.approx(other.logp, abs=2e-5)


class Replay:
    """Stands in for a CUDA graph where there is none: plays the step again on the buffers that it was recorded with."""

    def __init__(self, decoder, buffers, sampling):
        decoder._step(buffers, sampling)  # recording runs it
        self.replay = lambda: decoder._step(buffers, sampling)


def graphs_anywhere(monkeypatch, record) -> None:
    """Graphs where there is no GPU: `record` stands in for the decoder's way of recording them."""
    monkeypatch.setattr(Decoder, "_record", lambda self, *what: record(self, *what))
    for room in ("decode", "engine"):
        monkeypatch.setattr(f"lite_mentor.{room}.without_graphs", lambda mode, *_: "off" if mode == "off" else "")


def until_end(student, sampling=None, graphs="off", new=16, **options) -> list:
    """Two turns of every prompt but the last, so that all share a prefix; a third of the vocabulary ends a turn."""
    engine = Engine.of(student, slots=8, context=64, page=4, graphs=graphs, **options)
    engine.eos_ids = frozenset(range(0, student.head_weight_VH.shape[0], 3))
    engine.sampling = sampling or Sampling()
    sequences = [engine.submit(p, noise(0, 0, str(i), 0, new)) for i, p in enumerate(prompts(student)[:5])]
    resumed = set()
    while engine.busy:
        for s in engine.step():
            if s.ended and s.room > len(RESULT) and id(s) not in resumed:
                resumed.add(id(s))
                engine.resume(s, RESULT)
            else:
                engine.release(s)
    engine.weights_changed()
    assert len(engine.pool.free) == len(engine.pool.holders)
    return sequences


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(0.7, top_k=40, top_p=0.9)], ids=str)
@pytest.mark.parametrize("options", [dict(burst=2), dict(burst=5), dict(burst=16), dict(burst=8, tokens=64)], ids=str)
def test_steps_without_the_host_change_nothing(student, sampling, options):
    one = until_end(student, sampling)
    assert any(s.ended for s in one)
    assert len({len(s.ids) - s.prompt_length for s in one}) > 2
    for s, other in zip(one, until_end(student, sampling, **options), strict=True):
        assert (s.ids, s.sampled, s.turn_start) == (other.ids, other.sampled, other.turn_start)
        assert s.logp == pytest.approx(other.logp, abs=2e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records real graphs")
@pytest.mark.parametrize("burst", [1, 5])
def test_recorded_steps_change_nothing(student, monkeypatch, burst):
    """Batches of 1 to 5 rows, filled up to 1, 2, 4 and 8, and tables filled up to the longest."""
    graphs_anywhere(monkeypatch, Replay)
    for s, other in zip(
        until_end(student, new=6), until_end(student, graphs="on", burst=burst, backend="triton", new=6), strict=True
    ):
        assert s.ids == other.ids
        assert s.logp == pytest.approx(other.logp, abs=2e-5)


class Breaks:
    """Recording that fails half-way, after `good` graphs; the buffers hold what the steps before left there."""

    def __init__(self, error: Exception, good: int = 0):
        self.error, self.good = error, good

    def __call__(self, decoder, buffers, sampling):
        decoder._step(buffers, sampling)
        if self.good:
            self.good -= 1
            return Replay(decoder, buffers, sampling)
        try:
            raise self.error
        except RuntimeError as error:  # as torch does at the end of a recording that was broken
            raise torch.AcceleratorError("operation failed due to a previous error during capture") from error


BROKEN = [
    (RuntimeError("operation not permitted when stream is capturing.\nCompile with ..."), "operation not permitted"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"), "CUDA out of memory"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records real graphs")
@pytest.mark.parametrize(
    ("error", "reason", "good"), [(*BROKEN[0], 0), (*BROKEN[1], 1)], ids=["at once", "after a graph"]
)
def test_where_no_graph_can_be_recorded_nothing_changes(student, monkeypatch, error, reason, good):
    graphs_anywhere(monkeypatch, Breaks(error, good))
    notes = []
    backend = "triton" if good else "torch"  # only the kernels can be played again
    found = until_end(student, graphs="auto", note=notes.append, burst=2, new=6, backend=backend)
    for s, other in zip(until_end(student, burst=2, new=6, backend="torch"), found, strict=True):
        assert s.ids == other.ids
        # With a graph that was good, some tokens were decoded by kernels, in a batch that was filled up.
        assert s.logp == (pytest.approx(other.logp, abs=2e-5) if good else other.logp)
    assert len(notes) == 1
    assert notes[0].startswith(f"decoding without CUDA graphs: a step could not be recorded ({reason}")
    assert "\n" not in notes[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records real graphs")
def test_graphs_that_were_asked_for_and_cannot_be_recorded_are_one_sentence(student, monkeypatch):
    graphs_anywhere(monkeypatch, Breaks(*BROKEN[0][:1]))
    with pytest.raises(UserError, match=r"^--cuda-graphs on: a decoding step cannot be recorded .*\(operation not"):
        until_end(student, graphs="on", backend="triton")


class Cuda:
    """Stands in for torch.cuda where there is none: writes down in which order it is used."""

    def __init__(self, broken: bool):
        self.broken, self.log, self.current = broken, [], "main"

    def Stream(self):
        return Stream(self, "side")

    def current_stream(self):
        return Stream(self, self.current)

    def graph_pool_handle(self):
        return (0, 1)

    def CUDAGraph(self):
        return "graph"

    @contextmanager
    def device(self, device):
        self.log.append(f"device {device}")
        yield

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool, stream):
        """A recording that was broken leaves its stream current, as torch's does."""
        self.current = stream.name
        self.log.append("record")
        yield
        if self.broken:
            self.current = "left behind"
            raise RuntimeError("capture")


@dataclass
class Stream:
    cuda: Cuda
    name: str

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("broken", [False, True])
def test_recording_warms_up_on_its_stream_and_puts_the_stream_back(student, monkeypatch, broken):
    decoder, cuda = Engine.of(student, slots=1, context=8).decoder, Cuda(broken)
    decoder.device = torch.device("cuda:1")
    monkeypatch.setattr("lite_mentor.decode.torch.cuda", cuda)
    monkeypatch.setattr(decoder, "_step", lambda *_: cuda.log.append(f"step on {cuda.current}"))
    with pytest.raises(RuntimeError, match="capture") if broken else nullcontext():
        assert decoder._record(None, Sampling()) == "graph"
    assert cuda.current == "main"
    assert cuda.log == [
        "device cuda:1", "side waits for main", "step on side", "record", "step on side", "main waits for side",
    ]  # fmt: skip


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_is_decoded_without_graphs(student):
    """A head that reads a value back cannot be recorded; afterwards the GPU and its random numbers are sound."""
    on_gpu, notes = twin_on("cuda", student), []

    def head(hidden_RH):
        logits_RV = on_gpu.rollout_logits(hidden_RH)
        return logits_RV * float(logits_RV.isfinite().all())

    engine = Engine.of(on_gpu, slots=8, context=64, page=4, graphs="auto", note=notes.append)
    engine.decoder.head, engine.sampling = head, Sampling()
    for s, other in zip(generate(student, prompts(student), sampling=Sampling()), play(engine, prompts(student)),
                        strict=True):  # fmt: skip
        assert s.ids == other.ids
    assert len(notes) == 1
    assert not engine.decoder.graphs
    torch.rand(3, device="cuda")
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("burst", [1, 5])
def test_cuda_graphs_change_nothing(student, burst):
    student = twin_on("cuda", student)
    for s, other in zip(until_end(student), until_end(student, graphs="on", burst=burst), strict=True):
        assert s.ids == other.ids
        assert s.logp == pytest.approx(other.logp, abs=2e-5)


def test_equal_prompts_draw_their_own_noise(student):
    same = [prompts(student)[0]] * 4
    drawn = {tuple(s.ids) for s in generate(student, same, sampling=Sampling(temperature=8))}
    assert len(drawn) == 4


def test_noise_depends_on_every_argument_and_on_nothing_else():
    base = noise(1, 2, "a", 3, 4)
    assert base == noise(1, 2, "a", 3, 4)
    assert base[:2] == noise(1, 2, "a", 3, 2)
    assert all(0 <= u < 1 for u in base)
    others = [noise(0, 2, "a", 3, 4), noise(1, 0, "a", 3, 4), noise(1, 2, "b", 3, 4), noise(1, 2, "a", 0, 4)]
    assert all(base != other for other in others)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3_text"])
def family(request, tmp_path_factory):
    """A random student of each family; Gemma's window of 8 is shorter than every prompt but one."""
    options = MODELS[request.param]
    folder = tiny_student(
        tmp_path_factory.mktemp(request.param),
        architecture=request.param,
        hidden_size=64,
        num_hidden_layers=3,
        **options,
    )
    student = load_student(str(folder), quant="none", dtype="fp32", lora_rank=4)
    student.refresh_rollout_weights()
    return student


def hf_generate(student, ids: list[int], count: int) -> list[int]:
    """Greedy, by transformers' own generate on one sequence, with its own cache and attention."""
    how = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    student.base.set_attn_implementation("eager")
    out = student.base.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), generation_config=how
    )
    student.base.set_attn_implementation("lite_mentor")
    return out[0].tolist()


@pytest.mark.parametrize("page", [1, 3, 16])
def test_greedy_multi_turn_equals_hf_generate(family, page):
    for prompt, s in zip(
        prompts(family), generate(family, prompts(family), sampling=Sampling(temperature=0), page=page), strict=True
    ):
        first = hf_generate(family, prompt, 2)
        assert s.ids == hf_generate(family, first + RESULT, 3)
