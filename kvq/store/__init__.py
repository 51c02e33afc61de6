"""The tokens of one side of one layer: quantized ones in chunks, the newest and the first ones in full precision.

How the quantized tokens nest, from small to large:

    group    elements that share one scale, along the tokens of a channel or along the channels of a token
    block    the fewest tokens quantized together, `block_length` of them; a whole number of groups
    chunk    one allocation with room for `capacity` blocks; never moved, and never written to once it is full
    segment  a chunk as one store sees it: (chunk, used blocks, order of the batch's rows)
    store    the segments of a side in order of their tokens; `SideContents` adds window, sinks and cropped groups

    flush    the whole blocks of both sides that leave the window at once, `flush_length` tokens
    run      in files only: neighbouring segments with one batch order
"""
