import torch

from kvq.store.window import TokenBuffer


def tokens(count, start=0):
    return torch.arange(start, start + count, dtype=torch.float32)[None, None, :, None].expand(1, 1, count, 2)


def test_a_view_stays_what_it_was_while_tokens_are_added_behind_it():
    window = TokenBuffer.of(32, tokens(5))
    view = window.view()
    grown = window.keep_last(8, tokens(3, 100))
    assert grown.buffer is window.buffer, "there is room"
    assert torch.equal(view, tokens(5))
    assert torch.equal(grown.view(), torch.cat([tokens(5), tokens(3, 100)], dim=2))


def test_two_that_share_a_buffer_part_when_they_grow():
    shared = TokenBuffer.of(32, tokens(5)).shared()
    one, other = shared.keep_last(7, tokens(2, 100)), shared.keep_last(7, tokens(2, 200))
    assert torch.equal(one.view(), torch.cat([tokens(5), tokens(2, 100)], dim=2))
    assert torch.equal(other.view(), torch.cat([tokens(5), tokens(2, 200)], dim=2))


def test_what_a_shared_buffer_holds_is_counted_with_its_room():
    window = TokenBuffer.of(32, tokens(8))
    for one in (window, window.shared()):
        (held,) = one.held()
        assert held.tensor.untyped_storage().nbytes() == 32 * 2 * 4
        assert held.used == 8 / 32
