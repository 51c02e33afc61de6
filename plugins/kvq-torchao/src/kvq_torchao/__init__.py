"""torchao for kvq: affine codes by its public primitives, and the MX formats of its prototypes."""
