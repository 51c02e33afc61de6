import pytest
import torch

from kvq.errors import QuantizerContractError
from kvq.plugin_api import Part
from kvq.store.chunk_writer import ChunkWriter
from kvq.store.chunks import ChunkedStore, chunk_capacity


class Verbatim:
    """Stores states as they are and records how it was called."""

    group_local = True

    def __init__(self, block_length=64, group_local=True):
        self.block_length = block_length
        self.group_local = group_local
        self.calls = []

    def layout(self):
        return {"states": Part((self.block_length, 4), torch.float32)}

    def encode(self, states):
        self.calls.append(tuple(states.shape))
        return {"states": states.unflatten(2, (-1, self.block_length)).clone()}

    def decode_into(self, parts, out):
        out.copy_(parts["states"].flatten(2, 3))

    def constants(self):
        return {}


def make_store(batch=2, **options):
    return ChunkedStore(ChunkWriter(Verbatim(**options), 3, torch.device("cpu")), batch)


def states(tokens, batch=2, start=0):
    count = torch.arange(start, start + tokens, dtype=torch.float32)[None, None, :, None]
    return count + torch.arange(batch)[:, None, None, None] * 10_000 + torch.zeros(batch, 3, tokens, 4)


def read(view, batch=2, start=0):
    out = torch.full((batch, 3, view.length - start, 4), -1.0)
    view.decode_into(out, start)
    return out


def test_capacity_is_bounded_by_what_is_stored_or_wanted():
    assert chunk_capacity(0, 1, 64) == 1
    assert chunk_capacity(3, 1, 64) == 1
    assert chunk_capacity(8, 1, 64) == 2
    assert chunk_capacity(1000, 1, 64) == 32, "2,048 tokens at the most"
    assert chunk_capacity(0, 100, 64) == 32
    assert chunk_capacity(0, 13, 64) == 8, "what is wanted fills it at once"
    assert chunk_capacity(0, 1, 4096) == 1
    small = [chunk_capacity(stored, 2, 32, (64, 512)) for stored in (0, 8, 16, 32, 1000)]
    assert small == [2, 2, 4, 8, 16], "64 tokens, as many times a power of two, and 512 at the most"


@pytest.mark.parametrize("split", [[64] * 40, [2560], [640, 1280, 64 * 10]])
def test_what_goes_in_comes_out_whatever_the_split(split):
    store, start = make_store(), 0
    for tokens in split:
        store = store.append(states(tokens, start=start))
        start += tokens
    assert store.length == 2560
    assert torch.equal(read(store.view()), states(2560))
    assert torch.equal(read(store.view(), start=1088), states(2560)[:, :, 1088:])


def test_full_chunks_are_never_moved_and_slack_stays_small():
    store, seen = make_store(), {}
    for block in range(94):
        store = store.append(states(64, start=block * 64))
        for index, segment in enumerate(store.segments):
            assert seen.setdefault(index, segment.parts["states"].data_ptr()) == segment.parts["states"].data_ptr()
        allocated = sum(segment.capacity for segment in store.segments)
        if store.length > 1000:
            assert allocated - store.blocks <= 0.25 * store.blocks
    assert len(store.segments) < 25


def test_a_view_does_not_see_later_changes():
    store = make_store()
    store = store.append(states(128))
    view = store.view()
    store = store.append(states(128, start=128))
    store = store.truncate(64)
    store = store.append(states(64, start=999))
    assert torch.equal(read(view)[:, :, :64], states(128)[:, :, :64])
    assert view.length == 128


def test_a_view_survives_a_truncation_that_is_written_over():
    store = make_store(block_length=8)
    store = store.append(states(8 * 64))
    view = store.view()
    store = store.truncate(8 * 3)
    store = store.append(states(8 * 30, start=5000))
    assert torch.equal(read(view), states(8 * 64))
    assert torch.equal(read(store.view())[:, :, 24:], states(8 * 30, start=5000))


