"""Sanity of the slow twin and of the tiny checkpoints: what must hold whatever the package does."""

import json
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer, PreTrainedModel
from twins import reference

pytestmark = pytest.mark.slow

BOUNDARY = 3
MAX_NEW = 12
DTYPES = (torch.float32, torch.bfloat16)
CASES = [(arch, dtype) for arch in tiny.ALL_ARCHS for dtype in DTYPES]
PARTIAL_CASES = [(arch, torch.float32) for arch in tiny.ALL_ARCHS] + [("llama", torch.bfloat16)]


def case_id(case: tuple[str, torch.dtype]) -> str:
    arch, dtype = case
    return f"{arch}-{str(dtype).removeprefix('torch.')}"


class Pair:
    """A loaded pair, its tokenizer and its first-divergence events."""

    def __init__(self, folder: Any, arch: str, dtype: torch.dtype, change: str = "all"):
        pt_dir, it_dir = tiny.make_pair(folder, arch, dtype=dtype, change=change, boundary=BOUNDARY)
        self.pt, self.it = (reference.remember(reference.load(path, dtype)) for path in (pt_dir, it_dir))
        self.lineup = {"pt": self.pt, "it": self.it}
        self.tokenizer = AutoTokenizer.from_pretrained(pt_dir)

    def ids(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt).input_ids

    @cache  # noqa: B019 - pairs live as long as the test module
    def outcomes(self, n_prompts: int) -> list[dict[str, Any] | str]:
        return [
            reference.first_divergence(self.pt, self.it, self.ids(prompt), MAX_NEW, [tiny.EOS_ID])
            for prompt in tiny.PROMPTS[:n_prompts]
        ]

    def events(self, n_prompts: int = 7) -> list[dict[str, Any]]:
        return [outcome for outcome in self.outcomes(n_prompts) if isinstance(outcome, dict)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    @cache
    def pair(arch: str, dtype: torch.dtype, change: str = "all") -> Pair:
        return Pair(tmp_path_factory.mktemp(arch), arch, dtype, change)

    return pair


def margin(logits: torch.Tensor, event: dict[str, Any]) -> float:
    return float(logits[event["y_it"]] - logits[event["y_pt"]])


def plain_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return reference.readout(model, reference.final_hidden(model, ids)[-1])


@pytest.mark.parametrize(("arch", "dtype"), CASES, ids=map(case_id, CASES))
class TestEveryArchitecture:
    def test_most_prompts_diverge_and_tokens_vary(self, make, arch, dtype):
        events = make(arch, dtype).events()
        assert len(events) >= 5
        assert len({event["y_pt"] for event in events}) >= 4
        assert any(event["step"] > 0 for event in events)

    def test_events_say_what_both_models_choose(self, make, arch, dtype):
        pair = make(arch, dtype)
        for event in pair.events():
            for model, token, gap in ((pair.pt, "y_pt", "gap_pt"), (pair.it, "y_it", "gap_it")):
                logits = plain_logits(model, event["ids"])
                first, second = logits.topk(2).values
                assert int(logits.argmax()) == event[token]
                assert float(first - second) == event[gap] > 0
            assert event["position"] == len(event["ids"]) - 1

    def test_step_counts_the_shared_greedy_tokens(self, make, arch, dtype):
        pair = make(arch, dtype)
        found = [
            (pair.ids(prompt), event)
            for prompt, event in zip(tiny.PROMPTS[:7], pair.outcomes(7), strict=True)
            if isinstance(event, dict)
        ]
        for prompt_ids, event in found:
            assert event["ids"][: len(prompt_ids)] == prompt_ids
            assert event["step"] == len(event["ids"]) - len(prompt_ids)
        # One event in full: both models choose every shared token, and max_new counts the choices compared.
        prompt_ids, event = next((ids, event) for ids, event in found if event["step"] > 0)
        for length in range(len(prompt_ids), len(event["ids"])):
            for model in (pair.pt, pair.it):
                assert int(plain_logits(model, event["ids"][:length]).argmax()) == event["ids"][length]
        step = event["step"]
        assert reference.first_divergence(pair.pt, pair.it, prompt_ids, step, [tiny.EOS_ID]) == "no_divergence"
        assert reference.first_divergence(pair.pt, pair.it, prompt_ids, step + 1, [tiny.EOS_ID]) == event

    def test_readout_agrees_with_the_models_own_logits(self, make, arch, dtype):
        pair = make(arch, dtype)
        ids = pair.events()[0]["ids"]
        ours = reference.readout(pair.pt, reference.final_hidden(pair.pt, ids))
        theirs = reference.forward(pair.pt, ids).float()
        # bfloat16 keeps 8 bits and logits reach 16; soft-capping rounds a few times more.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.15)

    @pytest.mark.parametrize("scope", ["prefix", "position"])
    def test_diagonal_cells_are_the_plain_forward(self, make, arch, dtype, scope):
        pair = make(arch, dtype)
        for event, boundary in zip(pair.events(), (1, BOUNDARY), strict=False):
            for model, token in ((pair.pt, "y_pt"), (pair.it, "y_it")):
                cell = reference.cell(model, model, event["ids"], boundary, event["y_pt"], event["y_it"], scope)
                hidden = reference.final_hidden(model, event["ids"])[-1]
                assert torch.equal(cell.final_hidden_last, hidden)
                assert cell.margin == margin(reference.readout(model, hidden), event)
                assert cell.top1_id == event[token]

    def test_overwriting_with_its_own_state_is_a_no_op_at_every_position(self, make, arch, dtype):
        pair = make(arch, dtype)
        ids = pair.events()[0]["ids"]
        state = reference.states(pair.pt, ids, BOUNDARY)
        assert state.dtype == dtype
        assert state.shape == (len(ids), pair.pt.config.hidden_size)
        assert torch.equal(reference.overwritten(pair.pt, ids, BOUNDARY, state), reference.final_hidden(pair.pt, ids))

    def test_native_diagonal_has_the_signs_of_the_event(self, make, arch, dtype):
        pair = make(arch, dtype)
        for event in pair.events():
            prefix = reference.grid(pair.lineup, event, BOUNDARY)
            assert set(prefix) == {("pt", "pt"), ("pt", "it"), ("it", "pt"), ("it", "it")}
            assert prefix["pt", "pt"].margin < 0 < prefix["it", "it"].margin

    def test_scopes_agree_on_the_diagonal_alone(self, make, arch, dtype):
        pair = make(arch, dtype)
        event = pair.events()[0]
        prefix = reference.grid(pair.lineup, event, BOUNDARY)
        position = reference.grid(pair.lineup, event, BOUNDARY, scope="position")
        for (u, late), cell in prefix.items():
            assert torch.equal(cell.final_hidden_last, position[u, late].final_hidden_last) == (u == late)

    def test_position_scope_keeps_the_late_models_earlier_rows(self, make, arch, dtype):
        pair = make(arch, dtype)
        ids = pair.events()[0]["ids"]
        state = reference.states(pair.pt, ids, BOUNDARY)
        hidden = reference.overwritten(pair.it, ids, BOUNDARY, state, "position")
        plain = reference.final_hidden(pair.it, ids)
        assert torch.equal(hidden[:-1], plain[:-1])
        assert not torch.equal(hidden[-1], plain[-1])
        mixed = reference.states(pair.it, ids, BOUNDARY)
        mixed[-1] = state[-1]
        assert torch.equal(hidden, reference.overwritten(pair.it, ids, BOUNDARY, mixed, "prefix"))

    def test_common_readout_reads_every_cell_with_one_head(self, make, arch, dtype):
        pair = make(arch, dtype)
        event = pair.events()[0]
        native = reference.grid(pair.lineup, event, BOUNDARY)
        common = reference.grid(pair.lineup, event, BOUNDARY, readout_model=pair.it)
        for key, cell in common.items():
            assert torch.equal(cell.final_hidden_last, native[key].final_hidden_last)
            assert cell.margin == margin(reference.readout(pair.it, cell.final_hidden_last), event)
            assert (cell.margin == native[key].margin) == (key[1] == "it")


@pytest.mark.parametrize(("arch", "dtype"), PARTIAL_CASES, ids=map(case_id, PARTIAL_CASES))
class TestPartialChange:
    def test_late_change_leaves_the_state_at_the_boundary(self, make, arch, dtype):
        pair = make(arch, dtype, "late")
        ids = pair.ids(tiny.PROMPTS[3])
        for boundary in range(1, tiny.N_BLOCKS):
            same = torch.equal(reference.states(pair.pt, ids, boundary), reference.states(pair.it, ids, boundary))
            assert same == (boundary <= BOUNDARY)

    def test_upstream_change_makes_the_late_stack_irrelevant(self, make, arch, dtype):
        pair = make(arch, dtype, "upstream")
        events = pair.events(3)
        assert events
        for event in events[:2]:
            cells = reference.grid(pair.lineup, event, BOUNDARY)
            assert cells["pt", "it"].margin == cells["pt", "pt"].margin < 0
            assert cells["it", "pt"].margin == cells["it", "it"].margin > 0


def test_reasons_for_no_event(make):
    pair = make("llama", torch.float32, "none")
    ids = pair.ids(tiny.PROMPTS[0])
    assert reference.first_divergence(pair.pt, pair.it, ids, 3, []) == "no_divergence"
    chosen = int(plain_logits(pair.pt, ids).argmax())
    assert reference.first_divergence(pair.pt, pair.it, ids, 3, [chosen]) == "both_ended"
    for one, other in zip(pair.pt.parameters(), pair.it.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gemma3_window_matters(tmp_path):
    """Beyond the window of 6, a sliding block sees less than the same block with full attention."""
    narrow = reference.load(tiny.make_checkpoint(tmp_path / "narrow", "gemma3"), torch.float32)
    wide = reference.load(tiny.make_checkpoint(tmp_path / "wide", "gemma3", sliding_window=64), torch.float32)
    ids = list(range(10, 30))
    window = 6
    for boundary in (1, BOUNDARY):
        one, other = reference.states(narrow, ids, boundary), reference.states(wide, ids, boundary)
        torch.testing.assert_close(one[:window], other[:window])
        assert (one[window:] - other[window:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("arch", tiny.ALL_ARCHS)
def test_tied_and_sharded_checkpoints_load(tmp_path, arch):
    for tie in (True, False):
        folder = tiny.make_checkpoint(tmp_path / str(tie), arch, tie=tie, shards=True)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        model = reference.load(folder, torch.float32)
        tied = reference.parts(model).head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert tied == tie
        assert len(reference.parts(model).blocks) == tiny.N_BLOCKS


def test_same_arguments_make_the_same_files(tmp_path):
    one, other = (tiny.make_pair(tmp_path / name, "qwen3", seed=5) for name in ("one", "other"))
    for left, right in zip(one, other, strict=True):
        names = sorted(path.name for path in left.iterdir())
        assert names == sorted(path.name for path in right.iterdir())
        assert "tokenizer.json" in names
        assert "generation_config.json" in names
        for name in names:
            assert (left / name).read_bytes() == (right / name).read_bytes(), name
    assert (one[0] / "tokenizer.json").read_bytes() == (one[1] / "tokenizer.json").read_bytes()
    assert (one[0] / "model.safetensors").read_bytes() != (one[1] / "model.safetensors").read_bytes()


def test_tokenizer_round_trips_ascii(tmp_path):
    tiny.write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == tiny.VOCAB_SIZE
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (tiny.EOS_ID, tiny.PAD_ID)
    printable = "".join(chr(code) for code in range(32, 127)) + "\n\t"
    for text in (printable, *tiny.PROMPTS):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    lengths = {len(tokenizer(prompt).input_ids) for prompt in tiny.PROMPTS}
    assert min(lengths) <= 3
    assert max(lengths) <= 30
    assert len(lengths) >= 8


def test_prompt_lines(tmp_path):
    lines = tiny.write_prompts(tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["prompt"] for record in records] == list(tiny.PROMPTS)
    assert len({record["id"] for record in records}) == len(tiny.PROMPTS) == len(set(tiny.PROMPTS)) == 24
    assert all(set(record) == {"id", "prompt", "category"} for record in records)
    assert len(tiny.write_prompts(tmp_path / "few.jsonl", 5).read_text(encoding="utf-8").splitlines()) == 5


def test_unknown_change_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of"):
        tiny.make_pair(tmp_path, "llama", change="early")
