"""A step of a cache inside the graphs of torch.compile: one operation that adds states and attends to them."""
