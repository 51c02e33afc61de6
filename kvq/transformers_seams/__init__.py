"""Where transformers is held at arm's length: private names, names of modules, kinds of layers.

Public classes of transformers are imported anywhere, its private names only where `SEAMS` lists them.
"""