def test_forks_share_chunks_and_part_on_writing():
    store = make_store(block_length=8)
    store = store.append(states(8 * 37))
    before = {segment.parts["states"].data_ptr() for segment in store.segments}
    store = fork = store.shared()
    assert {segment.parts["states"].data_ptr() for segment in fork.segments} == before
    store = store.append(states(8 * 5, start=1000))
    fork = fork.append(states(8 * 5, start=7000))
    assert torch.equal(read(store.view())[:, :, 8 * 37 :], states(8 * 5, start=1000))
    assert torch.equal(read(fork.view())[:, :, 8 * 37 :], states(8 * 5, start=7000))
    assert torch.equal(read(fork.view())[:, :, : 8 * 37], states(8 * 37))


def test_rows_are_reordered_by_index_and_dropped_for_good():
    store = make_store(block_length=8)
    store = store.append(states(8 * 20))
    pointers = [segment.parts["states"].data_ptr() for segment in store.segments]
    store = store.select_rows(torch.tensor([1, 0]))
    store = store.select_rows(torch.tensor([1, 1]))
    assert [segment.parts["states"].data_ptr() for segment in store.segments] == pointers
    assert torch.equal(read(store.view()), states(8 * 20)[[0, 0]])
    store = store.append(states(8 * 3, start=500))
    assert torch.equal(read(store.view())[:, :, 160:], states(8 * 3, start=500))
    held = sum(tensor.nbytes for tensor, _ in store.tensors())
    store = store.select_rows(torch.tensor([1]))
    assert torch.equal(read(store.view(), batch=1)[:, :, :160], states(8 * 20)[:1])
    assert sum(tensor.nbytes for tensor, _ in store.tensors()) == pytest.approx(held / 2, rel=0.01)


def test_the_first_chunks_are_forgotten_whole_with_their_copies():
    store = make_store().append(states(64)).append(states(192, start=64)).append(states(64, start=256))
    assert [segment.used for segment in store.segments] == [1, 2, 1, 1]
    assert [store.count_leading(limit) for limit in (63, 64, 191, 192, 255, 256, 320)] == [
        0,
        64,
        64,
        192,
        192,
        256,
        320,
    ]
    left = store.prefetch(torch.device("cpu")).without_first(192)
    assert torch.equal(read(left.view()), states(128, start=192))
    assert len(left.prefetched) == 2
    assert sum(tensor.numel() for tensor, _ in left.tensors()) == 2 * states(128).numel()


def test_a_chunk_with_room_is_not_forgotten():
    store = make_store().append(states(512)).truncate(448)
    assert store.segments[-1].used < store.segments[-1].capacity
    assert store.count_leading(448) == 448 - 64 * store.segments[-1].used


def test_a_store_stays_what_it_was_when_another_is_made_of_it():
    store = make_store(block_length=8).append(states(8 * 3))
    store.append(states(8 * 30))
    store.truncate(8)
    store.select_rows(torch.tensor([1]))
    assert torch.equal(read(store.view()), states(8 * 3))
    assert torch.equal(read(store.append(states(8 * 2, start=700)).view())[:, :, 24:], states(8 * 2, start=700))


def test_a_quantizer_that_is_not_group_local_sees_one_block_of_one_row():
    store = make_store(group_local=False)
    store = store.append(states(256))
    assert set(store.codec.calls) == {(1, 3, 64, 4)}
    assert len(store.codec.calls) == 8
    assert torch.equal(read(store.view()), states(256))


@pytest.mark.parametrize("fault", ["names", "shape", "dtype"])
def test_an_encoding_outside_the_layout_is_refused(fault):
    store = make_store()
    good = store.codec.encode
    store.codec.encode = {
        "names": lambda s: {"other": good(s)["states"]},
        "shape": lambda s: {"states": good(s)["states"][..., :2]},
        "dtype": lambda s: {"states": good(s)["states"].double()},
    }[fault]
    with pytest.raises(QuantizerContractError, match=r"Verbatim\.encode returned"):
        store = store.append(states(64))


def test_chunks_made_under_inference_mode_can_be_written_outside():
    store = make_store(block_length=8)
    with torch.inference_mode():
        store = store.append(states(8 * 33))
    store = store.append(states(8 * 7, start=8 * 33))
    assert torch.equal(read(store.view()), states(8 * 40))
